"""Options of the model from a YAML file, checked against their types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from retro_mcore.checkpoint.conversion.model_fields import Flags
from retro_mcore.errors import ConfigurationError, raise_problems
from retro_mcore.model.options import ModelArguments


def flags_of_file(source: str, values: Mapping[str, Any]) -> Flags:
    """The values of a file's options, whole numbers as such.

    Args:
        source: Flag and file, for the error.
        values: The file's content.

    Raises:
        ConfigurationError: a key is no option of a model, or a value is of another type.
        SeveralErrors: more than one value is.
    """
    unknown = values.keys() - {field.name for field in fields(ModelArguments)}
    if unknown:
        raise ConfigurationError(
            source,
            f"holds keys that are not model options: {', '.join(sorted(unknown))}",
            "See the options of the model in pretrain_retro --help",
        )
    kinds = get_type_hints(ModelArguments)
    wrong = [
        ConfigurationError(source, f"{name} {value!r}", f"Expected {kinds[name]}")
        for name, value in values.items()
        if not _fits(kinds[name], value)
    ]
    raise_problems(wrong)
    return {name: _whole(kinds[name], value) for name, value in values.items()}


def _fits(kind: Any, value: object) -> bool:
    """Whether a value of a YAML file is of an option's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(get_args(kind)[0], each) for each in value)
    if get_args(kind):
        return any(_fits(each, value) for each in get_args(kind))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is int and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)


def _whole(kind: Any, value: Any) -> Any:
    """500000 for 500000.0, if the option is a whole number."""
    whole = float not in (kind, *get_args(kind)) and isinstance(value, float)
    return int(value) if whole else value
