"""The vectors of a project's database that build_index stored, checked before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_mcore.errors import ProjectError
from retro_mcore.project.markers import FileState, digest_of, fingerprint_of, state_of, verify
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.index.embeddings import Embeddings


class VectorFiles:
    """Stored vectors, memory-mapped. Called with a range of rows, it verifies and reads them.

    Args:
        paths: The project.
        shards: The files, in order.
        hint: How to make them again.
        fingerprint: Fingerprint of their inputs; None: not compared, and files without a marker
            are trusted.
        dimension: Length of the index's vectors; None: not compared.
    """

    def __init__(
        self,
        paths: ProjectPaths,
        shards: Sequence[Shard],
        hint: str,
        fingerprint: str | None = None,
        dimension: int | None = None,
    ) -> None:
        self._paths, self.shards, self._hint = paths, shards, hint
        self._fingerprint, self._dimension = fingerprint, dimension
        self._embeddings = Embeddings(shards)
        self._verified: set[Path] = set()

    def __call__(self, start: int, end: int) -> np.ndarray:
        """Read vectors [start, end), f32 [end - start, dimension]. Verifies a file once.

        Raises:
            ProjectError: files are missing or damaged. Says how to make them again.
            CorruptFileError: a vector is NaN or infinite.
        """
        if not self._verified:
            self.require()
        for shard in self._embeddings.shards_of(start, end):
            self._verify(shard.path)
        return self._embeddings.range(start, end)

    def require(self) -> None:
        """Reject missing files.

        Raises:
            ProjectError: files are missing. Says how to make them again.
        """
        missing = [shard.path for shard in self.shards if not shard.path.is_file()]
        if missing:
            found = f"missing: {len(missing)} of {len(self.shards)} files are missing"
            raise ProjectError(missing[0], found, self._hint)

    def digests(self) -> dict[str, str]:
        """Digest of the files, for a stage's inputs."""
        digests = fingerprint_of([digest_of(shard.path) for shard in self.shards])
        return {self._paths.relative(self._paths.embeddings): digests}

    def open(self, check: bool = True) -> Embeddings:
        """Map all vectors into memory; with `check`, verify all files.

        Raises:
            ProjectError: files are damaged, or the index has vectors of another dimension.
        """
        for shard in self.shards if check else []:
            self._verify(shard.path)
        embeddings = self._embeddings
        if self._dimension not in (None, embeddings.dimension):
            raise ProjectError(
                self.shards[0].path,
                f"holds vectors of dimension {embeddings.dimension}, and the index those of "
                f"{self._dimension}",
                self._hint,
            )
        return embeddings

    def _verify(self, path: Path) -> None:
        if path in self._verified:
            return
        if self._fingerprint is None:
            verify(path, self._hint)
        elif state_of(path, self._fingerprint) is not FileState.COMPLETE:
            raise ProjectError(path, "is damaged, or not what the index was built from", self._hint)
        self._verified.add(path)
