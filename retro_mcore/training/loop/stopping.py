"""Early stopping of a run: on a signal, a time limit, or the exit interval."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from retro_mcore.training.options.pretrain import ExitOptions


class StopConditions:
    """Detects conditions that end a run early. Use as a context manager around its loop.

    Each rank sees only its own signals, so the ranks must agree: `wanted` is summed over all
    ranks, and all stop after the same iteration.
    """

    def __init__(self, options: ExitOptions) -> None:
        self._options = options
        self._signalled = False
        self._previous: Any = None
        self._started = time.monotonic()

    def __enter__(self) -> StopConditions:
        # Python sets and runs signal handlers in the main thread only.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self._options.exit_signal_handler and in_main_thread:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def wanted(self) -> bool:
        """Whether this rank received a stop signal or reached the time limit."""
        minutes = self._options.exit_duration_in_mins
        is_late = minutes is not None and time.monotonic() - self._started > 60 * minutes
        return self._signalled or is_late

    def reason(self) -> str:
        """Reason why this rank wants to stop."""
        if self._signalled:
            return "SIGTERM"
        return "--exit-duration-in-mins" if self.wanted else "a signal or the time on another rank"

    def at_interval(self, iteration: int) -> bool:
        """Whether the run ends after this iteration because of the exit interval."""
        interval = self._options.exit_interval
        return bool(interval and iteration % interval == 0)


def ignore_stop_signals(worker: int) -> None:
    """Ignore SIGTERM in a data loader worker.

    A scheduler sends SIGTERM to every process of a job. The training process handles it and ends
    its workers itself.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
