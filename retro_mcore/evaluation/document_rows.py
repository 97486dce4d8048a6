"""Neighbors of held-out documents that query_neighbors of an aligned project has saved.

The chunks of a document are rows of db/merged/valid.hdf5 there, so nothing is searched again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.distributed import get_rank
from retro_mcore.evaluation.documents import HeldOutDocuments
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.neighbor_tables import SavedNeighbors
from retro_mcore.samples.chunk_neighbors import NO_ROW, ChunkTable
from retro_mcore.samples.neighbor_check import check_chunk_neighbors

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DocumentRows:
    """Saved neighbors of the chunks of some documents.

    Attributes:
        neighbors: Neighbors of all held-out chunks.
        places: Row of each chunk in them, i64 [chunks]; NO_ROW for a chunk without words, which
            has no neighbors.
        num_saved: Neighbors per chunk.
    """

    neighbors: SavedNeighbors
    places: NDArray[np.int64]
    num_saved: int

    def __len__(self) -> int:
        return len(self.places)

    def searched(self) -> NDArray[np.bool_]:
        """Whether each chunk has a row and so was searched, bool [chunks]."""
        return self.places != NO_ROW

    def rows(self, start: int, end: int) -> np.ndarray:
        """Neighbors of chunks [start, end), i64 [end - start, num_saved]."""
        places = self.places[start:end]
        ids = np.full((len(places), self.num_saved), NO_NEIGHBOR, np.int64)
        there = places != NO_ROW
        ids[there] = self.neighbors.rows_at(places[there])[:, : self.num_saved]
        return ids


def saved_document_neighbors(
    project_dir: Path | str, documents: HeldOutDocuments, num_save: int
) -> DocumentRows | None:
    """Open the documents' saved neighbors. All ranks must call this inside `raise_together`.

    Args:
        project_dir: The project.
        documents: Documents of its validation or test split.
        num_save: Neighbors per chunk.

    Returns:
        The neighbors; None if the project is packed, has appended datasets, has not been searched,
        or saved fewer.

    Raises:
        ProjectError: the neighbors are those of other chunks.
        CorruptFileError: a file is damaged.
    """
    paths, config = ProjectPaths(project_dir), ProjectConfig.load(project_dir)
    settings = ProjectSettings.load(project_dir)
    directory = config.neighbor_dirs(settings).get("valid")
    if settings.samples != "aligned" or directory is None:
        return None
    if settings.whole_datasets:  # their held-out documents are in the other table
        return None
    verify_project(paths, sorted((paths.query / directory).glob("*.hdf5")))
    database = ChunkDatabase.open(project_dir)
    saved = SavedNeighbors(paths.query / directory, len(database), database.removed)
    if saved.num_saved < num_save:
        return None
    table = ChunkTable(ChunkDatabase.open(project_dir, "valid", own=True), saved)
    check_chunk_neighbors(paths, table.database, saved, database)
    places = rows_of_documents(table, documents)
    if (without := int((places == NO_ROW).sum())) and get_rank() == 0:
        _LOG.info(
            "note: %d of %d chunks of documents hold no words and get no neighbors",
            without,
            len(places),
        )
    return DocumentRows(saved, places, num_save)


def rows_of_documents(table: ChunkTable, documents: HeldOutDocuments) -> NDArray[np.int64]:
    """Row of each chunk of the documents in a merged database, i64 [chunks]; see `DocumentRows`."""
    owners = documents.owners
    starts = (np.arange(len(owners)) - documents.first_rows[owners]) * documents.chunk_length
    places = np.full(len(owners), NO_ROW, np.int64)
    corpora, numbers = documents.corpus[owners], documents.number[owners]
    for corpus in np.unique(corpora).tolist():
        mine = corpora == corpus
        places[mine] = table.rows_of(corpus, numbers[mine], starts[mine], documents.chunk_length)
    return places
