"""Batch size of each iteration, optionally ramped up to the global batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retro_mcore.errors import ConfigurationError


@dataclass(frozen=True)
class BatchSizes:
    """Batch sizes over a run, ramped up as in megatron up to 0.17 (0.19 ignores the option).

    The batch size of an iteration depends on the samples consumed before it, so a resumed run has
    the same sizes as an uninterrupted one.

    Attributes:
        global_batch_size: Samples per iteration, after the ramp.
        rampup: (start, increment, samples), or None for a constant size.

    Raises:
        ConfigurationError: the ramp does not lead to the global batch size.
    """

    global_batch_size: int
    rampup: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.rampup is None:
            return
        start, increment, samples = self.rampup
        rest = self.global_batch_size - start
        if start < 1 or increment < 1 or samples < 1 or rest <= 0 or rest % increment:
            raise ConfigurationError(
                "--rampup-batch-size",
                f"{start} {increment} {samples}, to a global batch of {self.global_batch_size}",
                "Choose START below the global batch, and an INCREMENT that divides the difference",
            )

    @classmethod
    def of(cls, global_batch_size: int, rampup: Sequence[int] | None) -> BatchSizes:
        """Parse --rampup-batch-size.

        Raises:
            ConfigurationError: not three numbers, or they do not fit the global batch.
        """
        if rampup is None:
            return cls(global_batch_size)
        if len(rampup) != 3:
            raise ConfigurationError(
                "--rampup-batch-size",
                " ".join(map(str, rampup)) or "nothing",
                "Give three numbers: START INCREMENT SAMPLES",
            )
        return cls(global_batch_size, (rampup[0], rampup[1], rampup[2]))

    @property
    def sizes(self) -> list[int]:
        """All batch sizes that occur, ascending."""
        if self.rampup is None:
            return [self.global_batch_size]
        return list(range(self.rampup[0], self.global_batch_size + 1, self.rampup[1]))

    def after(self, consumed: int) -> int:
        """Batch size of the iteration after `consumed` samples."""
        if self.rampup is None or self._is_past_ramp(consumed):
            return self.global_batch_size
        start, increment, samples = self.rampup
        increments = (self.global_batch_size - start) // increment
        return start + increment * int(consumed / (samples / increments))

    def iterations(self, samples: int) -> tuple[int, int]:
        """Number of complete iterations that fit into `samples`, and the samples they consume."""
        done, consumed = self._ramp(max_samples=samples)
        size = self.global_batch_size if self._is_past_ramp(consumed) else samples + 1
        more = (samples - consumed) // size
        return done + more, consumed + more * size

    def consumed_after(self, iterations: int) -> int:
        """Number of samples consumed by the first `iterations`."""
        done, consumed = self._ramp(max_iterations=iterations)
        return consumed + (iterations - done) * self.global_batch_size

    def _is_past_ramp(self, consumed: int) -> bool:
        return self.rampup is None or consumed > self.rampup[2]

    def _ramp(
        self, max_samples: int | None = None, max_iterations: int | None = None
    ) -> tuple[int, int]:
        """(iterations, samples) of the ramp, up to the given limits."""
        if self.rampup is None:
            return 0, 0
        done = consumed = 0
        while not self._is_past_ramp(consumed):
            size = self.after(consumed)
            if max_samples is not None and consumed + size > max_samples:
                break
            if done == max_iterations:
                break
            done, consumed = done + 1, consumed + size
        return done, consumed
