"""What every command shares: flags from a dataclass, errors to exit codes, a short summary."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TextIO, TypeVar

import torch.distributed as dist
import tyro
import yaml
from rich.console import Console
from rich.table import Table

from retro_mcore.cli.utf8 import use_utf8, write_any_text
from retro_mcore.distributed import get_rank, leave, print_error
from retro_mcore.errors import (
    EXIT_CODE,
    ConfigurationError,
    RetroError,
    raise_problems,
    system_refusal,
)
from retro_mcore.project.integrity import verifying

Options = TypeVar("Options")

_UNLIMITED = 10_000


def parse_options(options_type: type[Options], argv: Sequence[str] | None = None) -> Options:
    """Flags (`--seq-length 512`) into a dataclass; `--config FILE.yaml` gives flags too.

    A key of the YAML file is a field of the dataclass. It is read as if its flag stood before the
    others, so a flag on the command line wins.

    Raises:
        ConfigurationError: the YAML file is missing, or holds a key that is no option.
        SystemExit: bad flags (code 2), `--help` (code 0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--config" in arguments:
        where = arguments.index("--config")
        if where + 1 == len(arguments):
            raise ConfigurationError("--config", "no file given", "Name a YAML file")
        path = Path(arguments[where + 1])
        del arguments[where : where + 2]
        arguments = [*_flags_of_file(options_type, path, arguments), *arguments]
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
    return options


#: Options that name files or directories, beside those whose names end as such names do.
_PATHS = {"save", "load", "load_gpt", "input", "output", "append", "exchange", "predictions"}
_PATHS |= {"tokenizer_model", "model_config", "data_path", "valid_data_path", "json", "embedder"}
_PATH_ENDINGS = ("_dir", "_file", "_folder")


def _refuse_empty_paths(options: object) -> None:
    """An empty path would be the current directory, which nobody means by it.

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
    """Switches that say what is so anyway, such as `--exit-signal-handler`; they are accepted."""
    spelled = (
        f"--{field.name}" if field.default else f"--no_{field.name}"
        for field in dataclasses.fields(options_type)
        if isinstance(field.default, bool)
    )
    return {form for name in spelled for form in (name, "--" + name[2:].replace("_", "-"))}


def _spell_out_switches(options_type: type, arguments: Sequence[str]) -> list[str]:
    """Switches of three states, whose default is neither: `--flag`, `--no-flag`, `--flag false`."""
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
    """The YAML file's options as flags, but for those that are given."""
    values = read_yaml("--config", path)
    fields = [field.name for field in dataclasses.fields(options_type)]
    for key in values:
        if key not in fields:
            raise ConfigurationError(
                f"--config {path}", f"unknown option {key!r}", f"Known: {', '.join(fields)}"
            )
    return _flags(options_type, values, given)


def read_yaml(flag: str, path: Path) -> dict[str, object]:
    """The options in a YAML file.

    Args:
        flag: That named the file, for the error.
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
    """The options of the model in --load or --load-gpt as flags, but for those that are given."""
    names = _names(given)
    options: dict[str, object] = {
        name: _value_of(name, given) for name in ("load", "load_gpt", "ckpt_step")
    }
    options |= {name: name in names for name in ("use_checkpoint_args", "dry_run")}
    step = options["ckpt_step"]
    if isinstance(step, str):
        options["ckpt_step"] = int(step) if step.isdigit() else None  # tyro refuses it
    return _flags(options_type, model_options(options_type, options), given)


def model_options(options_type: type, options: Mapping[str, object]) -> dict[str, object]:
    """What a checkpoint says of the model to be trained: that of --use-checkpoint-args, or of
    --load-gpt; empty where neither is given.

    Args:
        options_type: The command's.
        options: Those that are given, by name.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigurationError: --use-checkpoint-args without --load.
    """
    known = {field.name for field in dataclasses.fields(options_type)}
    load, load_gpt, step = (options.get(name) for name in ("load", "load_gpt", "ckpt_step"))
    of_load = bool(options.get("use_checkpoint_args"))
    if not of_load and not (load_gpt and known.issuperset(("load_gpt", "num_layers"))):
        return {}
    from retro_mcore.training.options import (
        from_checkpoint as checkpoint_args,  # only now: it takes a while
    )

    if of_load:
        return checkpoint_args.model_options_of_checkpoint(load, step)  # type: ignore[arg-type]
    if options.get("dry_run") and not Path(str(load_gpt)).exists():
        return {}  # a run may be planned before its GPT is there
    return checkpoint_args.model_options_of_gpt(str(load_gpt), load, step)  # type: ignore[arg-type]


def _with_whole_numbers(options_type: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with whole numbers written as such, where options are whole numbers: 500000
    for `500000.0` (as config.json files have it) and `5e5`."""
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
    """Whether a type is int, or int among others that no number is written for (None, list)."""
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
    """Options as flags, but for those that are given or have their default."""
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
    """The options that flags name (and the flags' values, which are no options)."""
    return {argument.lstrip("-").replace("-", "_").split("=")[0] for argument in arguments}


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """The last value that the arguments give to an option."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, attached = argument.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            value = attached if equals else following
    return value


def run_command(
    options_type: type[Options],
    function: Callable[[Options], object],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn a user's mistake into one line on stderr and exit code 2.

    Process groups that the command joined are left before it returns. A process of the
    command's own is started again in UTF-8 mode where it must be; see `use_utf8`.
    """
    if argv is None or list(argv) == sys.argv[1:]:
        use_utf8()
    else:
        write_any_text()
    joined_before = dist.is_initialized()
    code = 0
    with closed_pipe_ends_quietly():
        try:
            options = parse_options(options_type, argv)
            with verifying(getattr(options, "verify", False)):
                function(options)
        except RetroError as error:
            print_error(error)
            code = EXIT_CODE
        except OSError as error:
            refusal = system_refusal(error)
            if refusal is None:
                raise
            print_error(refusal)
            code = EXIT_CODE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            code = 130
        if not joined_before:
            leave()
    return code


@contextmanager
def closed_pipe_ends_quietly() -> Iterator[None]:
    """What a shell expects when the reader of our output goes (`… --help | head`): no traceback.

    Raises:
        SystemExit: with the code of a process that SIGPIPE ended, once the output's reader is gone.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
        if not gone:
            raise  # some other pipe, not our output
        for stream in gone:  # the interpreter flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def print_summary(title: str, rows: Mapping[str, object]) -> None:
    """A two-column table, on rank 0 only."""
    if get_rank() != 0:
        return
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan")
    table.add_column(overflow="fold")  # a path is not cut short
    for name, value in rows.items():
        table.add_row(name, str(value))
    # A file or a pipe has no width to keep to.
    width = None if sys.stdout.isatty() else _UNLIMITED
    Console(width=width).print(table)
