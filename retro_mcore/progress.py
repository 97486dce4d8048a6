"""Progress of long-running work: a bar on a terminal, and occasional log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from retro_mcore import logs

Item = TypeVar("Item")

_LOG = logging.getLogger(__name__)

#: Seconds between log lines.
INTERVAL = 30.0

_latest: Progress | None = None

logs.write_lines_within(lambda: tqdm.external_write_mode(file=sys.stderr))


class Progress:
    """Counts steps. Use as a context manager around them.

    The first and last steps are always logged, others when `INTERVAL` seconds have passed since the
    last line. If stderr is a terminal, a bar is shown, and the lines go to the log file only.

    Args:
        description: Label of the steps.
        total: Number of steps.
        initial: Number of steps completed by an earlier run.
        hidden: Show and log nothing; set on all ranks but one.
    """

    def __init__(
        self, description: str, total: int, initial: int = 0, hidden: bool = False
    ) -> None:
        self._description, self._total, self._done = description, total, initial
        self._initial, self._hidden = initial, hidden
        self._details = ""
        self._started = time.monotonic()
        self._logged: float | None = None
        self._bar: tqdm | None = None
        _set_latest(self)
        if not hidden and sys.stderr.isatty():
            self._bar = tqdm(desc=description, total=total, initial=initial)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """Count `steps` more."""
        self._done += steps
        _set_latest(self)
        if self._bar is not None:
            self._bar.update(steps)
        if self._is_due() and self._initial < self._done < self._total:
            self._log()

    def details(self, **values: str) -> None:
        """Show values, such as the loss, in the next line."""
        self._details = ", ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def write(self, text: str) -> None:
        """Print a line to stdout. It replaces the next log line."""
        if self._logged is not None:
            self._logged = time.monotonic()
        if self._bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text)

    def close(self) -> None:
        """End the bar and log the last line."""
        if self._bar is not None:
            self._bar.close()
        if self._done > self._initial:
            self._log()
        self._hidden = True  # a second call logs nothing

    def __str__(self) -> str:
        return f"{self._description} {self._done} of {self._total}"

    def _is_due(self) -> bool:
        return self._logged is None or time.monotonic() - self._logged >= INTERVAL

    def _log(self) -> None:
        self._logged = time.monotonic()
        if not self._hidden:
            extra = None if self._bar is None else logs.PRINTED
            _LOG.info("%s", self._line(self._logged - self._started), extra=extra)

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._initial) / max(seconds, 1e-9)
        left = (self._total - self._done) / rate
        parts = [
            f"{self._done} of {self._total}",
            _speed(rate),
            f"{_clock(left)} left" if left > 0 else f"done in {_clock(seconds)}",
            self._details,
        ]
        return f"{self._description}: {', '.join(filter(None, parts))}"


def latest() -> str:
    """The steps that were counted last on this rank, shown or hidden; empty if there are none."""
    return "" if _latest is None else str(_latest)


def _set_latest(progress: Progress) -> None:
    global _latest
    _latest = progress


def track(
    items: Iterable[Item], description: str, total: int | None = None, hidden: bool = False
) -> Iterator[Item]:
    """Yield `items` and show progress. An item is done when the next one is requested.

    Args:
        items: The work items.
        description: Label of the progress.
        total: Number of items; None: `len(items)`.
        hidden: See `Progress`.
    """
    length = len(items) if total is None else total  # type: ignore[arg-type]
    with Progress(description, length, hidden=hidden) as progress:
        for item in items:
            yield item
            progress.update()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _speed(rate: float) -> str:
    if rate < 1:
        return f"{1 / rate:.3g} s each"
    return f"{rate:.3g}/s" if rate < 100 else f"{rate:.0f}/s"
