"""`--help`: a command's options in groups."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

import docstring_parser
import tyro

from retro_mcore.cli.option_groups import GROUPS, group_of


@dataclasses.dataclass
class _CommonOptions:
    """Options of every command; `cli.flags` reads them."""

    config: str | None = None
    """YAML file with options: `seq_length: 512` for --seq-length 512. Flags win over it."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged. RETRO_LOG_LEVEL in the environment sets another default."""


def print_help(options_type: type) -> NoReturn:
    """Print the help of a command and exit.

    Raises:
        SystemExit: always.
    """
    tyro.cli(
        grouped(options_type),
        args=["--help"],
        description=inspect.getdoc(options_type),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    sys.exit(0)


def grouped(options_type: type) -> type:
    """A dataclass with the options nested by group, which tyro shows under headings.

    It is made for the help alone. Flags are parsed into the flat dataclass.
    """
    groups: dict[str | None, list[Any]] = {name: [] for name in (None, *GROUPS)}
    groups[None] = _fields(_CommonOptions)
    for field in _fields(options_type):
        groups[group_of(field[0])].append(field)
    nested = [
        (name, dataclasses.make_dataclass(name, fields, kw_only=True, namespace={"__doc__": ""}))
        for name, fields in groups.items()
        if name is not None and fields
    ]
    return dataclasses.make_dataclass("Help", [*groups[None], *nested], kw_only=True)


def _fields(options_type: type) -> list[tuple[str, Any, Any]]:
    """Name, type with its help, and `dataclasses.field` of every option."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    texts = _docstrings(options_type)
    return [
        (
            field.name,
            _with_help(hints[field.name], texts.get(field.name)),
            dataclasses.field(default=field.default, default_factory=field.default_factory)
            if field.default_factory is not dataclasses.MISSING
            else dataclasses.field(default=field.default),
        )
        for field in dataclasses.fields(options_type)
    ]


def _with_help(kind: Any, text: str | None) -> Any:
    """A type with its option's help; megatron's options have it already."""
    return kind if text is None else Annotated[kind, tyro.conf.arg(help=text)]


def _docstrings(options_type: type) -> Mapping[str, str]:
    """Attribute docstrings of a dataclass and its bases."""
    return {
        parameter.arg_name: " ".join(parameter.description.split())
        for base in reversed(options_type.__mro__[:-1])
        for parameter in docstring_parser.parse_from_object(base).params
        if parameter.description
    }
