"""Shuffled and random neighbors."""

from __future__ import annotations

import numpy as np
import pytest

from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.neighbor_sources import change_neighbors, shuffled_rows
from tests.unit.evaluation.texts import RandomRows


@pytest.mark.parametrize(
    "sizes", [[1, 1], [4, 4], [5, 5, 5], [8] * 50, [1, 2, 3, 4], [9, 5, 4], [1, 1, 1, 3]]
)
def test_shuffling_gives_every_row_once_and_none_to_its_own_text(sizes):
    owners = np.repeat(np.arange(len(sizes)), sizes)
    donors = shuffled_rows(owners, seed=1)
    assert sorted(donors) == list(range(len(owners)))
    assert not np.any(owners[donors] == owners)
    assert np.array_equal(donors, shuffled_rows(owners, seed=1))


def test_shuffling_spreads_a_sample_over_many():
    owners = np.repeat(np.arange(50), 8)
    donors = owners[shuffled_rows(owners, seed=1)].reshape(50, 8)
    assert np.mean([len(set(row)) for row in donors]) > 6


@pytest.mark.parametrize("sizes", [[4], [3, 1, 1], []])
def test_a_text_that_holds_most_chunks_cannot_be_shuffled(sizes):
    with pytest.raises(ConfigurationError, match="shuffled, but one text holds"):
        shuffled_rows(np.repeat(np.arange(len(sizes)), sizes), seed=1)


def test_kinds_of_neighbors():
    own, owners = RandomRows(12), np.repeat(np.arange(3), 4)
    assert change_neighbors(own, "real", owners, 50, 1) is own
    shuffled = change_neighbors(own, "shuffled", owners, 50, 1)
    donors = shuffled_rows(owners, 1)
    assert np.array_equal(shuffled.rows(0, 12), own.rows(0, 12)[donors])
    drawn = change_neighbors(own, "random", owners, 50, 1)
    every = drawn.rows(0, 12)
    assert every.shape == (12, 2)
    assert len(np.unique(every)) > 12
    assert every.max() < 50
    assert np.array_equal(drawn.rows(5, 7), every[5:7])
    assert not np.array_equal(every, change_neighbors(own, "random", owners, 50, 2).rows(0, 12))
