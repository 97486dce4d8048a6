"""Losses far above the recent ones."""

from __future__ import annotations

from collections import deque
from statistics import fmean, pstdev


class SpikeDetector:
    """Finds losses above the mean of the recent ones by several standard deviations.

    Args:
        window: Recent losses to compare with.
        at_least: Losses to see before anything counts as a spike.
        deviations: How far above the mean a spike is; also at least a hundredth of the mean.
    """

    def __init__(self, window: int = 100, at_least: int = 20, deviations: float = 6.0) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._at_least, self._deviations = at_least, deviations
        #: Mean of the losses that the last one was compared with.
        self.usual = float("nan")

    def add(self, loss: float) -> bool:
        """Whether `loss` is a spike. It counts among the recent ones from now on."""
        is_spike = False
        if len(self._losses) >= self._at_least:
            self.usual = fmean(self._losses)
            margin = max(self._deviations * pstdev(self._losses), 0.01 * self.usual)
            is_spike = loss > self.usual + margin
        self._losses.append(loss)
        return is_spike
