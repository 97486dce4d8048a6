"""What every command shares: flags from a dataclass, errors to exit codes, a short summary."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

import torch.distributed as dist
import tyro
import yaml
from rich.console import Console
from rich.table import Table

from retro_mcore.distributed import get_rank, get_world_size, leave
from retro_mcore.errors import EXIT_CODE, ConfigurationError, RetroError

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
    if "use_checkpoint_args" in _names(arguments):
        arguments = [*_flags_of_checkpoint(options_type, arguments), *arguments]
    redundant = _redundant_switches(options_type)
    arguments = [argument for argument in arguments if argument not in redundant]
    arguments = _spell_out_switches(options_type, arguments)
    return tyro.cli(
        options_type,
        args=arguments,
        description=options_type.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


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
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
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
    if not path.is_file():
        raise ConfigurationError(f"--config {path}", "no such file", "Name a YAML file")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"--config {path}", "not a mapping", "Write `option: value` lines")
    fields = [field.name for field in dataclasses.fields(options_type)]
    for key in values:
        if key not in fields:
            raise ConfigurationError(
                f"--config {path}", f"unknown option {key!r}", f"Known: {', '.join(fields)}"
            )
    return _flags(options_type, values, given)


def _flags_of_checkpoint(options_type: type, given: Sequence[str]) -> list[str]:
    """The options of the model in --load as flags, but for those that are given."""
    from retro_mcore.training.checkpoint_args import model_options_of_checkpoint

    step = _value_of("ckpt_step", given)
    values = model_options_of_checkpoint(
        _value_of("load", given), None if step is None else int(step)
    )
    return _flags(options_type, values, given)


def _flags(options_type: type, values: Mapping[str, object], given: Sequence[str]) -> list[str]:
    """Options as flags, but for those that are given or have their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(options_type)}
    names = _names(given)
    flags: list[str] = []
    for key, value in values.items():
        if value is None or key in names:
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
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
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

    Process groups that the command joined are left before it returns.
    """
    joined_before = dist.is_initialized()
    code = 0
    with closed_pipe_ends_quietly():
        try:
            function(parse_options(options_type, argv))
        except RetroError as error:
            _print_error(error)
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


def _print_error(error: RetroError) -> None:
    """Once, if every rank met it; else from the rank that did."""
    rank = int(os.environ.get("RANK", 0))
    everywhere = getattr(error, "raised_together", False) or not dist.is_initialized()
    if rank == 0 or not everywhere:
        where = "" if everywhere or get_world_size() == 1 else f"[rank {rank}] "
        for problem in getattr(error, "problems", (error,)):
            print(f"{where}error: {problem}", file=sys.stderr, flush=True)


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
