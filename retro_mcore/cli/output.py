"""Printed output of commands."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.table import Table

from retro_mcore.distributed import get_rank
from retro_mcore.errors import EXIT_CODE
from retro_mcore.logs import PRINTED

_LOG = logging.getLogger(__name__)

_UNLIMITED = 10_000


@contextmanager
def closed_pipe_ends_quietly() -> Iterator[None]:
    """End without a traceback when the reader of our output goes, as in `… --help | head`.

    Raises:
        SystemExit: with the code of a process that SIGPIPE ended, once the output's reader is gone;
            with that of a user's mistake, if output goes to a file on a full disk.
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
        for stream in gone:
            _discard(stream)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.filename is not None or not _is_refused(sys.stdout):
            raise
        _discard(sys.stdout)
        reason = error.strerror or type(error).__name__
        print(f"error: standard output: {reason}. Write it elsewhere", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


def _discard(stream: TextIO) -> None:
    """Discard what the stream still holds: the interpreter flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_refused(stream: TextIO) -> bool:
    """Whether the system refuses what the stream still holds, or an empty line."""
    try:
        print(file=stream, flush=True)
    except OSError:
        return True
    return False


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
    Console(width=width, markup=False, emoji=False).print(table)
