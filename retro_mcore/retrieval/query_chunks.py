"""The chunks that neighbors are searched for, with their vectors, read in ranges of rows.

They come from samples, which are embedded (`SampleChunks`), or from a chunk database, whose vectors
may be stored already (`DatabaseChunks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.retrieval.chunk_text import DocumentEnds, chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.base import Embedder, embed_unique
from retro_mcore.retrieval.filtering import SampleRows
from retro_mcore.retrieval.vectors import EmbeddingCounts


@dataclass
class QueryCounts(EmbeddingCounts):
    """Counts of the chunks that neighbors were searched for.

    Attributes:
        chunks_short: Chunks with fewer neighbors than are saved.
        chunks_without: Chunks without any.
        vectors_stored: Chunks searched with the vectors that build_index stored; the others were
            embedded, now or in an earlier search.
        nearest_is_copy: Chunks whose nearest neighbor has the same tokens.
        copy_found: Chunks that have a neighbor with the same tokens.
        near_copy_found: Chunks whose first neighbors include a near copy; see
            `copies.find_near_copies`.
    """

    chunks_short: int = 0
    chunks_without: int = 0
    vectors_stored: int = 0
    nearest_is_copy: int = 0
    copy_found: int = 0
    near_copy_found: int = 0


@dataclass(frozen=True)
class QueryBatch:
    """Consecutive query chunks.

    Attributes:
        tokens: Tokens of each chunk, i64 [at most M].
        vectors: f32 [n, dimension].
        owners: The documents of each chunk, which its neighbors must not come from.
        known: Neighbors and distances [n, saved] among chunks that the index does not hold; None
            if it holds all.
    """

    tokens: Sequence[np.ndarray]
    vectors: np.ndarray
    owners: Sequence[SampleRows]
    known: tuple[np.ndarray, np.ndarray] | None = None


class QueryChunks(Protocol):
    """Query chunks, numbered from 0."""

    def read(self, start: int, end: int, counts: QueryCounts) -> QueryBatch:
        """Read chunks [start, end) and count them.

        Raises:
            ConfigurationError: the embedder returns vectors that cannot be searched.
        """

    def read_rows(self, rows: np.ndarray, counts: QueryCounts) -> QueryBatch:
        """Read chunks in any ascending order, i64 [n], and count them; see `read`."""


@dataclass(frozen=True)
class ChunkEmbedder:
    """Embeds the text of chunks as build_index did.

    Attributes:
        tokenizer: The project's tokenizer.
        embedder: The embedder that the index was built with.
        document_ends: Text that the embedder reads for an end of document inside a chunk.
    """

    tokenizer: Tokenizer
    embedder: Embedder
    document_ends: DocumentEnds = "line break"

    def embed(
        self, chunks: Sequence[np.ndarray], first: int, counts: EmbeddingCounts | None = None
    ) -> np.ndarray:
        """Embed chunks, f32 [n, dimension]; `first` is the number of the first one, for errors."""
        texts = chunk_texts(self.tokenizer, chunks, self.document_ends)
        return embed_unique(self.embedder, texts, counts, first, "query chunk")


class QuerySamples(Protocol):
    """A split's samples, as the search reads them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Read a sample: tokens i64 [S+1], dataset number and document ids."""


@dataclass(frozen=True)
class SampleChunks:
    """The chunks of a split's samples; chunk `sample · L + i` is the sample's i-th.

    Attributes:
        samples: The samples.
        chunk_length: M.
        embedder: Embeds their text.
    """

    samples: QuerySamples
    chunk_length: int
    embedder: ChunkEmbedder

    def read(self, start: int, end: int, counts: QueryCounts) -> QueryBatch:
        """See `QueryChunks.read`. Each sample is read once."""
        chunks, owners = read_chunks(self.samples, start, end, self.chunk_length)
        return QueryBatch(chunks, self.embedder.embed(chunks, start, counts), owners)

    def read_rows(self, rows: np.ndarray, counts: QueryCounts) -> QueryBatch:
        """See `QueryChunks.read_rows`. All of them are embedded together."""
        runs = [read_chunks(self.samples, *run, self.chunk_length) for run in runs_of(rows)]
        chunks = [chunk for tokens, _ in runs for chunk in tokens]
        owners = _joined_owners([(len(tokens), owners) for tokens, owners in runs])
        return QueryBatch(chunks, self.embedder.embed(chunks, int(rows[0]), counts), owners)


@dataclass(frozen=True)
class EmbeddedVectors:
    """Embeds the rows of a database.

    Attributes:
        database: The database.
        embedder: Embeds their text.
    """

    database: ChunkDatabase
    embedder: ChunkEmbedder

    def read(self, start: int, end: int, counts: QueryCounts) -> np.ndarray:
        """See `VectorReader.read`."""
        return self.embedder.embed(self.database.tokens(range(start, end)), start, counts)


