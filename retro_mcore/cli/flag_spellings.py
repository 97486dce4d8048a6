"""Spellings of flags that users know from Megatron, in the form that tyro reads."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from decimal import Decimal


def option_names(arguments: Sequence[str]) -> set[str]:
    """Names of the options given; values of flags are among them, which does no harm."""
    return {argument.lstrip("-").replace("-", "_").split("=")[0] for argument in arguments}


def without_redundant_switches(options_type: type, arguments: Sequence[str]) -> list[str]:
    """Leave out switches that repeat a default, such as `--exit-signal-handler`."""
    spelled = (
        f"--{field.name}" if field.default else f"--no_{field.name}"
        for field in dataclasses.fields(options_type)
        if isinstance(field.default, bool)
    )
    redundant = {form for name in spelled for form in (name, "--" + name[2:].replace("_", "-"))}
    return [argument for argument in arguments if argument not in redundant]


def spell_out_switches(options_type: type, arguments: Sequence[str]) -> list[str]:
    """Give switches that default to None a value: `--flag`, `--no-flag`, `--flag false`."""
    names = {
        field.name
        for field in dataclasses.fields(options_type)
        if field.default is None and str(field.type) in ("bool | None", "Optional[bool]")
    }
    spelled: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name = argument.lstrip("-").replace("-", "_")
        on, off = name in names, name.removeprefix("no_") in names and name not in names
        if argument.lower() in ("true", "false") and option_names(spelled[-1:]) & names:
            spelled.append(argument.capitalize())
        elif argument.startswith("--") and off:
            spelled += [f"--{argument[5:]}", "False"]
        elif argument.startswith("--") and on and following.lower() not in ("true", "false"):
            spelled += [argument, "True"]
        else:
            spelled.append(argument)
    return spelled


def with_whole_numbers(options_type: type, arguments: Sequence[str]) -> list[str]:
    """Write whole numbers as such where an option is one: 500000 for `500000.0` and `5e5`."""
    hints = typing.get_type_hints(options_type)
    whole = {name for name, kind in hints.items() if _is_whole(kind)}
    written, option = [], ""
    for argument in arguments:
        flag, equals, attached = argument.partition("=")
        if argument.startswith("--"):
            option = flag[2:].replace("-", "_")
            if equals and option in whole:
                argument = f"{flag}={_whole_number(attached)}"
        elif option in whole:
            argument = _whole_number(argument)
        written.append(argument)
    return written


def _is_whole(kind: object) -> bool:
    """Whether a type is int, alone or beside types that are not written as a number."""
    parts = typing.get_args(kind)
    if not parts:
        return kind is int
    return any(_is_whole(part) for part in parts) and float not in parts and str not in parts


def _whole_number(text: str) -> str:
    try:
        number = Decimal(text)
        whole = abs(number) < 2**63 and number == number.to_integral_value()
    except ArithmeticError:
        return text
    return str(int(number)) if whole else text
