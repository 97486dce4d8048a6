"""Confidence intervals of means over questions, by resampling the questions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retro_mcore.errors import MissingDependencyError


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
            batch=64,  # limits memory use for many questions
            confidence_level=confidence_level,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))
