"""The vectors that build_index stored, for searching the chunks that they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import FileState, digest_of, state_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.base import LEXICAL_EMBEDDER
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.index.inherited import begins_with
from retro_mcore.retrieval.project_search import ProjectSearch
from retro_mcore.stages.build_index import STAGE, stored_embeddings


class StoredVectors:
    """Vectors of a project's database. A file is verified when it is first read.

    Args:
        paths: The project, after build_index.

    Raises:
        ProjectError: build_index has not finished.
    """

    def __init__(self, paths: ProjectPaths) -> None:
        self._paths, files = paths, stored_embeddings(paths)
        self._embeddings, self._fingerprint = Embeddings(files.shards), files.fingerprint
        self._verified: set[Path] = set()

    def __call__(self, start: int, end: int) -> np.ndarray:
        """Read vectors [start, end), f32 [end - start, dimension].

        Raises:
            ProjectError: files are missing or damaged. Says how to make them again.
            CorruptFileError: a vector is NaN or infinite.
        """
        if not self._verified:
            self._require_files()
        for shard in self._embeddings.shards_of(start, end):
            self._verify(shard)
        return self._embeddings.range(start, end)

    def _require_files(self) -> None:
        shards = self._embeddings.shards
        missing = [shard.path for shard in shards if not shard.path.is_file()]
        if missing:
            raise ProjectError(
                missing[0].parent,
                f"{len(missing)} of {len(shards)} files are missing, the first {missing[0].name}",
                self._hint,
            )

    def _verify(self, shard: Shard) -> None:
        if shard.path in self._verified:
            return
        if state_of(shard.path, self._fingerprint) is not FileState.COMPLETE:
            raise ProjectError(
                shard.path, "is damaged, or not what the index was built from", self._hint
            )
        self._verified.add(shard.path)

    @property
    def _hint(self) -> str:
        return (
            f"Restore it, or embed these chunks again: build_index --project-dir "
            f"{self._paths.root} --stage embed, with the options that it was run with"
        )


def vectors_of_rows(
    search: ProjectSearch, own: ChunkDatabase, numbers: list[int]
) -> StoredVectors | None:
    """Stored vectors of the rows of a project's own database; None if they must be embedded.

    Args:
        search: The project, and the database that is searched for these rows.
        own: The project's own database.
        numbers: Number of each of its datasets in the searched database.
    """
    same_datasets = numbers == list(range(len(numbers)))
    if same_datasets and begins_with(search.database.chunks, own.chunks):
        return StoredVectors(search.source)
    return StoredVectors(search.paths) if _embedded_alike(search) else None


def _embedded_alike(search: ProjectSearch) -> bool:
    """Whether both projects' vectors come from one embedder, so that they can be compared."""
    paths, source = search.paths, search.source
    if not paths.stage_record(STAGE).is_file():
        return False
    mine, theirs = (way_of_embedding(each) for each in (paths, source))
    if mine != theirs:
        return False
    # A relative path may name another folder there.
    name = str(search.source_settings.embedder)
    return Path(name).is_absolute() or not Path(name).exists()


def way_of_embedding(paths: ProjectPaths) -> list[object]:
    """The settings that decide a text's vector, and the weights that are made from the texts."""
    options = {
        name: value
        for name, value in recorded_options(paths, STAGE).items()
        if name.startswith("--embed") and not name.startswith("--embed-batch")
    }
    settings = ProjectSettings.load(paths.root)
    weights = None
    if settings.embedder == LEXICAL_EMBEDDER:
        weights = digest_of(paths.lexical_weights)
    length = ProjectConfig.load(paths.root).retro_gpt_chunk_length
    return [options, settings.document_ends, weights, length]
