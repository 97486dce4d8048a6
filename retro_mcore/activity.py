"""Whether this process does anything at all, as the system counts it."""

from __future__ import annotations

import time

import psutil

#: A process that computes for less than this part of a core's time, and moves fewer bytes per
#: second, does nothing: threads that only poll, and the watch over ranks, take less.
_COMPUTES, _MOVES = 0.01, 64 << 10


class Activity:
    """Since when this process and those that it started have done nothing.

    Args:
        window: Seconds over which processor time and bytes are measured.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._since = self._measured = self._asked = time.monotonic()
        self._used: tuple[float, int] | None = None

    def idle(self, has_moved: bool) -> float:
        """Seconds without any sign of work; 0 if that cannot be told.

        Args:
            has_moved: Whether there is another sign of work since the last question.
        """
        now = time.monotonic()
        held_up = now - self._asked > self._window  # it could not work in that time
        self._asked = now
        if has_moved or held_up:
            self._since, self._measured, self._used = now, now, None
        elif now - self._measured >= self._window:
            before, self._used = self._used, _used()
            if not _is_little(before, self._used, now - self._measured):
                self._since = now
            self._measured = now
        return now - self._since


def _is_little(
    before: tuple[float, int] | None, after: tuple[float, int] | None, seconds: float
) -> bool:
    if before is None or after is None:
        return False
    computed, moved = after[0] - before[0], after[1] - before[1]
    return 0 <= computed < _COMPUTES * seconds and 0 <= moved < _MOVES * seconds


def _used() -> tuple[float, int] | None:
    """Processor time in seconds, and bytes, that were used so far; None if that is not known.

    What processes that have ended moved is lost, so that less may be found later.
    """
    try:
        own = psutil.Process()
        computed, moved = 0.0, 0
        for process in (own, *own.children(recursive=True)):
            times, disk = process.cpu_times(), process.io_counters()
            computed += times.user + times.system + times.children_user + times.children_system
            moved += disk.read_chars + disk.write_chars + disk.read_bytes + disk.write_bytes
    except (psutil.Error, OSError, AttributeError):  # other systems do not count all
        return None
    return computed, moved