@dataclass(frozen=True)
class StoredVectors:
    """Reads vectors that are stored already.

    Attributes:
        stored: Returns the vectors of rows [start, end), f32 [end - start, dimension].
    """

    stored: Callable[[int, int], np.ndarray]

    def read(self, start: int, end: int, counts: QueryCounts) -> np.ndarray:
        """See `VectorReader.read`."""
        vectors = self.stored(start, end)
        counts.chunks += len(vectors)
        counts.vectors_stored += len(vectors)
        counts.zero += int((~vectors.any(axis=1)).sum())
        return vectors


class VectorReader(Protocol):
    """Reads vectors of a database's rows, and counts the rows; see `KeptVectors`."""

    def read(self, start: int, end: int, counts: QueryCounts) -> np.ndarray:
        """Read vectors [start, end), f32 [end - start, dimension]."""


@dataclass(frozen=True)
class DatabaseChunks:
    """The rows of a chunk database, each a chunk of one document.

    Attributes:
        database: The database.
        numbers: Number of each of its datasets in the searched database; see
            `numbers_in_database`.
        vectors: Reads the vectors of rows [start, end), or embeds them.
        known: Returns `QueryBatch.known` of rows [start, end).
    """

    database: ChunkDatabase
    numbers: Sequence[int]
    vectors: VectorReader
    known: Callable[[int, int], tuple[np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self.database)

    def read(self, start: int, end: int, counts: QueryCounts) -> QueryBatch:
        """See `QueryChunks.read`."""
        chunks = self.database.tokens(range(start, end))
        vectors = self.vectors.read(start, end, counts)
        known = None if self.known is None else self.known(start, end)
        return QueryBatch(chunks, vectors, self._owners(start, end), known)

    def read_rows(self, rows: np.ndarray, counts: QueryCounts) -> QueryBatch:
        """See `QueryChunks.read_rows`."""
        return _joined([self.read(start, end, counts) for start, end in runs_of(rows)])

    def _owners(self, start: int, end: int) -> list[SampleRows]:
        """Each run of rows of one document."""
        owners = self.database.documents(np.arange(start, end)).astype(np.int64)
        changes = np.flatnonzero((owners[1:] != owners[:-1]).any(axis=1)) + 1
        starts = [0, *changes.tolist()]
        return [
            SampleRows(first, last, self.numbers[owners[first, 0]], owners[first, 1:])
            for first, last in zip(starts, [*starts[1:], len(owners)], strict=True)
        ]


def read_in_batches(
    chunks: QueryChunks, start: int, end: int, size: int, counts: QueryCounts
) -> QueryBatch:
    """Read chunks [start, end), `size` at a time: embedding them rounds alike in any range."""
    firsts = range(start, end, size)
    return _joined([chunks.read(first, min(first + size, end), counts) for first in firsts])


def runs_of(rows: np.ndarray) -> list[tuple[int, int]]:
    """The runs [start, end) of consecutive numbers in ascending ones, i64 [n]."""
    firsts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    ends = [*firsts[1:].tolist(), len(rows)]
    return [
        (int(rows[first]), int(rows[first]) + end - first)
        for first, end in zip(firsts.tolist(), ends, strict=True)
    ]


def _joined_owners(parts: Sequence[tuple[int, Sequence[SampleRows]]]) -> list[SampleRows]:
    """The owners of several batches after one another, each with its number of chunks."""
    owners, before = [], 0
    for count, part in parts:
        owners += [replace(rows, start=rows.start + before, end=rows.end + before) for rows in part]
        before += count
    return owners


def _joined(read: Sequence[QueryBatch]) -> QueryBatch:
    """Several batches as one."""
    if len(read) == 1:
        return read[0]
    owners = _joined_owners([(len(batch.tokens), batch.owners) for batch in read])
    tokens = [chunk for batch in read for chunk in batch.tokens]
    known = [batch.known for batch in read if batch.known is not None]
    vectors = np.concatenate([batch.vectors for batch in read])
    if not known:
        return QueryBatch(tokens, vectors, owners)
    ids, distances = (np.concatenate(parts) for parts in zip(*known, strict=True))
    return QueryBatch(tokens, vectors, owners, (ids, distances))


def read_chunks(
    samples: QuerySamples, start: int, end: int, chunk_length: int
) -> tuple[list[np.ndarray], list[SampleRows]]:
    """Read rows [start, end): their tokens and samples. Each sample is read once."""
    chunks: list[np.ndarray] = []
    owners: list[SampleRows] = []
    for sample, first, last in _cut_by_sample(samples, start, end, chunk_length):
        tokens, dataset, documents = samples.read(sample)
        rows = tokens[first * chunk_length : last * chunk_length].reshape(-1, chunk_length)
        owners.append(SampleRows(len(chunks), len(chunks) + len(rows), dataset, documents))
        chunks.extend(rows)
    return chunks, owners


def _cut_by_sample(
    samples: QuerySamples, start: int, end: int, chunk_length: int
) -> Iterator[tuple[int, int, int]]:
    """Yield each sample of rows [start, end), with its first and last chunk (exclusive)."""
    per_sample = (len(samples.read(0)[0]) - 1) // chunk_length
    while start < end:
        sample, first = divmod(start, per_sample)
        last = min(per_sample, first + end - start)
        yield sample, first, last
        start += last - first
