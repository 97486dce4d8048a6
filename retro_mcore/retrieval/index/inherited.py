"""Embeddings and index training that an extended project inherits.

An extended database begins with the rows of the old one (`stages.grown_project`). Their embeddings
are still valid. The index trained on them is filled again, but not trained again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import adopt
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.project.shards import Shard, cut
from retro_mcore.retrieval.database import ChunkDatabase

#: Number of rows compared in one call.
_BATCH = 1 << 22


class InheritedIndex:
    """The embeddings and the trained index of the project that a database was extended from.

    Args:
        paths: The extended project.
        settings: Its settings; `grown_from` names the other project.

    Raises:
        ProjectError: the database does not begin with the other's rows.
    """

    def __init__(self, paths: ProjectPaths, settings: ProjectSettings) -> None:
        self._paths, self._growth = paths, settings.growth
        self._base = ProjectPaths((paths.root / str(settings.grown_from)).resolve())
        rows = ChunkDatabase.open(paths.root, own=True).chunks
        old = ChunkDatabase.open(self._base.root, own=True).chunks
        if not (len(old) == self._growth[-1] <= len(rows) and begins_with(rows, old)):
            raise ProjectError(
                paths.merged_db("train"),
                f"does not begin with the rows of {self._base.root}, which it was grown from",
                "Restore that project, or build the database from all documents",
            )

    @classmethod
    def of(cls, paths: ProjectPaths, settings: ProjectSettings) -> InheritedIndex | None:
        """What a project inherits; None if its database was not extended from another."""
        return cls(paths, settings) if settings.grown_from else None

    def embedded_with(self, options: Mapping[str, Any]) -> bool:
        """Whether the other project's embeddings were made with the same options."""
        used = recorded_options(self._base, "build_index")
        return bool(used) and all(used.get(name) == value for name, value in options.items())

    def link_embeddings(self, shards: Sequence[Shard], fingerprint: str) -> None:
        """Link the shards of the old rows and the lexical weights; skip damaged ones."""
        length = ProjectConfig.load(self._base.root).retro_block_size
        old = cut(self._base.embeddings, self._growth[-1], length, self._growth[:-1])
        for theirs, ours in zip(old, shards, strict=False):
            if (theirs.start, theirs.end) == (ours.start, ours.end):
                adopt(theirs.path, ours.path, fingerprint)
        adopt(self._base.lexical_weights, self._paths.lexical_weights, fingerprint)

    def link_trained_index(self, index_string: str, fingerprint: str) -> bool:
        """Link the trained index. Returns whether there is one with that string."""
        theirs = self._base.empty_index(index_string)
        return adopt(theirs, self._paths.empty_index(index_string), fingerprint)


def begins_with(rows: np.ndarray, old: np.ndarray) -> bool:
    """Whether a database's rows begin with all of another's."""
    return len(old) <= len(rows) and all(
        np.array_equal(old[start : start + _BATCH], rows[start : start + _BATCH][: len(old)])
        for start in range(0, len(old), _BATCH)
    )
