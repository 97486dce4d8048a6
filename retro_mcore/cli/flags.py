"""Flags and configuration files into a dataclass of options."""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

import tyro
import yaml

from retro_mcore import logs
from retro_mcore.cli.help import print_help
from retro_mcore.errors import ConfigurationError, raise_problems
from retro_mcore.training.options.run import model_options

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
        ConfigurationError: the file is missing or holds an unknown key, or there is no such level.
        SystemExit: bad flags (code 2), `--help` (code 0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print_help(options_type)
    files = _take("config", arguments)
    if len(files) > 1:
        raise ConfigurationError("--config", "given more than once", "Name one YAML file")
    for file in files:
        arguments = [*_flags_of_file(options_type, Path(file), arguments), *arguments]
    level = _level(_take("log_level", arguments))
    arguments = [*_flags_of_checkpoint(options_type, arguments), *arguments]
    arguments = _with_whole_numbers(options_type, arguments)
    redundant = _redundant_switches(options_type)
    arguments = [argument for argument in arguments if argument not in redundant]
    arguments = _spell_out_switches(options_type, arguments)
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
            flag = f"--{field.name.replace('_', '-')}"
            problems.append(ConfigurationError(flag, "an empty path", "Name a file or a directory"))
    raise_problems(problems)


def _redundant_switches(options_type: type) -> set[str]:
    """Switches that repeat a default, such as `--exit-signal-handler`; they are accepted."""
    spelled = (
        f"--{field.name}" if field.default else f"--no_{field.name}"
        for field in dataclasses.fields(options_type)
        if isinstance(field.default, bool)
    )
    return {form for name in spelled for form in (name, "--" + name[2:].replace("_", "-"))}


def _spell_out_switches(options_type: type, arguments: Sequence[str]) -> list[str]:
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
        if argument.lower() in ("true", "false") and _names(spelled[-1:]) & names:
            spelled.append(argument.capitalize())
        elif argument.startswith("--") and off:
            spelled += [f"--{argument[5:]}", "False"]
        elif argument.startswith("--") and on and following.lower() not in ("true", "false"):
            spelled += [argument, "True"]
        else:
            spelled.append(argument)
    return spelled


def _flags_of_file(options_type: type, path: Path, given: Sequence[str]) -> list[str]:
    """The YAML file's options as flags, except those given."""
    values = read_yaml("--config", path)
    fields = [field.name for field in dataclasses.fields(options_type)]
    for key in values:
        if key not in (*fields, "log_level"):
            raise ConfigurationError(
                f"--config {path}", f"unknown option {key!r}", f"Known: {', '.join(fields)}"
            )
    return _flags(options_type, values, given)


def read_yaml(flag: str, path: Path) -> dict[str, object]:
    """The options in a YAML file.

    Args:
        flag: The flag that names the file, for errors.
        path: The file.

    Raises:
        ConfigurationError: it is missing, not YAML, or holds no mapping.
    """
    if not path.is_file():
        raise ConfigurationError(f"{flag} {path}", "no such file", "Name a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{flag} {path}", f"not YAML ({reason})", "Mend it") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError(
            f"{flag} {path}", "not a mapping of options", "Write `option: value` lines"
        )
    return values


def _flags_of_checkpoint(options_type: type, given: Sequence[str]) -> list[str]:
    """The options of the model in --load or --load-gpt as flags, except those given."""
    names = _names(given)
    options: dict[str, object] = {
        name: _value_of(name, given) for name in ("load", "load_gpt", "ckpt_step")
    }
    options |= {name: name in names for name in ("use_checkpoint_args", "dry_run")}
    step = options["ckpt_step"]
    if isinstance(step, str):
        options["ckpt_step"] = int(step) if step.isdigit() else None  # tyro refuses it
    return _flags(options_type, model_options(options_type, options), given)


def _with_whole_numbers(options_type: type, arguments: Sequence[str]) -> list[str]:
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


def _flags(options_type: type, values: Mapping[str, object], given: Sequence[str]) -> list[str]:
    """Options as flags, except those given and switches at their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(options_type)}
    names = _names(given)
    flags: list[str] = []
    for key, value in values.items():
        if value is None or key in names or f"no_{key}" in names:
            continue
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            if value != defaults[key]:
                flags.append(flag if value else f"--no-{key.replace('_', '-')}")
        else:
            parts = value if isinstance(value, list) else [value]
            flags += [flag, *map(str, parts)]
    return flags


def _names(arguments: Sequence[str]) -> set[str]:
    """Names of the options given; values of flags are among them, which does no harm."""
    return {argument.lstrip("-").replace("-", "_").split("=")[0] for argument in arguments}


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """The last value that the arguments give an option."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, attached = argument.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            value = attached if equals else following
    return value
