"""Slow ranks: the time that each rank works by itself, compared with the other ranks'."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state

from retro_mcore.platform import is_cpu_in_use

Item = TypeVar("Item")

#: A rank is slow if it works this many times as long as the median of its pipeline stage's ranks.
SLOW = 1.5
#: Shorter work, in seconds per iteration, is not compared: the clock's and the system's noise.
_LEAST = 1e-3


@dataclass(frozen=True)
class RankTimes:
    """A rank's seconds per iteration.

    Attributes:
        host: Name of its node.
        stage: Its pipeline stage. Only ranks of one stage do the same work.
        seconds: By kind of work: "reading samples" (waiting for them), "forward pass".
    """

    host: str
    stage: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class SlowRank:
    """A rank that works for longer than most of its stage.

    Attributes:
        rank: The rank.
        host: Name of its node.
        work: What takes so long.
        seconds: Seconds per iteration.
        median: The median of the stage's ranks.
    """

    rank: int
    host: str
    work: str
    seconds: float
    median: float

    def __str__(self) -> str:
        return (
            f"slow rank {self.rank} ({self.host}) | {self.work} {1000 * self.seconds:.1f} ms per "
            f"iteration, median {1000 * self.median:.1f} ms"
        )

    def record(self, iteration: int) -> dict[str, Any]:
        """Its entry in metrics.jsonl."""
        return {"kind": "straggler", "iteration": iteration, **vars(self)}


class Stopwatch:
    """Times this rank's reading and forward passes, which contain no transfers between stages.

    The forward pass of a layer that is split contains its collectives, so the ranks that share a
    slow rank's layers are slow too. On CUDA the device's time is measured, by events.
    """

    def __init__(self) -> None:
        self._host = socket.gethostname()
        self._is_cuda = torch.cuda.is_available() and not is_cpu_in_use()
        self._reading = self._forward = 0.0
        self._begin: Any = None
        self._events: list[tuple[Any, Any]] = []
        self._iterations = 0

    def read(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items; waiting for them counts as reading."""
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._reading += time.perf_counter() - started
            self._begin = self._event()
            yield item

    def forward(self, step: Callable) -> Callable:
        """The forward step, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            reading, started, self._begin = self._reading, time.perf_counter(), self._event()
            result = step(*args, **kwargs)  # it reads first
            if self._begin is not None:
                self._events.append((self._begin, self._event()))
            else:
                self._forward += time.perf_counter() - started - (self._reading - reading)
            return result

        return timed

    def next_iteration(self) -> None:
        """Count an iteration."""
        self._iterations += 1

    def lap(self) -> RankTimes:
        """The times since the last call."""
        if self._events:
            torch.cuda.synchronize()
            self._forward = sum(start.elapsed_time(end) for start, end in self._events) / 1000
        count = max(self._iterations, 1)
        seconds = {
            "reading samples": self._reading / count,
            "forward pass": self._forward / count,
        }
        self._reading, self._forward, self._iterations, self._events = 0.0, 0.0, 0, []
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return RankTimes(self._host, stage, seconds)

    def _event(self) -> Any:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slow_ranks(times: Sequence[RankTimes]) -> list[SlowRank]:
    """The ranks that work far longer than the median of their stage, in order of ranks.

    Args:
        times: Of all ranks, by rank.
    """
    found = []
    for rank, own in enumerate(times):
        alike = [other for other in times if other.stage == own.stage]
        for work, seconds in own.seconds.items():
            median = statistics.median_low([other.seconds[work] for other in alike])
            if seconds >= SLOW * max(median, _LEAST):
                found.append(SlowRank(rank, own.host, work, seconds, median))
    return found
