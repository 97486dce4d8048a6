"""Run a command: errors become exit codes, log records go to the terminal and a file."""

from __future__ import annotations

import logging
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from retro_mcore import __version__
from retro_mcore.cli.flags import parse_command
from retro_mcore.cli.quiet import ignore_unwanted
from retro_mcore.cli.utf8 import use_utf8, write_any_text
from retro_mcore.distributed import get_rank, leave, print_error
from retro_mcore.errors import EXIT_CODE, RetroError, system_refusal
from retro_mcore.logs import CONTEXT, PRINTED, CommandLogs, command_logs
from retro_mcore.project.integrity import verifying
from retro_mcore.project.paths import ProjectPaths

Options = TypeVar("Options")

_LOG = logging.getLogger(__name__)

_UNLIMITED = 10_000

#: The option that names the folder whose `logs` a command's log files go into, by command.
_LOG_FOLDERS = {
    "preprocess_corpus": "project_dir",
    "build_db": "project_dir",
    "build_index": "project_dir",
    "query_neighbors": "project_dir",
    "update_db": "project_dir",
    "pretrain_retro": "save",
    "finetune_retro": "save",
    "evaluate_perplexity": "output",
    "evaluate_qa": "output",
}


def run_command(
    options_type: type[Options],
    function: Callable[[Options], object],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the flags and run a command; returns its exit code.

    A user's mistake becomes one line on stderr and exit code 2. Process groups that the command
    joined are left before it returns. A process that runs this command alone is started again in
    UTF-8 mode if it must be; see `use_utf8`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == sys.argv[1:]:
        use_utf8()
    else:
        write_any_text()
    ignore_unwanted()
    joined_before = dist.is_initialized()
    with closed_pipe_ends_quietly(), command_logs() as logs:
        code = _exit_code(lambda: _run(options_type, function, arguments, logs))
        if not joined_before:
            leave()
    return code


def _run(
    options_type: type[Options],
    function: Callable[[Options], object],
    arguments: Sequence[str],
    logs: CommandLogs,
) -> None:
    options, level = parse_command(options_type, arguments)
    logs.set_level(level)
    add_log_file(logs, function.__name__, options)
    with logged_run(function.__name__, arguments), verifying(getattr(options, "verify", False)):
        function(options)


def _exit_code(run: Callable[[], None]) -> int:
    try:
        run()
    except RetroError as error:
        print_error(error)
        return EXIT_CODE
    except OSError as error:
        refusal = system_refusal(error)
        if refusal is None:
            raise
        print_error(refusal)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


def add_log_file(logs: CommandLogs, command: str, options: object) -> None:
    """Log to a file per rank beside the outputs, if the command writes any.

    Training and question answering log to `logs/rank_0000.log` in their own folder. Where several
    commands or results share a folder, the file's name begins with theirs.
    """
    option = _LOG_FOLDERS.get(command, "")
    value = getattr(options, option, None)
    if command == "evaluate_perplexity" and not value:
        value = Path(options.load) / "perplexity.json"  # type: ignore[attr-defined]
    if not value or getattr(options, "dry_run", False):
        return
    folder = Path(str(value))
    if command == "evaluate_perplexity":
        logs.add_file(folder.parent, folder.stem)
    elif option == "project_dir":
        shard = getattr(options, "shard", None)  # a job of an array
        name = f"{command}_{shard.replace('/', '_of_')}" if shard else command
        # A stage writes into projects only; the first one makes its project.
        made = folder if command == "preprocess_corpus" else ProjectPaths(folder).written_config
        logs.add_file(folder, name, made)
    else:
        logs.add_file(folder)


@contextmanager
def command_in_python(command: str, options: object) -> Iterator[None]:
    """Log a command that is called from Python, as `run_command` does.

    Lines go to the terminal unless the caller has configured logging.
    """
    ignore_unwanted()
    with command_logs(terminal=not logging.getLogger().hasHandlers()) as logs:
        add_log_file(logs, command, options)
        with logged_run(command, ()):
            yield


@contextmanager
def logged_run(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Keep start and end of a command in the log file."""
    started = time.monotonic()
    where = f"retro-mcore {__version__} on {platform.node()}, process {os.getpid()}"
    _LOG.info("%s %s started: %s", command, " ".join(arguments), where, extra=CONTEXT)
    try:
        yield
    except BaseException as error:
        user = isinstance(error, RetroError) or not isinstance(error, Exception)
        text = f"{command} ended by {type(error).__name__}: {error}"
        _LOG.error("%s", text, exc_info=not user, extra=CONTEXT if user else PRINTED)
        raise
    seconds = time.monotonic() - started
    _LOG.info("%s finished in %.1f seconds", command, seconds, extra=PRINTED)


@contextmanager
def closed_pipe_ends_quietly() -> Iterator[None]:
    """End without a traceback when the reader of our output goes, as in `… --help | head`.

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
    """Print a two-column table on rank 0."""
    if get_rank() != 0:
        return
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan")
    table.add_column(overflow="fold")  # a path is not cut short
    for name, value in rows.items():
        table.add_row(name, str(value))
        _LOG.info("%s: %s: %s", title, name, value, extra=PRINTED)
    # A file or a pipe has no width to keep to.
    width = None if sys.stdout.isatty() else _UNLIMITED
    Console(width=width).print(table)
