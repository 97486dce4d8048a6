"""Embeddings and training of the index that a compacted project takes over.

Its database is that of another project without the removed documents (`stages.compaction`). The
vectors of the other rows are copied, and the trained index is used again, so that only the index is
filled anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import FileState, adopt, state_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import Shard, cut, run_shards
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.index.inherited import InheritedIndex
from retro_mcore.retrieval.index.training import IndexKind
from retro_mcore.retrieval.removed import find_removed, left_out_documents
from retro_mcore.retrieval.stored_types import StoredCounts, StoredType, as_stored, bytes_of

#: Rows compared in one call.
_BATCH = 1 << 22


class CompactedIndex(InheritedIndex):
    """The embeddings and the trained index of the project that a database was compacted from.

    Args:
        paths: The compacted project.
        settings: Its settings; `compacted_from` names the other project.

    Raises:
        ProjectError: the database is not the other's without the removed documents.
    """

    def __init__(self, paths: ProjectPaths, settings: ProjectSettings) -> None:
        self._paths = paths
        self._base = ProjectPaths((paths.root / str(settings.compacted_from)).resolve())
        self._old = ChunkDatabase.open(self._base.root, own=True).chunks
        rows = ChunkDatabase.open(paths.root, own=True).chunks
        removed = find_removed(self._old, left_out_documents(paths))
        count = len(self._old)
        self._rows = np.arange(count) if removed is None else removed.kept(count)
        if not _are_rows(rows, self._old, self._rows):
            raise ProjectError(
                paths.merged_db("train"),
                f"does not hold the rows of {self._base.root} that were not removed",
                "Restore that project, or build the database from all documents",
            )

    def link_embeddings(self, shards: Sequence[Shard], fingerprint: str) -> None:
        """Link the lexical weights. The vectors are copied by `copy_embeddings`."""
        adopt(self._base.lexical_weights, self._paths.lexical_weights, fingerprint)

    def copy_embeddings(self, shards: Sequence[Shard], fingerprint: str, dtype: StoredType) -> None:
        """Copy the vectors of the rows that are left, on all ranks.

        Nothing is copied if files of the other project are missing or damaged.

        Args:
            shards: Files of the vectors.
            fingerprint: Fingerprint of what they are made from.
            dtype: Type that they are stored in.
        """
        settings = ProjectSettings.load(self._base.root)
        length = ProjectConfig.load(self._base.root).retro_block_size
        old = cut(self._base.embeddings, len(self._old), length, settings.growth)
        if any(state_of(shard.path) is not FileState.COMPLETE for shard in old):
            return
        vectors = Embeddings(old)

        def build(shard: Shard, path: Path) -> None:
            rows = vectors.rows(self._rows[shard.start : shard.end])
            with h5py.File(path, "w") as file:
                # Without counts: those of the other files are not known by row.
                file["data"] = as_stored(rows, dtype, StoredCounts())

        row_bytes = bytes_of(dtype) * vectors.dimension
        run_shards(shards, build, fingerprint, "copy embeddings", row_bytes)

    def link_parts(
        self, parts: Sequence[Shard], index_string: str, kind: IndexKind, fingerprint: str
    ) -> None:
        """Link nothing: rows have other numbers."""

    def filled_index(self, index_string: str) -> Path | None:
        """None: removed vectors cannot be taken out of a graph."""
        return None


def _are_rows(chunks: np.ndarray, old: np.ndarray, rows: np.ndarray) -> bool:
    """Whether a database consists of the given rows of another."""
    return len(chunks) == len(rows) and all(
        np.array_equal(chunks[start : start + _BATCH], old[rows[start : start + _BATCH]])
        for start in range(0, len(rows), _BATCH)
    )
