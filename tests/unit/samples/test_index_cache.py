"""Ranks agree on the samples, whatever becomes of the files of their indexes."""

from __future__ import annotations

import errno

import numpy as np

from retro_mcore.samples import index_cache
from retro_mcore.samples.index_cache import IndexCache


def test_damaged_indexes_on_a_full_disk_are_read_by_no_rank(tmp_path, monkeypatch):
    """Rank 0 sees the damage and builds them in memory; the others look after it."""
    cache, right = IndexCache(tmp_path, {}), np.arange(8)
    cache.arrays("train", ["order"], lambda: (right,))
    file = tmp_path / "train-order.npy"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))

    def refused(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(index_cache, "signed_write", refused)
    for rank in range(2):
        monkeypatch.setattr(index_cache, "get_rank", lambda rank=rank: rank)
        (found,) = cache.arrays("train", ["order"], lambda: (right,))
        assert found.tolist() == right.tolist()
    assert "No space left" in " ".join(cache.notes)
