"""The saved neighbors of a split's samples, however they were searched.

In a packed project they are saved for each chunk of each sample, in an aligned one for each chunk
of the databases that samples consist of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retro_mcore.data.tokens.splits import num_retrieved_documents
from retro_mcore.data.tokens.token_file import open_token_files
from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings, Split
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.neighbor_tables import SavedNeighbors
from retro_mcore.samples.chunk_neighbors import ChunkNeighbors, ChunkTable
from retro_mcore.samples.neighbor_check import (
    check_chunk_neighbors,
    check_neighbors,
    open_neighbors,
)
from retro_mcore.samples.project_samples import GPTSamples, numbers_in_database


class SampleNeighbors(Protocol):
    """Neighbors of a split's samples. Chunk `sample · L + i` is the i-th of a sample."""

    def __len__(self) -> int:
        """Number of chunks of all samples."""

    @property
    def num_saved(self) -> int:
        """Most neighbors of a chunk."""

    @property
    def directories(self) -> list[Path]:
        """Directories under `query/` with the saved neighbors."""

    def searched(self) -> np.ndarray:
        """Whether neighbors were searched for each chunk, bool [chunks]."""

    def rows(self, start: int, end: int) -> np.ndarray:
        """Neighbors of chunks [start, end), best first, i64 [end - start, num_saved]."""

    def distances(self) -> Any | None:
        """Their distances, read with `rows`; None if none were saved."""


class NeighborTables(Protocol):
    """All saved neighbors of a project."""

    def of_split(self, split: Split, samples: GPTSamples) -> SampleNeighbors:
        """The neighbors of a split's samples.

        Raises:
            ProjectError: none were searched, or they were searched for other samples.
            CorruptFileError: a file is damaged.
        """


def open_neighbor_tables(
    paths: ProjectPaths, config: ProjectConfig, database: ChunkDatabase
) -> NeighborTables:
    """Open the saved neighbors of a project in its current database.

    `check_neighbor_settings` comes first. All ranks must call this inside `raise_together`, since
    each verifies its share of the files.

    Args:
        paths: The project.
        config: Its configuration.
        database: The database that was searched.

    Raises:
        ProjectError: a file differs from the one that was searched.
        CorruptFileError: a file is damaged.
    """
    settings = ProjectSettings.load(paths.root)
    directories = config.neighbor_dirs(settings)
    for name in directories.values():
        verify_project(paths, sorted((paths.query / name).glob("*.hdf5")))
    open_tables = _open_of_chunks if settings.samples == "aligned" else _open_of_samples
    return open_tables(paths, config, directories, database)


def _not_searched(paths: ProjectPaths, split: str) -> ProjectError:
    return ProjectError(
        paths.config,
        f"names no neighbors of the {split} samples",
        f"Run query_neighbors --project-dir {paths.root} first",
    )


@dataclass(frozen=True)
class _OfSamples:
    """Tables with one row per chunk of each sample, by split."""

    paths: ProjectPaths
    config: ProjectConfig
    tables: Mapping[Split, SavedNeighbors]
    database: ChunkDatabase

    def of_split(self, split: Split, samples: GPTSamples) -> SampleNeighbors:
        """See `NeighborTables.of_split`."""
        if split not in self.tables:
            raise _not_searched(self.paths, split)
        check_neighbors(self.paths, self.config, samples, self.tables[split], self.database)
        return self.tables[split]


def _open_of_samples(
    paths: ProjectPaths,
    config: ProjectConfig,
    directories: Mapping[Split, str],
    database: ChunkDatabase,
) -> NeighborTables:
    tables = {split: open_neighbors(paths, config, split, database) for split in directories}
    return _OfSamples(paths, config, tables, database)


@dataclass(frozen=True)
class _OfChunks:
    """Tables with one row per chunk of the merged databases, by database."""

    paths: ProjectPaths
    config: ProjectConfig
    tables: Mapping[Split, ChunkTable]
    database: ChunkDatabase
    num_train_documents: list[int]
    numbers: list[int]

    def of_split(self, split: Split, samples: GPTSamples) -> SampleNeighbors:
        """See `NeighborTables.of_split`."""
        if "train" not in self.tables:
            raise _not_searched(self.paths, split)
        return ChunkNeighbors(
            samples,
            train=self.tables["train"],
            held_out=self.tables.get("valid"),
            num_train_documents=self.num_train_documents,
            database=self.database,
            numbers=self.numbers,
            chunk_length=self.config.retro_gpt_chunk_length,
        )


def _open_of_chunks(
    paths: ProjectPaths,
    config: ProjectConfig,
    directories: Mapping[Split, str],
    database: ChunkDatabase,
) -> NeighborTables:
    tables: dict[Split, ChunkTable] = {}
    for name in ("train", "valid") if directories else ():
        chunks = database
        if database.path != paths.merged_db(name):
            chunks = ChunkDatabase.open(paths.root, name, own=True)
        if not len(chunks):
            continue
        if name not in directories:
            raise _not_searched(paths, name)
        directory = paths.query / directories[name]
        neighbors = SavedNeighbors(directory, len(database), database.removed)
        tables[name] = ChunkTable(chunks, neighbors)
        check_chunk_neighbors(paths, chunks, neighbors, database)
    split = config.retro_gpt_split
    lengths = [len(file) for file in open_token_files(config, paths)]
    whole = ProjectSettings.load(paths.root).whole_datasets
    trained = [
        length if prefix in whole else num_retrieved_documents(split, length)
        for prefix, length in zip(config.blend[1], lengths, strict=True)
    ]
    numbers = numbers_in_database(paths, config, config.database_paths(paths.root))
    return _OfChunks(paths, config, tables, database, trained, numbers)
