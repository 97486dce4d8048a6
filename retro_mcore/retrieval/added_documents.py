"""Documents that a running server retrieves from, in addition to the project's database.

They are kept in memory. A search takes one snapshot of them, searches it exactly and merges the
result with the index's by distance, so that documents may come and go while texts grow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.index.faiss_search import nearest


@dataclass(frozen=True)
class AddedDocument:
    """A document that was added.

    Attributes:
        id: Its id.
        text: Its text.
        chunks: Tokens of its chunks, each i64 [at most M].
        vectors: Their embeddings, f32 [chunks, dimension].
        num_without_words: Chunks that were left out because they hold no words.
    """

    id: str
    text: str
    chunks: Sequence[np.ndarray]
    vectors: np.ndarray
    num_without_words: int = 0

    @property
    def num_chunks(self) -> int:
        """Number of its chunks, with those that were left out: its text is kept whole."""
        return len(self.chunks) + self.num_without_words


@dataclass(frozen=True)
class AddedChunks:
    """The chunks of all added documents at one time. Never changed.

    Attributes:
        documents: The documents.
        ids: Id of each chunk, i64 [n], ascending. None is used twice, also after a reset.
        chunks: Tokens of each chunk.
        owners: Index of each chunk's document, i64 [n].
        vectors: f32 [n, dimension].
    """

    documents: tuple[AddedDocument, ...]
    ids: np.ndarray
    chunks: Sequence[np.ndarray]
    owners: np.ndarray
    vectors: np.ndarray
    _squares: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        squares = np.einsum("nd,nd->n", self.vectors, self.vectors)
        object.__setattr__(self, "_squares", squares)

    def __len__(self) -> int:
        return len(self.ids)

    def place_of(self, ids: np.ndarray) -> np.ndarray:
        """Index of each chunk id in this snapshot, i64 of the same shape; -1 for all others."""
        if not len(self):
            return np.full(np.shape(ids), -1)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return np.where(self.ids[places] == ids, places, -1)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search the nearest chunks exactly.

        Args:
            queries: f32 [N, dimension].
            k: Number of chunks.

        Returns:
            Squared distances f32 and ids i64, both [N, at most k].
        """
        k = min(k, len(self))
        rough = self._squares - 2 * (queries @ self.vectors.T)
        places = np.argpartition(rough, k - 1, axis=1)[:, :k] if k else np.zeros((len(queries), 0))
        places = places.astype(np.int64)
        # A difference of squares loses the digits of small distances.
        distances = ((queries[:, None] - self.vectors[places]) ** 2).sum(axis=-1)
        return distances.astype(np.float32), self.ids[places]

    def merge(
        self, queries: np.ndarray, distances: np.ndarray, ids: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of these chunks and of an index's results, by distance, then id.

        Args:
            queries: f32 [N, dimension].
            distances: Squared distances that the index found, f32 [N, any].
            ids: Their chunk ids.
            k: Number of chunks.
        """
        own_distances, own_ids = self.search(queries, k)
        return nearest(np.hstack([distances, own_distances]), np.hstack([ids, own_ids]), k)


class JoinedDatabase(ChunkDatabase):
    """A chunk database with added chunks, whose ids follow those of its rows.

    Args:
        database: The database.
        added: The added chunks.
    """

    def __init__(self, database: ChunkDatabase, added: AddedChunks) -> None:
        self.__dict__.update(database.__dict__)
        self._database, self._added = database, added

    def continuation(self, ids: np.ndarray) -> np.ndarray:
        """See `ChunkDatabase.continuation`."""
        ids = np.asarray(ids, np.int64)
        rows = self._database.continuation(np.where(ids < len(self), ids, NO_NEIGHBOR))
        here, there = self._added.place_of(ids), self._added.place_of(ids + 1)
        both = (here >= 0) & (there >= 0)
        owners = self._added.owners if len(self._added) else np.zeros(1, np.int64)
        same = both & (owners[np.maximum(here, 0)] == owners[np.maximum(there, 0)])
        return np.where(same, ids + 1, rows)

    def padded_tokens(
        self, ids: np.ndarray, chunk_length: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `ChunkDatabase.padded_tokens`."""
        ids = np.asarray(ids, np.int64)
        places = self._added.place_of(ids)
        rows = np.where(places >= 0, NO_NEIGHBOR, ids)
        tokens, mask = self._database.padded_tokens(rows, chunk_length, pad_id)
        for where in zip(*np.nonzero(places >= 0), strict=True):
            chunk = self._added.chunks[int(places[where])]
            tokens[where][: len(chunk)], mask[where][: len(chunk)] = chunk, False
        return tokens, mask


class AddedDocuments:
    """The documents that a server was given. Safe to use from several threads.

    Args:
        first_id: Id of the first chunk: the number of rows of the database.
        dimension: Length of a vector.
        most_chunks: Maximum number of chunks.
    """

    def __init__(self, first_id: int, dimension: int, most_chunks: int) -> None:
        self._next_id, self._dimension, self._most_chunks = first_id, dimension, most_chunks
        self._lock = threading.Lock()
        self._now = _snapshot((), np.empty(0, np.int64), dimension)

    @property
    def now(self) -> AddedChunks:
        """The documents at this time."""
        return self._now

    def require_room(self, num_chunks: int) -> None:
        """Reject chunks that would be too many.

        Raises:
            ConfigurationError: they are.
        """
        before = sum(each.num_chunks for each in self._now.documents)
        if before + num_chunks > self._most_chunks:
            raise ConfigurationError(
                "documents",
                f"{num_chunks} chunks, and {before} were added before; at most "
                f"{self._most_chunks} fit",
                "Save them into the project with update_db --append, or raise --max-added-chunks",
            )

    def add(self, documents: Sequence[AddedDocument]) -> AddedChunks:
        """Add documents, all or none.

        Raises:
            ConfigurationError: an id is taken, or there are too many chunks.
        """
        with self._lock:
            taken = {document.id for document in self._now.documents}
            for document in documents:
                if document.id in taken:
                    found = f"the id {document.id!r} is there already"
                    raise ConfigurationError("documents", found, "Give another id")
                taken.add(document.id)
            self.require_room(sum(document.num_chunks for document in documents))
            count = sum(len(document.chunks) for document in documents)
            numbers = np.arange(self._next_id, self._next_id + count)
            together = (*self._now.documents, *documents)
            self._now = _snapshot(
                together, np.concatenate([self._now.ids, numbers]), self._dimension
            )
            self._next_id += count
            return self._now

    def reset(self) -> AddedChunks:
        """Forget all documents. Returns those that there were."""
        with self._lock:
            before, self._now = self._now, _snapshot((), np.empty(0, np.int64), self._dimension)
            return before


def _snapshot(documents: tuple[AddedDocument, ...], ids: np.ndarray, dimension: int) -> AddedChunks:
    counts = [len(document.chunks) for document in documents]
    vectors = [document.vectors for document in documents]
    return AddedChunks(
        documents=documents,
        ids=ids,
        chunks=[chunk for document in documents for chunk in document.chunks],
        owners=np.repeat(np.arange(len(documents)), counts),
        vectors=np.concatenate([np.empty((0, dimension), np.float32), *vectors]),
    )
