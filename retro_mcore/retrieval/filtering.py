"""Filtering a search's candidates: no neighbor comes from the sample's own documents, or from a
removed one.

Where a project keeps near-duplicates out of the neighbors, a document stands for its whole group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.retrieval.database import ChunkDatabase

#: Number of slots in the table that marks a sample's documents; a power of two.
_SLOTS = 1 << 22
#: Number of extra candidates that are checked first, before checking all.
_SPARE = 12


@dataclass(frozen=True)
class SampleRows:
    """The rows of a batch that belong to one sample.

    Attributes:
        start: First row.
        end: Row after the last one.
        dataset: The sample's dataset.
        documents: i64, documents of that dataset that the sample contains.
    """

    start: int
    end: int
    dataset: int
    documents: np.ndarray


class DocumentFilter:
    """Drops candidates from a sample's own documents and from removed documents.

    A continuation belongs to its neighbor's document, so it needs no check of its own.

    Args:
        database: The retrieval database.
    """

    def __init__(self, database: ChunkDatabase) -> None:
        sizes = [len(source.starts) for source in database.token_sources]
        self._groups = None if database.groups is None else database.groups.numbers
        self._removed = database.removed
        self._first_document = np.cumsum([0, *sizes[:-1]])
        self._many_datasets, self._total = len(sizes) > 1, sum(sizes)
        # Flat: a gather from a column would copy the column.
        self._flat = np.ascontiguousarray(database.chunks).reshape(-1)
        self._width = database.chunks.shape[1]
        self._marked = np.zeros(min(self._total, _SLOTS), bool)

    def documents(self, ids: np.ndarray) -> np.ndarray:
        """Number of each chunk's document or group, over all datasets; ids [...] must be valid."""
        where = ids * self._width
        documents = self._flat.take(where + 1).astype(np.int64)
        if self._many_datasets:
            documents += self._first_document[self._flat.take(where)]
        return documents if self._groups is None else self._groups[documents]

    def own(self, candidates: np.ndarray, samples: Sequence[SampleRows]) -> np.ndarray:
        """Mark the candidates from the documents of the querying sample, and removed ones.

        Args:
            candidates: Chunk ids [rows, n]; the result for NO_NEIGHBOR is arbitrary.
            samples: The samples that the rows belong to, covering all rows.

        Returns:
            bool [rows, n].
        """
        documents = self.documents(np.maximum(candidates, 0))
        own = np.empty(candidates.shape, bool)
        # Marking a sample's documents in a table is faster than comparing with each of them.
        folded = documents if self._total <= _SLOTS else documents & (_SLOTS - 1)
        for sample in samples:
            if sample.dataset >= len(self._first_document):  # a dataset that is not in the database
                own[sample.start : sample.end] = False
                continue
            mine = self._first_document[sample.dataset] + sample.documents
            mine = mine if self._groups is None else self._groups[mine]
            slots = mine if self._total <= _SLOTS else mine & (_SLOTS - 1)
            self._marked[slots] = True
            self._marked.take(folded[sample.start : sample.end], out=own[sample.start : sample.end])
            self._marked[slots] = False
            if self._total > _SLOTS:  # other documents may share a slot
                rows = own[sample.start : sample.end]
                rows &= np.isin(documents[sample.start : sample.end], mine)
        if self._removed is not None:
            own |= self._removed.of(candidates)
        return own

    def select(
        self,
        candidates: np.ndarray,
        distances: np.ndarray,
        samples: Sequence[SampleRows],
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Select the first `count` candidates from other documents; see `keep_first`.

        Nearly all rows find enough among the first few candidates, so those are checked first.
        """
        head = min(count + _SPARE, candidates.shape[1])
        ids, kept = keep_first(
            candidates[:, :head],
            distances[:, :head],
            ~self.own(candidates[:, :head], samples),
            count,
        )
        short = np.flatnonzero(ids[:, -1] == NO_NEIGHBOR)
        if head < candidates.shape[1] and len(short):
            allowed = ~self.own(candidates[short], rows_of(samples, short))
            ids[short], kept[short] = keep_first(
                candidates[short], distances[short], allowed, count
            )
        return ids, kept


def from_documents(
    database: ChunkDatabase, ids: np.ndarray, dataset: int, documents: np.ndarray
) -> np.ndarray:
    """Mark the chunks that come from given documents of one dataset, bool of the shape of `ids`.

    Chunks of their near-duplicates are marked, too, where the database has groups.

    Args:
        database: The retrieval database.
        ids: Valid chunk ids of any shape.
        dataset: Number of the dataset.
        documents: Documents of that dataset.
    """
    found = database.documents(ids)
    if database.groups is not None and dataset < len(database.token_sources):
        own = database.groups.of(dataset, documents)
        return np.isin(database.groups.of(found[..., 0], found[..., 1]), own)
    return (found[..., 0] == dataset) & np.isin(found[..., 1], documents)


def rows_of(samples: Sequence[SampleRows], rows: np.ndarray) -> list[SampleRows]:
    """Restrict samples to some of their rows, renumbered from 0.

    Args:
        samples: Samples that cover all rows.
        rows: The rows to keep, ascending.
    """
    starts = np.searchsorted(rows, [sample.start for sample in samples]).tolist()
    ends = [*starts[1:], len(rows)]
    return [
        SampleRows(start, end, sample.dataset, sample.documents)
        for sample, start, end in zip(samples, starts, ends, strict=True)
        if end > start
    ]


def keep_first(
    candidates: np.ndarray, distances: np.ndarray, allowed: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the first `count` allowed candidates of each row, and their distances.

    Args:
        candidates: Chunk ids [rows, candidates], NO_NEIGHBOR where missing.
        distances: f32 [rows, candidates].
        allowed: bool [rows, candidates].
        count: Columns of the results.

    Returns:
        Chunk ids i64 [rows, count], NO_NEIGHBOR where too few are allowed, and distances
        f32 [rows, count], NaN there.
    """
    allowed = allowed & (candidates != NO_NEIGHBOR)
    narrow = candidates.shape[1] < np.iinfo(np.int16).max
    place = np.cumsum(allowed, axis=1, dtype=np.int16 if narrow else np.int64)
    keep = allowed & (place <= count)
    if candidates.shape[1] and (place[:, -1] >= count).all():
        shape = (len(candidates), count)
        return candidates[keep].reshape(shape), distances[keep].reshape(shape)
    ids = np.full((len(candidates), count), NO_NEIGHBOR, np.int64)
    kept = np.full((len(candidates), count), np.nan, np.float32)
    rows, columns = np.nonzero(keep)
    where = place[rows, columns] - 1
    ids[rows, where] = candidates[rows, columns]
    kept[rows, where] = distances[rows, columns]
    return ids, kept
