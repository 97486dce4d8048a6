"""Check JSON values against the field types of a dataclass."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_LONGEST_SHOWN = 60


def problems_of(
    values: Mapping[str, Any], kind: type, ranges: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """Problems of the given values, by field. Missing fields and unknown names are ignored.

    Args:
        values: Values by field name.
        kind: The dataclass.
        ranges: Minimum and maximum of integer fields.
    """
    hints = get_type_hints(kind)
    problems = {}
    for name, value in values.items():
        expected = _mismatch(value, hints[name]) if name in hints else None
        if expected is None and type(value) is int and name in ranges:
            least, most = ranges[name]
            expected = None if least <= value <= most else f"a number from {least} to {most}"
        if expected is not None:
            problems[name] = f"is {show(value)}, not {expected}"
    return problems


def show(value: object) -> str:
    """The value in JSON notation, truncated if long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def is_text(value: object) -> bool:
    """Whether the value is text that a path may contain: no lone surrogate, no NUL."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff\0]", value)


def percentages_of(split: object) -> tuple[float, float, float] | None:
    """Parse percentages of training, validation and test documents, such as "98,2,0".

    None if they are not three numbers that sum to 100, with the first at least 0.1.
    """
    try:
        parts = [float(part) for part in str(split).split(",")]
    except ValueError:
        return None
    # Each comparison is false for NaN.
    usable = len(parts) == 3 and all(0 <= part <= 100 for part in parts)
    if not (usable and abs(sum(parts) - 100) <= 1e-6 and parts[0] >= 0.1):
        return None
    return parts[0], parts[1], parts[2]


def _mismatch(value: Any, hint: Any) -> str | None:
    """The expected type in words, if the value does not match it; else None."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        expected = [_mismatch(value, argument) for argument in arguments]
        return None if None in expected else " or ".join(map(str, expected))
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(arguments)}"
    if origin is list:
        sound = isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
        return None if sound else f"a list ({_words(arguments[0])} each)"
    if origin is dict:
        sound = isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
        return None if sound else f"an object ({_words(arguments[1])} each)"
    if dataclasses.is_dataclass(hint):
        names = {field.name: field.type for field in dataclasses.fields(hint)}
        sound = isinstance(value, dict) and value.keys() == names.keys()
        sound = sound and not problems_of(value, hint, {})  # type: ignore[arg-type]
        return None if sound else f"an object of {', '.join(names)}"
    return None if _is(value, hint) else _words(hint)


def _fits(value: Any, hint: Any) -> bool:
    return _mismatch(value, hint) is None


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is str:
        return is_text(value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind  # a boolean is not a number, and 512.0 is not an integer


def _words(hint: Any) -> str:
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_words, get_args(hint)))
    return names.get(hint, "a value")
