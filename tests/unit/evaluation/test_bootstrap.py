"""Bootstrap intervals of bits per byte over documents."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from retro_mcore.evaluation.bootstrap import percentile_interval, resampled_ratios


def test_the_interval_is_the_delta_methods_in_the_limit():
    generator = np.random.default_rng(0)
    num_bytes = generator.integers(50, 150, 400).astype(float)
    bits = 1.5 * num_bytes + generator.normal(0, 20, 400)
    (drawn,) = resampled_ratios(bits[None], num_bytes, 4000, seed=1)
    ratio = bits.sum() / num_bytes.sum()
    deviation = np.sqrt(((bits - ratio * num_bytes) ** 2).sum()) / num_bytes.sum()
    low, high = percentile_interval(drawn)
    # 4,000 resamples give the bounds to about 3% of the width; 5 times that is far out.
    assert low == pytest.approx(ratio - 1.96 * deviation, abs=0.3 * deviation)
    assert high == pytest.approx(ratio + 1.96 * deviation, abs=0.3 * deviation)


def test_kinds_are_compared_on_the_same_resamples():
    num_bytes = np.random.default_rng(0).integers(1, 900, 30).astype(float)
    none = np.random.default_rng(1).uniform(0, 5, 30) * num_bytes
    drawn = resampled_ratios(np.stack([none, none - 0.25 * num_bytes]), num_bytes, 100, seed=2)
    assert np.ptp(drawn[0]) > 0.1
    np.testing.assert_allclose(drawn[0] - drawn[1], 0.25, rtol=1e-12)
    again = resampled_ratios(none[None], num_bytes, 100, seed=2)
    np.testing.assert_allclose(drawn[:1], again, rtol=1e-12)


def test_documents_are_resampled_whole(megatron):
    """Chunks of a document stay together: here they cancel, so nothing varies."""
    from retro_mcore.evaluation.bits_per_byte import DocumentEvaluation, summarize
    from retro_mcore.evaluation.chunk_losses import ChunkLosses
    from tests.unit.evaluation.texts import random_documents

    documents = random_documents([16, 16, 16])
    tokens, num_bytes = np.array([7, 8] * 3), np.array([10, 10] * 3)
    losses = {
        "real": ChunkLosses(np.array([1.0, 3] * 3), tokens, num_bytes),
        "none": ChunkLosses(np.array([5.0, 3, 2, 4, 1, 6]), tokens, num_bytes),
    }
    rows = [summarize(documents, each, kind, 32, 16, 0.0) for kind, each in losses.items()]
    evaluation = SimpleNamespace(documents=documents, losses=losses, num_bytes=num_bytes)
    real, none = DocumentEvaluation.with_intervals(evaluation, rows, 200, seed=3)
    wanted = 4 / 20 / math.log(2)
    assert real.interval == pytest.approx((wanted, wanted))
    low, high = none.interval
    assert low < none.bits_per_byte < high
    difference = real.differences["none"]
    assert difference.mean == pytest.approx(real.bits_per_byte - none.bits_per_byte)
    assert (difference.low, difference.high) == pytest.approx((wanted - high, wanted - low))
    assert list(none.differences) == ["real"]


def test_resamples_without_bytes_are_left_out():
    found = resampled_ratios(np.array([[5.0, 1.0, 0.0]]), np.array([4.0, 0.0, 0.0]), 200, 1)
    assert found.shape[1] < 200
    assert np.isfinite(found).all()
