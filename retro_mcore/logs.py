"""Logging while a command runs: lines on the terminal, and a file per rank.

Modules log to `logging.getLogger(__name__)` and configure nothing. A command runs inside
`command_logs`, which adds handlers to the root logger and removes them at the end. Only the
standard library is used, so that every layer can log.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from retro_mcore.launcher import shown_rank

#: Names for --log-level.
LEVELS = ("debug", "info", "warning", "error")

#: The environment variable that sets the level where --log-level is not given.
VARIABLE = "RETRO_LOG_LEVEL"

#: Marks a record whose text the command prints itself: `logger.info(text, extra=PRINTED)`.
#: It goes to the log file only.
PRINTED = {"printed": True}

#: Marks a record that does not create a log file by itself, so a rejected command leaves no trace.
CONTEXT = {"printed": True, "context": True}

_LOG = logging.getLogger(__name__)
_PACKAGE = "retro_mcore"
_TIME = "%Y-%m-%d %H:%M:%S"

#: Context in which terminal lines are written; it hides progress bars.
_around_line: Callable[[], AbstractContextManager[object]] = nullcontext


def write_lines_within(context: Callable[[], AbstractContextManager[object]]) -> None:
    """Set the context in which lines are written to the terminal."""
    global _around_line
    _around_line = context


class CommandLogs:
    """Log handlers of a running command, created by `command_logs`."""

    def __init__(self, terminal: bool) -> None:
        self._root, self._package = logging.getLogger(), logging.getLogger(_PACKAGE)
        self._levels = self._root.level, self._package.level
        shown = any(isinstance(handler, _Terminal) for handler in self._root.handlers)
        self._handlers: list[logging.Handler] = []
        self._captures_warnings = not shown
        if terminal and not shown:
            self._add(_Terminal())

    def set_level(self, level: str) -> None:
        """Set the lowest level that is logged; libraries log from WARNING on, or more at debug."""
        number = getattr(logging, level.upper())
        self._package.setLevel(number)
        libraries = logging.INFO if number == logging.DEBUG else max(number, logging.WARNING)
        self._root.setLevel(libraries)
        if self._captures_warnings:
            logging.captureWarnings(True)

    def add_file(self, folder: Path, name: str = "", made: Path | None = None) -> None:
        """Also log to `folder/logs/[NAME_]rank_0000.log`.

        Args:
            folder: The command's output folder.
            name: Prefix that distinguishes commands which share the folder.
            made: File or folder that must exist before the log file is created. Default: `folder`.
        """
        prefix = f"{name}_" if name else ""
        path = folder / "logs" / f"{prefix}rank_{shown_rank():04d}.log"
        self._add(_RankFile(path, folder if made is None else made))

    def close(self) -> None:
        """Remove the handlers and restore the levels."""
        for handler in self._handlers:
            self._root.removeHandler(handler)
            handler.close()
        self._root.setLevel(self._levels[0])
        self._package.setLevel(self._levels[1])
        if self._captures_warnings:
            logging.captureWarnings(False)

    def _add(self, handler: logging.Handler) -> None:
        self._root.addHandler(handler)
        self._handlers.append(handler)


@contextmanager
def command_logs(terminal: bool = True) -> Iterator[CommandLogs]:
    """Handle log records while the block runs.

    Args:
        terminal: Also write them to stderr: INFO and above on rank 0, WARNING and above on others.
            A command run by another command leaves this to the outer one.
    """
    logs = CommandLogs(terminal)
    logs.set_level(default_level())
    try:
        yield logs
    finally:
        logs.close()


def default_level() -> str:
    """The level set in the environment, or info."""
    level = os.environ.get(VARIABLE, "").lower()
    return level if level in LEVELS else "info"


class _Terminal(logging.Handler):
    """Writes to the current `sys.stderr`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING if shown_rank() else logging.NOTSET)
        self.setFormatter(
            logging.Formatter(f"%(asctime)s [rank {shown_rank()}] %(message)s", _TIME)
        )
        self.addFilter(lambda record: not getattr(record, "printed", False))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            line = self.format(record)
            with _around_line():
                print(line, file=sys.stderr, flush=True)
        except BrokenPipeError:
            raise  # a command whose output is no longer read ends quietly
        except Exception:
            self.handleError(record)


class _RankFile(logging.Handler):
    """Appends to a file, which is opened at the first record after `made` exists.

    So a mistyped path gets no log file. The latest 1000 earlier records are kept until then. If the
    file cannot be written, one warning is shown.
    """

    def __init__(self, path: Path, made: Path) -> None:
        super().__init__()
        self._path, self._made = path, made
        self._waiting: deque[str] = deque(maxlen=1000)
        self._descriptor: int | None = None
        self._failed = False
        form = f"%(asctime)s rank {shown_rank()} %(levelname)s %(name)s: %(message)s"
        self.setFormatter(logging.Formatter(form, _TIME))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or keep it until the folder exists."""
        if self._failed:
            return
        try:
            self._waiting.append(self.format(record) + "\n")
            if not getattr(record, "context", False) or self._path.exists():
                self._write()
        except OSError as error:
            self._failed = True
            reason = error.strerror or error
            _LOG.warning(
                "log file %s cannot be written (%s): continuing without it", self._path, reason
            )
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()

    def _write(self) -> None:
        if self._descriptor is None:
            if not self._made.exists():
                return
            self._path.parent.mkdir(exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._descriptor = os.open(self._path, flags, 0o666)
        while self._waiting:  # one write per line, so lines of several processes do not mix
            os.write(self._descriptor, self._waiting.popleft().encode("utf-8", "backslashreplace"))
