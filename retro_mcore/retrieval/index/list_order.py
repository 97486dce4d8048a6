"""Search of many queries in the order of an index's vectors: list by list, block by block.

`index.search` goes from query to query and reads a list as often as queries visit it. Here each
list is read once per batch, decoded once, and scored against all its queries as one matrix
product. The neighbors are those of `index.search`:

- The lists visited are those of the nearest centers. Where `index.search` follows a graph over
  them, it misses some. If there are so many that this is faster, the graph is followed here, too.
- Distances of Flat lists are computed by the same function, so they are equal to the bit. Those of
  coded lists are direct differences to the decoded vector, where Faiss sums in another order (SQ)
  or adds table entries (PQ). They agree within the rounding of single precision.
- Of several vectors at the distance of the k-th, those of lower ids are kept. `index.search` keeps
  those that it meets first.

A distance depends on its query and its vector alone. So the result has the same bytes on any
number of threads and ranks, and however queries are divided into batches.

An index without lists is one list that every query visits. (Faiss's own search of it takes all
distances from matrix products, so their last bits depend on the other queries of a call.)
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from retro_mcore import launcher
from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.distributed import gather, get_world_size
from retro_mcore.errors import ConfigurationError
from retro_mcore.host import available_memory
from retro_mcore.retrieval.index.candidates import NearestCandidates, width_of
from retro_mcore.retrieval.index.centers import MOST_COMPARED, Centers
from retro_mcore.retrieval.index.faiss_search import PartedIndex
from retro_mcore.retrieval.index.library import faiss_library, share_of_cores, worker_threads
from retro_mcore.retrieval.index.list_scores import (
    InvertedLists,
    WholeIndex,
    candidates_within,
)
from retro_mcore.retrieval.index.rough_scores import (
    ROUNDED_FROM,
    Queries,
    VectorScores,
    multiplies_int8_fast,
    squared_lengths,
)
from retro_mcore.retrieval.index.training import QUANTIZERS, innermost
from retro_mcore.retrieval.index.transforms import transformed

#: Kinds of lists that are searched in their order.
_LISTS = ("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ")
#: Kinds of indexes without lists that are searched block by block.
_WHOLE = ("IndexFlat", "IndexFlatL2", "IndexScalarQuantizer", "IndexPQ")
#: Factory strings of both.
_CODES = r"(Flat|SQ\w+|PQ\d+(x\d+)?(np)?)$"
_STRING = re.compile(r"(^|,)IVF(?P<count>\d+)(?P<unit>[kM]?)(_HNSW\d+)?," + _CODES)
_WHOLE_STRING = re.compile(r"((OPQ\d+(_\d+)?|PCA\w?\d+|RR\d+|L2norm)," + ")*" + _CODES)
#: Vectors of an index without lists whose mean is the origin that queries are rounded from.
_AVERAGED = 4096
#: Queries that are searched together where memory allows it, the memory that they may take, and the
#: share of the available memory that they never exceed.
TOGETHER, _MEMORY, _MEMORY_SHARE_OF_QUERIES = 65_536, 2 << 30, 0.25
#: Queries that are searched together on any machine: the caller reads as many at a time.
_FEWEST_TOGETHER = 4096
#: Queries of one search at most, as a kill loses all of them.
_MOST_TOGETHER = 8 * TOGETHER
#: Queries of a list from which on more of them save little: to read a list takes as long as to
#: compare it with some 200 queries.
_ENOUGH_PER_LIST = 1536
#: From this many queries per list on, list order is faster.
_QUERIES_PER_LIST = 8
#: Queries whose lists are chosen at a time.
_BLOCK = 1024
#: Vectors of a list, and queries, that are scored in one piece of work.
_VECTORS, _QUERIES = 8192, 4096
#: Vectors of one piece of work in an index without lists, which has enough queries for larger
#: products: measured.
_VECTORS_OF_WHOLE = 2048
#: Centers that are compared in fp32 in the time in which a graph looks at one. (In int8 it is three
#: times as many. But which lists are visited must not depend on the processor.)
_CENTERS_PER_STEP = 128
#: Lists up to this share of the available memory stay in it between two rounds.
_MEMORY_SHARE = 0.5
#: Shares of the available memory for more queries: where lists stay in memory, and where more
#: queries are all that makes them be read less often.
_QUERIES_SHARE, _QUERIES_SHARE_ON_DISK = 1 / 16, 0.25
#: Bytes of a query beside its vectors, lists and candidates: its tokens, and what is filtered.
_BESIDE = 1024


class _Work(NamedTuple):
    """Vectors [start, end) of a list, and the queries that visit it."""

    number: int
    start: int
    end: int
    queries: np.ndarray


class ListOrderSearch:
    """An index whose inverted lists are read once per search, however many queries there are.

    Memory: the queries, 1.75 k candidates of each, and a few pieces of lists.

    Args:
        index: An index that `supports_list_order`, or a PartedIndex of such.

    Raises:
        ConfigurationError: it is another kind of index.
    """

    def __init__(self, index: Any) -> None:
        self.ntotal = index.ntotal
        self._parted = isinstance(index, PartedIndex)
        self._parts = index.parts if self._parted else [index]
        self._offsets = index.offsets if self._parted else [0]
        if not supports_list_order(index):
            kinds = {type(_inner(part)).__name__ for part in self._parts}
            raise ConfigurationError(
                "search in list order",
                f"an index of kind {', '.join(sorted(kinds))}",
                "Expected Flat, SQ or PQ codes for L2 distances; use `index.search`",
            )
        self.d = self._parts[0].d if self._parts else 0

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search the k nearest vectors of each query; see `faiss_search.search`."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        nearest = NearestCandidates(len(vectors), k)
        if len(vectors) and k:
            for part, offset in zip(self._parts, self._offsets, strict=True):
                _search(part, vectors, k, nearest, offset)
        distances, ids = nearest.result()
        if self._parted:
            distances[ids == NO_NEIGHBOR] = np.inf  # as PartedIndex returns them
        return distances, ids

    def bytes_per_query(self, k: int) -> int:
        """Memory of a query: its vector, lists, candidates and neighbors."""
        ivfs = filter(_has_lists, map(innermost, self._parts))
        probes = max([int(ivf.nprobe) for ivf in ivfs], default=0)
        return 9 * self.d + 8 * probes + 12 * (width_of(k) + k)

    def enough_queries(self) -> int:
        """Queries from which on more of them are hardly searched faster, if lists are in memory."""
        inner = map(innermost, self._parts)
        enough = [
            enough_queries(index.nlist, index.nprobe) if _has_lists(index) else TOGETHER
            for index in inner
        ]
        return max(enough, default=_MOST_TOGETHER)  # a rank without parts sets no limit to others

    def stay_in_memory(self) -> bool:
        """Whether the lists stay in memory while they are read again and again."""
        return _fit(sum(_bytes(innermost(part)) for part in self._parts))


def _search(
    index: Any, vectors: np.ndarray, k: int, nearest: NearestCandidates, offset: int
) -> None:
    """Add what one index finds; its ids count from `offset`."""
    inner = innermost(index)
    lists: InvertedLists | WholeIndex
    if _has_lists(inner):
        lists, count, columns, most = InvertedLists(inner), inner.nlist, _rounds(inner), _VECTORS
        queries, visited, origin = choose_lists(index, inner, vectors)
    else:
        lists, count, columns, most = WholeIndex(inner), 1, [slice(None)], _VECTORS_OF_WHOLE
        origin = _origin(lists)
        queries = _prepared(index, vectors, origin)
        visited = np.zeros((len(vectors), 1), np.int32)

    def find(work: _Work) -> tuple[np.ndarray, ...]:
        return _find(lists, work, queries, origin, nearest.limits[work.queries], k)

    for some in columns:
        pieces = _cut(lists, visited[:, some], count, most)
        for rows, counts, distances, ids in _in_turn(find, pieces):
            nearest.add(rows, counts, distances, ids + offset)


def list_order_pays(index_string: str, nprobe: int | None) -> bool:
    """Whether an index with lists is searched faster in their order; see `obstacle`."""
    return has_lists(index_string) and obstacle(index_string, nprobe) is None


def has_lists(index_string: str) -> bool:
    """Whether a Faiss factory string names an index of lists that can be searched in their order,
    with `TOGETHER` queries at a time."""
    return _STRING.search(index_string) is not None


def obstacle(index_string: str, nprobe: int | None) -> str | None:
    """Why many queries are searched one by one instead of in the order of the index; None: not.

    List order takes several of `TOGETHER` queries per list, which share its reading and decoding.
    An index without lists is read by all of them. (Its search in blocks is about as fast as
    Faiss's, but its distances do not depend on other queries.)

    Args:
        index_string: Faiss factory string.
        nprobe: Lists that each query visits; None: 1.
    """
    if _WHOLE_STRING.match(index_string):
        return None
    found = _STRING.search(index_string)
    if found is None:
        return "only Flat, SQ and PQ codes, in lists or without, are searched in their order"
    count = int(found["count"]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[found["unit"]]
    if TOGETHER * min(nprobe or 1, count) < _QUERIES_PER_LIST * count:
        return f"of {TOGETHER} chunks, fewer than {_QUERIES_PER_LIST} visit each of its lists"
    return None


def queries_together(index: Any, *wanted: int, most: int | None = None) -> list[int]:
    """Queries that are searched in one call, on all ranks alike; for each number of neighbors.

    As many as 2 GiB of memory hold, up to `TOGETHER`, if they take no more than a quarter of this
    rank's part of the available memory (which the ranks of this machine divide), but at least 4096.
    Up to eight times as many where a smaller share of that part holds them: as many as make each
    list worth its reading, or all of these if lists are read from the disk. The result does not
    depend on it. All ranks must call this.

    Args:
        index: An index that `ProjectIndex.open` returned.
        wanted: Numbers of neighbors.
        most: No more queries than so many.

    Returns:
        0 if any rank does not search it in list order.
    """
    while hasattr(index, "local"):  # shared by ranks, or rescored
        index = index.local
    own = [0] * len(wanted)
    if isinstance(index, ListOrderSearch):
        memory = available_memory() // _ranks_here()
        own = [_queries_in(index, k, memory) for k in wanted]
    limit = _MOST_TOGETHER if most is None else most
    return [min(limit, *numbers) for numbers in zip(*gather(own), strict=True)]


def _queries_in(index: ListOrderSearch, k: int, memory: int) -> int:
    """Queries of one search on a rank whose part of the available memory is `memory`."""
    each = index.bytes_per_query(k)
    held = each + 4 * index.d + _BESIDE  # the caller holds the vectors, too
    usual = min(TOGETHER, _MEMORY // each, int(_MEMORY_SHARE_OF_QUERIES * memory) // held)
    share, worthwhile = _QUERIES_SHARE, index.enough_queries()
    if not index.stay_in_memory():
        share, worthwhile = _QUERIES_SHARE_ON_DISK, _MOST_TOGETHER
    return max(_FEWEST_TOGETHER, usual, min(worthwhile, int(share * memory) // held))


def _ranks_here() -> int:
    """Ranks of this machine; all if the launcher does not say how many."""
    return launcher.local_world_size(get_world_size())


def enough_queries(lists: int, nprobe: int) -> int:
    """Queries that are worth searching together, if memory holds them and the lists."""
    return max(TOGETHER, min(_MOST_TOGETHER, _ENOUGH_PER_LIST * lists // max(1, nprobe)))


def supports_list_order(index: Any) -> bool:
    """Whether `ListOrderSearch` can search an index."""
    if isinstance(index, PartedIndex):
        return all(supports_list_order(part) for part in index.parts)
    faiss = faiss_library()
    inner = _inner(index)
    if type(inner).__name__ in _WHOLE:
        return inner.metric_type == faiss.METRIC_L2
    return (
        type(inner).__name__ in _LISTS
        and type(faiss.downcast_index(inner.quantizer)).__name__ in QUANTIZERS
        and inner.metric_type == faiss.METRIC_L2
        and not inner.max_codes
    )


def _has_lists(index: Any) -> bool:
    return type(index).__name__ in _LISTS


def _inner(index: Any) -> Any:
    """The index below transforms if it is Faiss's, else itself."""
    return innermost(index) if isinstance(index, faiss_library().Index) else index


def choose_lists(
    index: Any, ivf: Any, vectors: np.ndarray
) -> tuple[Queries, np.ndarray, np.ndarray | None]:
    """Transform queries as the index does, choose their lists i32 [n, nprobe], and the origin.

    Lists are -1 where the quantizer found too few.
    """
    quantizer, probes = faiss_library().downcast_index(ivf.quantizer), min(ivf.nprobe, ivf.nlist)
    graph, most = getattr(quantizer, "hnsw", None), ivf.nlist
    if graph is not None:
        most = min(_CENTERS_PER_STEP * graph.efSearch, MOST_COMPARED)
    centers = Centers(quantizer, probes, most)
    starts = range(0, len(vectors), _BLOCK)

    def find(start: int) -> None:
        rows = np.arange(start, min(start + _BLOCK, len(vectors)))
        visited[rows] = centers.nearest(queries, rows)

    queries = _prepared(index, vectors, centers.origin)
    visited = np.empty((len(vectors), probes), np.int32)
    list(worker_threads().map(find, starts))
    return queries, visited, centers.origin


def _prepared(index: Any, vectors: np.ndarray, origin: np.ndarray | None) -> Queries:
    """Transform queries as the index does, and round them from the origin."""

    def prepare(start: int) -> Queries:
        return Queries.of(transformed(index, vectors[start : start + _BLOCK]), origin)

    starts = range(0, len(vectors), _BLOCK)
    return Queries.join(list(worker_threads().map(prepare, starts)))


def _origin(vectors: WholeIndex) -> np.ndarray | None:
    """A point amid the vectors; None where the processor gains nothing by rounding."""
    if not vectors.size(0) or not multiplies_int8_fast():
        return None
    some, _ = vectors.read(0, 0, min(_AVERAGED, vectors.size(0)))
    some = some[np.isfinite(some).all(axis=1)]
    return some.mean(axis=0) if len(some) and some.shape[1] > 1 else None


def _rounds(ivf: Any) -> list[slice]:
    """Columns of the visited lists that are searched in one round each.

    Each query's nearest list first: what it finds there rules out most of what is in the others.
    That reads a list twice, so lists that exceed the memory are searched in one round. The result
    is the same.
    """
    return [slice(0, 1), slice(1, None)] if _fit(_bytes(ivf)) else [slice(None)]


def _bytes(index: Any) -> int:
    """Bytes of all vectors, with their ids."""
    return index.ntotal * (index.code_size + 8)


def _fit(size: int) -> bool:
    return size <= _MEMORY_SHARE * available_memory()


def _cut(
    lists: InvertedLists | WholeIndex, visited: np.ndarray, count: int, most: int
) -> Iterator[_Work]:
    """Cut the search into pieces of work of at most so many vectors, list by list."""
    width = visited.shape[1]
    if not width:
        return
    # Faiss sorts in place only what has more elements than there are lists.
    owners = np.full((len(visited) + count // width + 2, width), count, np.int32)
    np.copyto(owners[: len(visited)], visited, where=visited >= 0)
    # Puts the row of each number in the place of the number.
    ends = faiss_library().matrix_bucket_sort_inplace(owners, nbucket=count + 1)
    owners = owners.reshape(-1)
    for number in np.flatnonzero(np.diff(ends[: count + 1])).tolist():
        queries = np.sort(owners[ends[number] : ends[number + 1]]).astype(np.int64)
        size = lists.size(number)
        for start in range(0, size, most):
            for first in range(0, len(queries), _QUERIES):
                end = min(start + most, size)
                yield _Work(number, start, end, queries[first : first + _QUERIES])


def _find(
    lists: InvertedLists | WholeIndex,
    work: _Work,
    queries: Queries,
    origin: np.ndarray | None,
    limits: np.ndarray,
    k: int,
) -> tuple[np.ndarray, ...]:
    """Candidates of one piece of work: queries, their counts, distances and ids."""
    vectors, ids = lists.read(work.number, work.start, work.end)
    center = lists.center(work.number)
    finite = np.isfinite(squared_lengths(vectors))
    if not finite.all():  # such vectors are neighbors of none
        vectors, ids = vectors[finite], ids[finite]
    if not len(ids):
        return work.queries[:0], np.empty(0, np.int64), np.empty(0, np.float32), ids
    few = len(work.queries) < ROUNDED_FROM
    scores = VectorScores(vectors, center, None if few else origin)
    counts, distances, positions = candidates_within(queries, work.queries, limits, scores, k)
    return work.queries, counts, distances, ids[positions]


def _in_turn(find: Any, pieces: Iterable[_Work]) -> Iterator[tuple[np.ndarray, ...]]:
    """Find candidates on all threads, a few pieces of work ahead of the one that is taken."""
    threads, most = worker_threads(), 2 * share_of_cores()
    ahead: deque[Future[tuple[np.ndarray, ...]]] = deque()
    for work in pieces:
        ahead.append(threads.submit(find, work))
        if len(ahead) > most:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
