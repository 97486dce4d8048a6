"""Exact and near copies among the neighbors of chunks."""

from __future__ import annotations

from types import SimpleNamespace

import h5py
import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.retrieval.copies import FIRST, NEAR_RUN, find_copies, find_near_copies
from retro_mcore.retrieval.database import ChunkDatabase

M = 16


def test_copies_near_copies_and_others(tmp_path):
    text = np.arange(M)
    near, far = text.copy(), text.copy()
    near[NEAR_RUN:] += 100
    far[NEAR_RUN - 1 :] += 100
    short = np.arange(200, 205)
    rows = [text, near, far, short]
    source = SimpleNamespace(
        tokens=np.concatenate(rows),
        starts=np.cumsum([0, *map(len, rows[:-1])]),
        lengths=np.array([*map(len, rows)]),
        num_documents=len(rows),
    )
    with h5py.File(tmp_path / "train.hdf5", "w") as file:
        chunks = [[0, i, 0, len(row), 1] for i, row in enumerate(rows)]
        file["chunks"] = np.array(chunks, np.uint32)
    database = ChunkDatabase(tmp_path / "train.hdf5", [source])
    neighbors = np.array([[2, 1, 0], [2, 3, 0], [0, 3, NO_NEIGHBOR], [NO_NEIGHBOR] * 3])
    queries = [text, text, short, text]
    exact = find_copies(database, queries, neighbors)
    assert exact.tolist() == [[False, False, True]] * 2 + [[False, True, False], [False] * 3]
    found = find_near_copies(database, queries, neighbors)
    assert found.shape == (4, FIRST)
    # The short chunk is an exact copy only; copies beyond the first neighbors do not count.
    assert found.tolist() == [[False, True], [False, False], [False, False], [False, False]]
