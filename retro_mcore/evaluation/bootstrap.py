"""Confidence intervals by resampling: of means over questions, of ratios over documents."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retro_mcore.errors import MissingDependencyError

#: Resamples drawn at once, which limits memory use.
_BATCH = 64


@dataclass(frozen=True)
class Estimate:
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def estimate_mean(
    values: Sequence[float],
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 1234,
) -> Estimate:
    """Compute the mean of one score and its percentile bootstrap interval (Efron 1979).

    To compare two systems on the same questions, pass the differences of their scores.

    Args:
        values: One score per question.
        confidence_level: Fraction of intervals that contain the true mean.
        num_resamples: Number of resamples of the questions.
        seed: Seed of the resampling.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, mean, mean)
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise MissingDependencyError(
            "scipy", "not installed", "Install retro-mcore[eval]"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all values are equal, so the interval has no width
        interval = bootstrap(
            (np.asarray(values, np.float64),),
            np.mean,
            n_resamples=num_resamples,
            batch=_BATCH,
            confidence_level=confidence_level,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def resampled_ratios(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    num_resamples: int,
    seed: int,
) -> NDArray[np.float64]:
    """Ratios of sums over resampled documents, f64 [kinds, resamples].

    All kinds have the same resamples, so their ratios may be compared pairwise.

    Args:
        numerators: f64 [kinds, documents], such as losses in bits.
        denominators: f64 [documents], such as bytes; at least one is positive. Resamples
            whose sum is zero are left out.
        num_resamples: Number of resamples of the documents.
        seed: Seed of the resampling.
    """
    rng, number = np.random.default_rng(seed), len(denominators)
    found = []
    for start in range(0, num_resamples, _BATCH):
        size = min(_BATCH, num_resamples - start)
        counts = rng.multinomial(number, np.full(number, 1 / number), size)
        drawn = counts @ denominators
        found.append((numerators @ counts.T)[:, drawn > 0] / drawn[drawn > 0])
    return np.concatenate(found, axis=1)


def percentile_interval(
    values: NDArray[np.float64], confidence_level: float = 0.95
) -> tuple[float, float]:
    """Bounds of the percentile bootstrap interval.

    Args:
        values: f64 [resamples], the estimate of each resample.
        confidence_level: Fraction of intervals that contain the true value.
    """
    outside = (1 - confidence_level) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)
