"""Embeddings, training and filled parts of the index that an extended project inherits.

An extended database begins with the rows of the old one (`stages.grown_project`). Their embeddings
are still valid. The index trained on them is not trained again, and its parts with these rows are
kept. So only new vectors are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import FileState, adopt, digest_of, state_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.project.shards import Shard, cut
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.index.filling import exact_path, find_parts
from retro_mcore.retrieval.index.training import IndexKind

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
        # Defaults are not recorded, so an option may be missing on either side.
        names = {*options, *(name for name in used if name.startswith("--embed"))}
        return bool(used) and all(used.get(name) == options.get(name) for name in names)

    def link_embeddings(self, shards: Sequence[Shard], fingerprint: str) -> None:
        """Link the shards of the old rows, the queries of the recall and the lexical weights.

        Damaged ones are skipped.
        """
        length = ProjectConfig.load(self._base.root).retro_block_size
        old = cut(self._base.embeddings, self._growth[-1], length, self._growth[:-1])
        for theirs, ours in zip(old, shards, strict=False):
            if (theirs.start, theirs.end) == (ours.start, ours.end):
                adopt(theirs.path, ours.path, fingerprint)
        adopt(self._base.held_out, self._paths.held_out, fingerprint)
        adopt(self._base.lexical_weights, self._paths.lexical_weights, fingerprint)

    def link_trained_index(self, index_string: str, fingerprint: str) -> bool:
        """Link the trained index. Returns whether there is one with that string."""
        theirs = self._base.empty_index(index_string)
        return adopt(theirs, self._paths.empty_index(index_string), fingerprint)

    def link_parts(
        self, parts: Sequence[Shard], index_string: str, kind: IndexKind, fingerprint: str
    ) -> None:
        """Link the parts of the old rows, with their exact neighbors of the recall's queries.

        Nothing is linked if the index was trained, or its recall measured, otherwise.

        Args:
            parts: The extended index's parts.
            index_string: Faiss factory string.
            kind: Kind of the index.
            fingerprint: Fingerprint of what the extended index is made from.
        """
        if not self._same_index(index_string):
            return
        theirs = find_parts(
            self._base.index_parts(index_string),
            self._growth[-1],
            kind,
            ProjectConfig.load(self._base.root).retro_block_size,
            self._growth[:-1],
        )
        paths = {(part.start, part.end): part for part in theirs}
        for part in parts:
            old = paths.get((part.start, part.end))
            if old is not None and adopt(exact_path(old), exact_path(part), fingerprint):
                adopt(old.path, part.path, fingerprint)

    def filled_index(self, index_string: str) -> Path | None:
        """The other project's index with all its vectors, if it is whole and can be added to."""
        path = self._base.added_index(index_string)
        # Faiss builds an NSG graph once, from all its vectors.
        usable = "NSG" not in index_string and self._same_index(index_string)
        return path if usable and state_of(path) is FileState.COMPLETE else None

    def _same_index(self, index_string: str) -> bool:
        """Whether both projects' trained indexes, and the queries of the recall, are the same."""
        pairs = [
            (paths.empty_index(index_string), paths.held_out) for paths in (self._base, self._paths)
        ]
        there = all(path.is_file() for pair in pairs for path in pair)
        return there and [*map(digest_of, pairs[0])] == [*map(digest_of, pairs[1])]


def begins_with(rows: np.ndarray, old: np.ndarray) -> bool:
    """Whether a database's rows begin with all of another's."""
    ends = [(start, min(start + _BATCH, len(old))) for start in range(0, len(old), _BATCH)]
    return len(old) <= len(rows) and all(
        np.array_equal(old[start:end], rows[start:end]) for start, end in ends
    )
