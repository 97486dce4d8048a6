"""Shuffled and random neighbors."""

from __future__ import annotations

import numpy as np
import pytest

from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.neighbor_sources import change_neighbors, possible_kinds, shuffled_rows
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


def test_a_default_that_is_impossible_is_left_out_and_told(capsys):
    """Somebody's first corpus has two held-out documents, one of them long: after minutes of
    measuring, nothing was written, for a kind of neighbors that nobody had asked for."""
    default = ["real", "shuffled", "none"]
    long, even = np.repeat([0, 1], [3, 1]), np.repeat([0, 1], [2, 2])
    assert possible_kinds(default, even, asked=False) == default
    assert possible_kinds(["real", "none"], long, asked=True) == ["real", "none"]
    assert capsys.readouterr().err == ""
    assert possible_kinds(default, long, asked=False) == ["real", "none"]
    assert "without shuffled neighbors: shuffled, but one text holds 3" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="--retro-eval-neighbors: shuffled"):
        possible_kinds(default, long, asked=True)


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


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_chunks_that_were_not_searched_stay_without_neighbors(kind):
    without, owners = (0, 3, 10), np.repeat(np.arange(3), 4)
    own = RandomRows(12, not_searched=without)
    changed = change_neighbors(own, kind, owners, 50, 1)
    found = changed.rows(0, 12)
    assert np.flatnonzero((found < 0).any(1)).tolist() == list(without)
    assert (found[list(without)] == -1).all()
    assert changed.searched().tolist() == own.searched().tolist()
    assert np.array_equal(changed.rows(2, 5), found[2:5])
    if kind == "shuffled":
        rows = np.flatnonzero(own.searched())
        donors = changed.donors[rows]
        assert sorted(donors) == rows.tolist()
        assert not (owners[donors] == owners[rows]).any()
