"""Detection of loss spikes: losses far above the recent ones."""

from __future__ import annotations

from collections import deque
from statistics import fmean, pstdev


class SpikeDetector:
    """Detects losses several standard deviations above the mean of recent losses.

    Args:
        window: Number of recent losses to compare with.
        at_least: Number of losses required before the first spike can be detected.
        deviations: Minimum distance of a spike from the mean, in standard deviations. The distance
            must also be at least 1% of the mean.
    """

    def __init__(self, window: int = 100, at_least: int = 20, deviations: float = 6.0) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._at_least, self._deviations = at_least, deviations
        #: Mean that the last loss was compared with.
        self.usual = float("nan")

    def add(self, loss: float) -> bool:
        """Add `loss` to the recent losses, and return whether it is a spike."""
        is_spike = False
        if len(self._losses) >= self._at_least:
            self.usual = fmean(self._losses)
            margin = max(self._deviations * pstdev(self._losses), 0.01 * self.usual)
            is_spike = loss > self.usual + margin
        self._losses.append(loss)
        return is_spike
