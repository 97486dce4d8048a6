"""Search the neighbors of query chunks, and save them (query_neighbors)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.distributed import any_rank, get_rank, get_world_size, raise_together
from retro_mcore.errors import CorruptFileError
from retro_mcore.progress import Progress
from retro_mcore.project.hdf5 import read_counts
from retro_mcore.project.markers import signed_write
from retro_mcore.project.shards import (
    Shard,
    ShardReport,
    group_shards,
    missing_shards,
    run_groups,
)
from retro_mcore.retrieval.copies import FIRST, find_copies, find_near_copies
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.filtering import DocumentFilter, SampleRows, keep_first, rows_of
from retro_mcore.retrieval.index.faiss_search import nearest, search
from retro_mcore.retrieval.index.shared import SharedIndex
from retro_mcore.retrieval.query_chunks import (
    QueryBatch,
    QueryChunks,
    QueryCounts,
    read_in_batches,
)
from retro_mcore.retrieval.rerank import BM25

#: Number of chunks read and filtered at a time; bounds the memory.
BATCH = 4096
#: Default number of candidates per chunk, before those of its own documents are dropped.
NUM_QUERY = 200
#: Candidates of a narrow search: this times the saved neighbors, and at least so many more than
#: these. Nearly all chunks find enough among them.
_NARROW, _FEWEST_SPARE = 2, 32
#: Factor by which a search that finds too few neighbors is widened.
_MORE = 4

#: Number of query chunks that cannot all fall into empty lists of an index.
_MANY = 16

#: A search (vectors f32 [n, dimension], k) and its result (distances, ids [n, k]).
Request = tuple[np.ndarray, int]
Found = tuple[np.ndarray, np.ndarray]


def narrow_candidates(num_save: int) -> int:
    """Candidates of the first search in list order, for so many saved neighbors."""
    return max(_NARROW * num_save, num_save + _FEWEST_SPARE)


@dataclass
class NeighborSearch:
    """Searches, filters and saves the neighbors of query chunks.

    Attributes:
        database: The retrieval database.
        num_query: Number of candidates per chunk; more if too few are from other documents.
        num_save: Neighbors saved per chunk, none from the chunk's own documents.
        rerank: Orders the remaining candidates; None: by distance.
        num_searched: Chunks that the index holds; None: all of the database.
        together: Chunks, also of several files, that are searched in one call of an index whose
            result for a chunk does not depend on the others. 0: those of a file, up to `BATCH`.
        together_wide: Chunks of one call that searches `num_query` candidates, where the first one
            searches fewer; None: as many.
        prefixes: Whether a search for fewer candidates finds the first of those that one for more
            finds. Then few are searched first, and `num_query` for the chunks that need them.
    """

    database: ChunkDatabase
    num_query: int
    num_save: int
    rerank: BM25 | None = None
    num_searched: int | None = None
    together: int = 0
    together_wide: int | None = None
    prefixes: bool = False

    def __post_init__(self) -> None:
        self.filter = DocumentFilter(self.database)

    def shards(self, chunks: QueryChunks, shards: Sequence[Shard], fingerprint: str) -> Steps:
        """Write the files of several shards, whose searches are joined; see `shard`."""

        def write(shard: Shard) -> Steps:
            with signed_write(shard.path, fingerprint) as temporary:
                yield from self.shard(chunks, shard, temporary, fingerprint)

        return join_searches(map(write, shards), self.most_queries)

    def most_queries(self, k: int) -> int:
        """Chunks per search of k candidates, which take no more memory than usual ones."""
        wide = self.together if self.together_wide is None else self.together_wide
        if k < self.num_query:
            return max(BATCH, self.together)
        return max(BATCH, wide * self.num_query // max(k, 1))

    def shard(self, chunks: QueryChunks, shard: Shard, path: Path, fingerprint: str) -> Steps:
        """Write one shard's neighbors to `path`, and their distances, one batch at a time.

        Yields:
            A request to search; expects the result to be sent in.
        """
        rows = shard.end - shard.start
        # Distances are written first, so no neighbors are ever without them.
        with (
            signed_write(distances_path(shard), fingerprint) as temporary,
            h5py.File(temporary, "w") as distances_file,
            h5py.File(path, "w") as file,
        ):
            neighbors = file.create_dataset("neighbors", (rows, self.num_save), np.int64)
            distances = distances_file.create_dataset(
                "distances", (rows, self.num_save), np.float32
            )
            counts = QueryCounts()
            step = self._step(rows)
            for start in range(shard.start, shard.end, step):
                end = min(start + step, shard.end)
                found = yield from self.batch(chunks, start, end, counts)
                here = slice(start - shard.start, end - shard.start)
                neighbors[here], distances[here] = found
            distances_file["counts"] = counts.to_array()

    def _step(self, rows: int) -> int:
        """Chunks per search, so that searches are of about one size; whole batches are read."""
        searches = math.ceil(rows / max(self.together, BATCH))
        return math.ceil(rows / searches / BATCH) * BATCH if rows else BATCH

    def batch(
        self, chunks: QueryChunks, start: int, end: int, counts: QueryCounts
    ) -> Generator[Request, Found, tuple[np.ndarray, np.ndarray]]:
        """Search rows [start, end): neighbors i64 and distances f32 [end - start, num_save].

        Raises:
            ConfigurationError: the embedder returns vectors that cannot be searched.
            CorruptFileError: the index returns ids that are not in the database.
        """
        query = read_in_batches(chunks, start, end, BATCH, counts)
        return (yield from self.find(query, counts))

    def find(
        self, query: QueryBatch, counts: QueryCounts
    ) -> Generator[Request, Found, tuple[np.ndarray, np.ndarray]]:
        """Search chunks that have been read; see `batch`."""
        k = self._first_candidates(query)
        distances, candidates = yield query.vectors, k
        require_found(distances, candidates, self.database, query.known is not None)
        everything = np.arange(len(candidates))
        neighbors, kept, open_ = self._choose(query, everything, candidates, distances)
        total = len(self.database) if self.num_searched is None else self.num_searched
        while k < total:
            # Too few because many candidates are from the sample's own documents.
            short = np.flatnonzero(open_)
            if not len(short):
                break
            k = min(_MORE * k if k >= self.num_query else self.num_query, total)
            most = self.most_queries(k)
            for start in range(0, len(short), most):
                some = short[start : start + most]
                more, wider = yield query.vectors[some], k
                require_found(more, wider, self.database, may_be_empty=True)
                neighbors[some], kept[some], open_[some] = self._choose(query, some, wider, more)
        count_neighbors(self.database, query.tokens, neighbors, counts)
        return neighbors, kept

    def _first_candidates(self, query: QueryBatch) -> int:
        """Candidates per chunk in the first search; all if BM25 or known neighbors use all."""
        if not self.prefixes or self.rerank is not None or query.known is not None:
            return self.num_query
        return min(self.num_query, narrow_candidates(self.num_save))

    def _choose(
        self, query: QueryBatch, rows: np.ndarray, candidates: np.ndarray, distances: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose the neighbors of some rows among candidates [rows, k] and those known already.

        Returns:
            Neighbors and distances [rows, saved], and for which rows farther candidates may be
            among them, bool [rows].
        """
        selected = []
        for start in range(0, len(rows), BATCH):
            some = slice(start, start + BATCH)
            tokens = [query.tokens[row] for row in rows[some].tolist()]
            owners = rows_of(query.owners, rows[some])
            selected.append(self.select(tokens, candidates[some], distances[some], owners))
        ids, kept = (np.concatenate(parts) for parts in zip(*selected, strict=True))
        farther = (ids[:, -1] == NO_NEIGHBOR) & (candidates[:, -1] != NO_NEIGHBOR)
        if query.known is None:
            return ids, kept, farther
        found = [
            np.hstack([old[rows], new]) for old, new in zip(query.known, (ids, kept), strict=True)
        ]
        kept, ids = nearest(found[1], found[0], self.num_save)
        farther &= (ids[:, -1] == NO_NEIGHBOR) | (distances[:, -1] <= kept[:, -1])
        return ids, np.where(ids == NO_NEIGHBOR, np.float32(np.nan), kept), farther

    def select(
        self,
        chunks: Sequence[np.ndarray],
        candidates: np.ndarray,
        distances: np.ndarray,
        owners: Sequence[SampleRows],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Filter and order candidates [n, k], and keep `num_save`."""
        if self.rerank is None:
            return self.filter.select(candidates, distances, owners, self.num_save)
        allowed = ~self.filter.own(candidates, owners)
        candidates, distances = keep_first(candidates, distances, allowed, candidates.shape[1])
        candidates, distances = self.rerank.reorder(chunks, candidates, distances)
        return keep_first(candidates, distances, candidates >= 0, self.num_save)


def count_neighbors(
    database: ChunkDatabase,
    tokens: Sequence[np.ndarray],
    neighbors: np.ndarray,
    counts: QueryCounts,
) -> None:
    """Count chunks with too few neighbors, and chunks that found a copy of themselves.

    Args:
        database: The database that the neighbors are from.
        tokens: Tokens of each chunk.
        neighbors: Chunk ids [n, saved].
        counts: The counts are added to these.
    """
    for first in range(0, len(neighbors), BATCH):
        own, found = tokens[first : first + BATCH], neighbors[first : first + BATCH]
        counts.chunks_short += int((found[:, -1] == NO_NEIGHBOR).sum())
        counts.chunks_without += int((found[:, 0] == NO_NEIGHBOR).sum())
        copies = find_copies(database, own, found)
        counts.nearest_is_copy += int(copies[:, 0].sum())
        counts.copy_found += int(copies.any(axis=1).sum())
        near = find_near_copies(database, own, found) | copies[:, :FIRST]
        counts.near_copy_found += int(near.any(axis=1).sum())


def count_queried(shards: Sequence[Shard]) -> QueryCounts:
    """Add up the counts in a split's files; files of older versions have none."""
    counts = QueryCounts()
    for shard in shards:
        counts.add(read_counts(distances_path(shard)))
    return counts


def require_found(
    distances: np.ndarray, ids: np.ndarray, database: ChunkDatabase, may_be_empty: bool = False
) -> None:
    """Reject impossible results of an index.

    Args:
        distances: f32 [n, k].
        ids: i64 [n, k].
        database: The database that the ids belong to.
        may_be_empty: Whether all rows may be empty, as in a repeated search for rows that found
            nothing.

    Raises:
        CorruptFileError: ids are beyond the database, distances are NaN or infinite, or many rows
            are all empty, as in an index of NaN or infinite vectors.
    """
    there = ids != NO_NEIGHBOR
    if not ((ids[there] >= 0) & (ids[there] < len(database))).all():
        foreign = ids[there & ((ids < 0) | (ids >= len(database)))][0]
        found = f"the index holds chunk {foreign}, which the database of {len(database)} has not"
    elif not np.isfinite(distances[there]).all():
        found = "the index gives distances that are NaN or infinite"
    elif len(ids) >= _MANY and not there.any() and not may_be_empty:
        found = f"the index finds nothing for {len(ids)} query chunks"
    else:
        return
    raise CorruptFileError(database.path, found, "Build the index of this database again")


#: The searches of one shard.
Steps = Generator[Request, Found, None]


def query_split(
    neighbor_search: NeighborSearch,
    chunks: QueryChunks,
    index: Any,
    shards: Sequence[Shard],
    fingerprint: str,
    description: str,
) -> ShardReport:
    """Search and save the neighbors of every chunk of a split, on all ranks.

    Args:
        neighbor_search: The search.
        chunks: Chunks of the split.
        index: The database's index; a SharedIndex if ranks share it.
        shards: Ranges of rows (chunks).
        fingerprint: Fingerprint of the inputs of the neighbors.
        description: Label of the progress bar.
    """

    row_bytes = (8 + 4) * neighbor_search.num_save
    missing, report = missing_shards(shards, fingerprint, description, row_bytes, distances_path)
    if isinstance(index, SharedIndex):
        _query_together(neighbor_search, chunks, index, missing, fingerprint, description)
        return report

    def build(group: Sequence[Shard]) -> None:
        answer(neighbor_search.shards(chunks, group, fingerprint), index)

    groups = group_shards(missing, neighbor_search.together, get_world_size())
    run_groups(groups, build, description)
    return report


def _query_together(
    neighbor_search: NeighborSearch,
    chunks: QueryChunks,
    index: SharedIndex,
    shards: Sequence[Shard],
    fingerprint: str,
    description: str,
) -> None:
    """Build each shard on one rank, while all ranks search each other's queries in lockstep."""
    own = shards[get_rank() :: get_world_size()]
    hidden = get_rank() != 0 or not own

    def mine() -> Steps:
        # Ranks take turns, so the first rank's shards show how far all are.
        with Progress(description, len(own), hidden=hidden) as progress:
            for group in group_shards(own, neighbor_search.together):
                yield from neighbor_search.shards(chunks, group, fingerprint)
                progress.update(len(group))

    steps, found = mine(), None
    nothing = np.empty((0, index.d), np.float32), 0
    while True:
        request: Request | None = None
        with raise_together():
            try:
                request = next(steps) if found is None else steps.send(found)
            except StopIteration:
                steps, found = _no_steps(), None
        if not any_rank(request is not None):
            return
        reply = index.search_together(*(request or nothing))
        found = reply if request is not None else None


def join_searches(parts: Iterable[Steps], most_queries: Callable[[int], int]) -> Steps:
    """Run several generators of requests together, and join their requests to larger ones.

    A larger search is faster where an index reads its lists once per search. Its result for a query
    does not depend on the other queries.

    Args:
        parts: The generators.
        most_queries: Most queries of a joined request, by its k.
    """
    with ExitStack() as opened:
        waiting: list[tuple[Steps, Request]] = []
        for steps in parts:
            opened.callback(steps.close)
            waiting += _advance(steps, None)
        while waiting:
            k = min(k for _, (_, k) in waiting)
            now: list[tuple[Steps, np.ndarray]] = []
            later: list[tuple[Steps, Request]] = []
            room = most_queries(k)
            for steps, (vectors, wanted) in waiting:
                if wanted == k and (not now or len(vectors) <= room):
                    now.append((steps, vectors))
                    room -= len(vectors)
                else:
                    later.append((steps, (vectors, wanted)))
            distances, ids = yield np.concatenate([vectors for _, vectors in now]), k
            first, waiting = 0, later
            for steps, vectors in now:
                here = slice(first, first + len(vectors))
                waiting += _advance(steps, (distances[here], ids[here]))
                first = here.stop


def _advance(steps: Steps, found: Found | None) -> list[tuple[Steps, Request]]:
    """The next request of `steps`; nothing if they have ended."""
    try:
        return [(steps, next(steps) if found is None else steps.send(found))]
    except StopIteration:
        return []


def _no_steps() -> Steps:
    yield from ()


def answer(steps: Generator[Request, Found, Any], index: Any) -> Any:
    """Search whatever `steps` requests; returns its result."""
    try:
        request = next(steps)
        while True:
            request = steps.send(search(index, *request))
    except StopIteration as end:
        return end.value


def distances_path(shard: Shard) -> Path:
    """File of the distances of a file of neighbors."""
    # A separate folder, since other readers read every .hdf5 file next to the neighbors as
    # neighbors.
    return shard.path.parent / "distances" / shard.path.name
