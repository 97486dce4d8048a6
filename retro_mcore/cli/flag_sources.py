"""Flags from a YAML file, and from the checkpoint that a command starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from retro_mcore.cli.flag_spellings import option_names
from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.training.options.run import model_options


def flags_of_file(options_type: type, path: Path, given: Sequence[str]) -> list[str]:
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
        raise ConfigurationError(f"{flag} {path}", f"not YAML ({reason})", "Fix it") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError(
            f"{flag} {path}", "not a mapping of options", "Write `option: value` lines"
        )
    return values


def flags_of_checkpoint(options_type: type, given: Sequence[str]) -> list[str]:
    """The options of the model in --load or --load-gpt as flags, except those given."""
    names = option_names(given)
    options: dict[str, object] = {
        name: _value_of(name, given) for name in ("load", "load_gpt", "ckpt_step")
    }
    options |= {name: name in names for name in ("use_checkpoint_args", "dry_run")}
    step = options["ckpt_step"]
    if isinstance(step, str):
        options["ckpt_step"] = int(step) if step.isdigit() else None  # tyro refuses it
    return _flags(options_type, model_options(options_type, options), given)


def _flags(options_type: type, values: Mapping[str, object], given: Sequence[str]) -> list[str]:
    """Options as flags, except those given and switches at their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(options_type)}
    names = option_names(given)
    flags: list[str] = []
    for key, value in values.items():
        if value is None or key in names or f"no_{key}" in names:
            continue
        flag = flag_of(key)
        if isinstance(value, bool) and key in defaults:
            if value != defaults[key]:
                flags.append(flag if value else f"--no-{key.replace('_', '-')}")
        else:
            parts = value if isinstance(value, list) else [value]
            flags += [flag, *map(str, parts)]
    return flags


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """The last value that the arguments give an option."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, attached = argument.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            value = attached if equals else following
    return value
