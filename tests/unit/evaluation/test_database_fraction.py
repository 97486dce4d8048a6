"""Neighbors of a smaller database, from one search of the whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.database_fraction import NeighborsOfFraction, documents_kept
from retro_mcore.evaluation.perplexity_config import EvaluatePerplexityConfig
from tests.unit.evaluation.texts import RandomRows


@dataclass
class Documents:
    """Chunk i is of document i // 2 of dataset i % 2."""

    def documents(self, ids: np.ndarray) -> np.ndarray:
        return np.stack([ids % 2, ids // 2], axis=-1).astype(np.uint32)


def test_fractions_are_what_they_say_and_nested():
    numbers = np.arange(40_000)
    documents = np.stack([numbers % 3, numbers // 3], axis=-1).astype(np.uint32)
    before = np.zeros(len(numbers), bool)
    for fraction in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0):
        kept = documents_kept(documents, fraction, seed=7)
        # Five standard deviations of a binomial.
        assert abs(kept.mean() - fraction) <= 5 * np.sqrt(fraction * (1 - fraction) / len(numbers))
        assert kept[before].all()
        before = kept
    other = documents_kept(documents, 0.5, seed=8)
    assert 0.4 < (other == documents_kept(documents, 0.5, seed=7)).mean() < 0.6


def test_neighbors_of_other_documents_move_up():
    saved = RandomRows(30, num_saved=6, not_searched=(4,))
    part = NeighborsOfFraction(saved, Documents(), 0.5, seed=1)
    assert (len(part), part.num_saved) == (30, 6)
    for row, all_ids in enumerate(saved.rows(0, 30)):
        ids = [i for i in all_ids if i >= 0]
        kept = documents_kept(Documents().documents(np.array(ids, np.int64)), 0.5, 1)
        wanted = [i for i, keep in zip(ids, kept, strict=True) if keep]
        (found,) = part.rows(row, row + 1)
        assert found.tolist() == wanted + [-1] * (6 - len(wanted))
    counts = (part.rows(0, 30) >= 0).sum(1)[part.searched()]
    assert part.share_short(3) == (counts < 3).mean()
    assert np.array_equal(
        NeighborsOfFraction(saved, Documents(), 1, 1).rows(0, 30), saved.rows(0, 30)
    )


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"database_fraction": 0.0}, "more than 0"),
        ({"database_fraction": float("nan")}, "more than 0"),
        ({"database_fraction": 2}, "at most 1"),
        ({"database_fraction": 0.5, "protocol": "both"}, "Use --protocol samples"),
        ({"database_fraction": 0.5, "retro_eval_neighbors": ["random"]}, "Leave random out"),
    ],
)
def test_what_cannot_be_subsampled_is_refused(values, found):
    with pytest.raises(ConfigurationError, match=f"--database-fraction.*{found}"):
        EvaluatePerplexityConfig(project_dir="p", load="l", **values).check()
