"""The tables of neighbors that query_neighbors fills, and the chunks of each.

A packed project has a table per split, with a row for each chunk of each sample. An aligned one has
a table per merged database, with a row for each of its rows: every chunk of a sample is one of
them. The table "valid" serves validation and test samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.project.config import Split
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.project_search import ProjectSearch
from retro_mcore.retrieval.query_chunks import (
    ChunkEmbedder,
    DatabaseChunks,
    EmbeddedVectors,
    QueryChunks,
    SampleChunks,
    StoredVectors,
    VectorReader,
)
from retro_mcore.samples.project_samples import RenumberedSamples, build_all_gpt_samples
from retro_mcore.stages.extended_search import MERGED, OldNeighbors
from retro_mcore.stages.stored_vectors import vectors_of_rows


@dataclass(frozen=True)
class QueryTable:
    """Chunks whose neighbors are saved in one directory.

    Attributes:
        split: The split; in an aligned project, the merged database.
        directory: Name of the directory under `query/`.
        chunks: The chunks.
        num_chunks: Number of chunks.
    """

    split: Split
    directory: str
    chunks: QueryChunks
    num_chunks: int


def sample_tables(
    search: ProjectSearch, tokenizer: Tokenizer, embedder: ChunkEmbedder, numbers: list[int]
) -> Iterator[QueryTable]:
    """The tables of a packed project's samples. All ranks must call this.

    Args:
        search: The project and the database that is searched.
        tokenizer: The project's tokenizer.
        embedder: Embeds the chunks.
        numbers: Number of each of the project's datasets in the database.
    """
    config = search.config
    splits = build_all_gpt_samples(config, search.paths, tokenizer)
    for split, samples in splits.items():
        if samples is None:
            continue
        # A finished directory keeps its name in a project that was moved.
        kept = config.retro_neighbor_dirs.get(split)
        renumbered = RenumberedSamples(samples, numbers)
        chunks = SampleChunks(renumbered, config.retro_gpt_chunk_length, embedder)
        rows = len(samples) * config.chunks_per_sample
        yield QueryTable(split, kept or f"{split}_{samples.description_hash}", chunks, rows)


def database_tables(
    search: ProjectSearch,
    embedder: ChunkEmbedder,
    numbers: list[int],
    held_out: Callable[[ChunkDatabase], VectorReader],
    old: OldNeighbors | None = None,
) -> list[QueryTable]:
    """The tables of an aligned project's merged databases; a database without rows has none.

    Training chunks are searched with the vectors that build_index stored, held-out chunks with
    those of an earlier search.

    Args:
        search: The project and the database that is searched.
        embedder: Embeds training chunks that have no stored vectors.
        numbers: Number of each of the project's datasets in the database.
        held_out: Returns what reads the vectors of the held-out chunks.
        old: Known neighbors among the old chunks, if only the new ones are searched.

    Raises:
        ProjectError: build_db or build_index has not run.
        CorruptFileError: a database is damaged.
    """
    tables = []
    for split in MERGED:
        own = ChunkDatabase.open(search.paths.root, split, own=True)
        if len(own):
            vectors = held_out(own)
            if split == "train":
                stored = vectors_of_rows(search, own, numbers)
                vectors = StoredVectors(stored) if stored else EmbeddedVectors(own, embedder)
            known = None if old is None else old.of(split)
            chunks = DatabaseChunks(own, numbers, vectors, known)
            tables.append(QueryTable(split, f"chunks_{split}", chunks, len(own)))
    return tables
