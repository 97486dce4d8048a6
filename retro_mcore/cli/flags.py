"""Flags and configuration files into a dataclass of options."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from retro_mcore import logs
from retro_mcore.cli.flag_sources import flags_of_checkpoint, flags_of_file
from retro_mcore.cli.flag_spellings import (
    spell_out_switches,
    with_whole_numbers,
    without_redundant_switches,
)
from retro_mcore.cli.help import print_help
from retro_mcore.cli.window_flags import with_windows
from retro_mcore.errors import ConfigurationError, flag_of, raise_problems

Options = TypeVar("Options")


def parse_options(options_type: type[Options], argv: Sequence[str] | None = None) -> Options:
    """Read the options alone; see `parse_command`."""
    return parse_command(options_type, argv)[0]


def parse_command(
    options_type: type[Options], argv: Sequence[str] | None = None
) -> tuple[Options, str]:
    """Read flags (`--seq-length 512`), and the YAML file that --config names, into a dataclass.

    A key of the file is a field of the dataclass, or log_level. It counts as if its flag stood
    before the others, so a flag on the command line wins.

    Returns:
        The options, and the level to log at.

    Raises:
        ConfigurationError: the file is missing or holds an unknown key, there is no such level, or
            a flag's value is malformed.
        SystemExit: bad flags (code 2), `--help` (code 0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print_help(options_type)
    arguments = with_windows(arguments)
    files = _take("config", arguments)
    if len(files) > 1:
        raise ConfigurationError("--config", "given more than once", "Name one YAML file")
    for file in files:
        arguments = [*flags_of_file(options_type, Path(file), arguments), *arguments]
    level = _level(_take("log_level", arguments))
    arguments = [*flags_of_checkpoint(options_type, arguments), *arguments]
    arguments = with_whole_numbers(options_type, arguments)
    arguments = without_redundant_switches(options_type, arguments)
    arguments = spell_out_switches(options_type, arguments)
    options = tyro.cli(
        options_type,
        args=arguments,
        description=options_type.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    _refuse_empty_paths(options)
    return options, level


def _take(name: str, arguments: list[str]) -> list[str]:
    """Remove an option that every command has from the arguments; returns the values it was given.

    Raises:
        ConfigurationError: it has no value.
    """
    values, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag[2:].replace("-", "_") != name:
            rest.append(argument)
        elif equals:
            values.append(value)
        elif (following := next(remaining, None)) is not None:
            values.append(following)
        else:
            raise ConfigurationError(flag, "given without a value", "Add it")
    arguments[:] = rest
    return values


def _level(given: Sequence[str]) -> str:
    """The last level given, else the environment's, else info."""
    subject = "--log-level" if given else logs.VARIABLE
    level = given[-1] if given else os.environ.get(logs.VARIABLE, "") or "info"
    if level.lower() not in logs.LEVELS:
        raise ConfigurationError(subject, repr(level), f"Choose one of {', '.join(logs.LEVELS)}")
    return level.lower()


#: Options that name files or directories, beside those whose names end as such names do.
_PATHS = {"save", "load", "load_gpt", "input", "output", "append", "exchange", "predictions"}
_PATHS |= {"tokenizer_model", "model_config", "data_path", "valid_data_path", "json", "embedder"}
_PATH_ENDINGS = ("_dir", "_file", "_folder")


def _refuse_empty_paths(options: object) -> None:
    """Reject empty paths, which would name the current directory.

    Raises:
        ConfigurationError: naming the flag, or several of them.
    """
    problems = []
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        if field.name not in _PATHS and not field.name.endswith(_PATH_ENDINGS):
            continue
        value = getattr(options, field.name)
        given = value if isinstance(value, list) else [value]
        if "" in given and value != field.default:
            flag = flag_of(field.name)
            problems.append(ConfigurationError(flag, "an empty path", "Name a file or a directory"))
    raise_problems(problems)
