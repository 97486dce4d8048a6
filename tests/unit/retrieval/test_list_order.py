"""Search in list order: the neighbors of index.search, each list read once."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.index import (
    Embeddings,
    add_part,
    add_to_index,
    centers,
    cut_parts,
    kind_of,
    library,
    list_order,
    list_scores,
    load_index,
    load_parts,
    merge_on_disk,
    rough_scores,
    save_index,
    search,
    train_index,
)
from retro_mcore.retrieval.index.candidates import NearestCandidates, width_of
from retro_mcore.retrieval.index.faiss_search import PartedIndex
from retro_mcore.retrieval.index.filling import add_rows
from retro_mcore.retrieval.index.library import faiss_library, faiss_threads
from retro_mcore.retrieval.index.list_order import ListOrderSearch, supports_list_order
from retro_mcore.retrieval.index.list_scores import candidates_within, squared_differences
from retro_mcore.retrieval.index.rough_scores import Queries, VectorScores
from retro_mcore.retrieval.index.shared import SharedIndex
from tests.unit.data.projects import write_rows

DIMENSION, LISTS = 16, 8
FLAT = "IVF8,Flat"
STRINGS = [
    FLAT,
    "IVF8_HNSW4,Flat",
    "IVF8_HNSW4,SQfp16",
    "IVF8,SQ8",
    "IVF8,PQ4x4",
    "OPQ4_8,IVF8_HNSW4,PQ4x4",
    "PCA8,IVF8,Flat",
]


@cache
def vectors(count: int = 2600) -> np.ndarray:
    """Clusters, with one vector 60 times."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(40, DIMENSION))
    rows = centers[random.integers(0, 40, count)] + 0.3 * random.normal(size=(count, DIMENSION))
    rows[count // 2 : count // 2 + 60] = rows[7]
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Per string: the folder of an empty index, a full one, its parts and one on the disk."""

    @cache
    def build(string: str):
        folder = tmp_path_factory.mktemp("index")
        embeddings = Embeddings(write_rows(vectors(), folder / "embeddings", 700))
        index = train_index(string, embeddings, np.arange(len(embeddings)))
        save_index(index, folder / "empty.faissindex")
        parts = cut_parts(folder / "parts", len(embeddings), kind_of(index), 1024)
        for part in parts:
            part.path.parent.mkdir(exist_ok=True)
            add_part(index, embeddings, part, part.path)
        index.reset()
        add_to_index(index, embeddings)
        save_index(index, folder / "full.faissindex")
        merge_on_disk(folder / "empty.faissindex", parts, folder / "disk.faissindex", "")
        return folder, parts

    return build


def opened(files, string: str, nprobe: int, where: str):
    folder, parts = files(string)
    if where == "parts":
        return load_parts(folder / "empty.faissindex", parts, nprobe)
    return load_index(folder / f"{where}.faissindex", nprobe)


def rounding(string: str) -> float:
    """Error of a squared distance in single precision.

    Vectors are up to 8 long, so squares are below 64 * 4, of which one part in 2^24 is lost in each
    of 16 sums. Flat lists are scored by one function, if no matrix comes before.
    """
    return 0.0 if string in (FLAT, "IVF8_HNSW4,Flat") else 256 * 16 * 2.0**-24


def assert_same(found, expected, string: str) -> None:
    """Distances within rounding, and ids but where distances tie within it."""
    slack = rounding(string)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=slack)
    np.testing.assert_array_equal(found[1] == NO_NEIGHBOR, expected[1] == NO_NEIGHBOR)
    for distances, ids, wanted in zip(*found, expected[1], strict=True):
        clear = distances < distances[-1] - 2 * slack
        assert not np.setdiff1d(ids[clear], wanted).size
        tied = np.flatnonzero(distances[1:] == distances[:-1])
        assert ((ids[tied + 1] > ids[tied]) | (ids[tied + 1] == NO_NEIGHBOR)).all()


@pytest.mark.parametrize("where", ["full", "disk", "parts"])
@pytest.mark.parametrize("string", STRINGS)
def test_the_neighbors_are_those_of_the_index(files, string, where):
    queries = np.concatenate([vectors()[::26], vectors()[::26] + 0.05])
    for nprobe, k in ((1, 400), (3, 20), (50, 1)):
        index = opened(files, string, nprobe, where)
        assert supports_list_order(index)
        found = ListOrderSearch(index).search(queries, k)
        assert_same(found, search(index, queries, k), string)


def test_without_ties_flat_lists_give_the_same_bytes(files):
    queries = vectors()[::7] + np.float32(0.01)
    index = opened(files, FLAT, 3, "full")
    distances, ids = search(index, queries, 10)
    found = ListOrderSearch(index).search(queries, 10)
    clear = (np.diff(distances) > 0).all(axis=1)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(found[0], distances)
    np.testing.assert_array_equal(found[1][clear], ids[clear])


@pytest.mark.parametrize("codes", ["Flat", "SQ8", "PQ4x4"])
def test_a_graph_over_the_lists_hides_none_of_them(codes):
    """A graph of two neighbors misses the nearest center of some vectors."""
    faiss, rows = faiss_library(), np.unique(vectors(), axis=0)
    index = train_index_of(f"IVF200_HNSW2,{codes}", rows)
    index.add(rows)
    by_graph = lists_of(index)
    index.reset()
    add_rows(index, rows, np.arange(len(rows)))
    graph, flat = faiss.downcast_index(index.quantizer), faiss.IndexFlatL2(DIMENSION)
    flat.add(graph.reconstruct_n(0, 200))
    nearest = flat.search(rows, 1)[1][:, 0]
    assert (by_graph != nearest).any()
    np.testing.assert_array_equal(lists_of(index), nearest)

    index.nprobe, graph.hnsw.efSearch = 4, 4
    through_graph = search(index, rows[::5], 10)
    found = ListOrderSearch(index).search(rows[::5], 10)
    index.quantizer = flat
    expected = search(index, rows[::5], 10)
    assert (through_graph[1] != expected[1]).any()
    assert_same(found, expected, f"IVF200,{codes}")
    index.quantizer = graph


def train_index_of(string: str, rows: np.ndarray):
    """An empty index trained on rows."""
    index = faiss_library().index_factory(DIMENSION, string)
    index.train(rows)
    return index


def lists_of(index) -> np.ndarray:
    """List of each vector."""
    lists = np.empty(index.ntotal, np.int64)
    for number in range(index.nlist):
        if size := index.invlists.list_size(number):
            lists[faiss_library().rev_swig_ptr(index.invlists.get_ids(number), size)] = number
    return lists


def test_of_equal_vectors_the_lowest_ids_are_found(files):
    index = opened(files, FLAT, LISTS, "full")
    distances, ids = ListOrderSearch(index).search(vectors()[7:8], 5)
    half = len(vectors()) // 2
    assert ids.tolist() == [[7, half, half + 1, half + 2, half + 3]]
    assert not distances.any()


@pytest.mark.parametrize("string", [FLAT, "OPQ4_8,IVF8_HNSW4,PQ4x4"])
def test_batches_rounds_and_threads_do_not_change_a_byte(files, string, monkeypatch):
    index = opened(files, string, 3, "full")
    expected = ListOrderSearch(index).search(vectors()[:300], 30)
    monkeypatch.setattr(list_order, "_VECTORS", 100)
    monkeypatch.setattr(list_order, "_QUERIES", 16)
    monkeypatch.setattr(list_order, "_MEMORY_SHARE", 0.0)  # one round
    for threads, batch in ((1, 1), (3, 77), (3, 300)):
        pool = ThreadPoolExecutor(
            threads, initializer=faiss_library().omp_set_num_threads, initargs=(1,)
        )
        monkeypatch.setattr(list_order, "worker_threads", lambda pool=pool: pool)
        starts = range(0, 300 if batch > 1 else 5, batch)
        rows = [vectors()[:300][start : start + batch] for start in starts]
        parts = [ListOrderSearch(index).search(part, 30) for part in rows]
        for part, whole in zip(zip(*parts, strict=True), expected, strict=True):
            joined = np.concatenate(part)
            assert joined.tobytes() == whole[: len(joined)].tobytes()


@pytest.mark.parametrize("string", ["Flat", "SQ8", "PQ4x4np", "OPQ4_8,PQ4x4np", "PCA8,Flat"])
def test_an_index_without_lists_is_searched_in_blocks(products, string, tmp_path, monkeypatch):
    """The neighbors of `index.search`; batches and places in them do not change a byte."""
    monkeypatch.setattr(list_order, "_VECTORS_OF_WHOLE", 300)
    monkeypatch.setattr(list_order, "multiplies_int8_fast", lambda: products == "int8")
    assert list_order.obstacle(string, None) is None
    index = train_index_of(string, vectors())
    index.add(vectors())
    save_index(index, tmp_path / "index.faissindex")
    index = load_index(tmp_path / "index.faissindex", mapped=True)
    queries = np.concatenate([vectors()[::26], vectors()[::26] + 0.05])
    for k in (400, 20, 1):
        found = ListOrderSearch(index).search(queries, k)
        assert_same(found, search(index, queries, k), string)
    parts = [ListOrderSearch(index).search(queries[start:][:77], 1) for start in (0, 77, 154)]
    for one, whole in zip(zip(*parts, strict=True), found, strict=True):
        assert np.concatenate(one).tobytes() == whole.tobytes()
    joined = ListOrderSearch(PartedIndex([index, index], [0, len(vectors())])).search(queries, 2)
    np.testing.assert_array_equal(joined[0][:, 0], found[0][:, 0])
    empty = train_index_of(string, vectors())
    assert (ListOrderSearch(empty).search(queries, 3)[1] == NO_NEIGHBOR).all()


def test_vectors_that_are_not_finite_are_neighbors_of_none(files):
    index = opened(files, FLAT, LISTS, "full")
    wrong = np.full((3, DIMENSION), np.nan, np.float32)
    wrong[1:, 0], wrong[1:, 1:] = np.inf, 0
    inner = faiss_library().extract_index_ivf(index)
    inner.add_sa_codes(_codes(0, wrong), np.arange(3))
    found = ListOrderSearch(index).search(vectors()[:50], 10)
    np.testing.assert_array_equal(found[0], search(index, vectors()[:50], 10)[0])
    assert np.isfinite(found[0]).all()


def _codes(number: int, rows: np.ndarray) -> np.ndarray:
    """Codes of a Flat list: its number in a byte, then the vectors."""
    return np.concatenate([np.full((len(rows), 1), number, np.uint8), rows.view(np.uint8)], axis=1)


def test_too_few_vectors_no_queries_and_an_empty_index(files):
    index = opened(files, FLAT, 1, "full")
    distances, ids = ListOrderSearch(index).search(vectors()[:4], 2000)
    assert (ids[:, -1] == NO_NEIGHBOR).all()
    np.testing.assert_array_equal(distances, index.search(vectors()[:4], 2000)[0])
    empty = load_index(files(FLAT)[0] / "empty.faissindex")
    assert (ListOrderSearch(empty).search(vectors()[:4], 3)[1] == NO_NEIGHBOR).all()
    assert [part.shape for part in ListOrderSearch(index).search(vectors()[:0], 3)] == [(0, 3)] * 2


def test_parts_with_ids_of_their_own_are_joined(files):
    index = opened(files, FLAT, LISTS, "full")
    parted = PartedIndex([index, index], [0, len(vectors())])
    found = search(ListOrderSearch(parted), vectors()[:20], 6)
    np.testing.assert_array_equal(found[0], search(parted, vectors()[:20], 6)[0])
    assert (found[1][:, 0] == search(index, vectors()[:20], 1)[1][:, 0]).all()
    few = PartedIndex([index, index], [0, len(vectors())])
    index.nprobe = 1  # too few are found
    for one, other in zip(
        search(ListOrderSearch(few), vectors()[:4], 5000),
        few.search(vectors()[:4], 5000),
        strict=True,
    ):
        np.testing.assert_array_equal(np.sort(one, axis=1), np.sort(other, axis=1))


@pytest.mark.parametrize(
    ("string", "supported"),
    [(FLAT, True), ("Flat", True), ("PCA8,SQ8", True), ("HNSW8,Flat", False),
     ("IVF8,PQ4x4fs", False), ("PQ4x4fs", False), ("IVF8,Flat,RFlat", False)],
)  # fmt: skip
def test_which_indexes_are_searched_in_list_order(string, supported):
    index = faiss_library().index_factory(DIMENSION, string)
    assert supports_list_order(index) == supported
    for each in (index, PartedIndex([index], [0])):
        with nullcontext() if supported else pytest.raises(ConfigurationError, match="list order"):
            ListOrderSearch(each)


def test_inner_products_are_left_to_the_index():
    faiss = faiss_library()
    for string in (FLAT, "Flat"):
        index = faiss.index_factory(DIMENSION, string, faiss.METRIC_INNER_PRODUCT)
        assert not supports_list_order(index)


@pytest.fixture(params=["fp32", "int8"])
def products(request, monkeypatch):
    """How queries are scored: in single precision, or rounded to int8, however few they are."""
    rounded = request.param == "int8"
    monkeypatch.setattr(list_order, "ROUNDED_FROM", 1)
    if rounded and not rough_scores.multiplies_int8_fast():

        def product(left, right):  # the same numbers, slowly
            return torch.from_numpy(left).int() @ torch.from_numpy(right).int().T

        monkeypatch.setattr(rough_scores, "int8_product", product)
    monkeypatch.setattr(centers, "multiplies_int8_fast", lambda: rounded)
    return request.param


def candidates(products, queries, limits, rows, k, center=None, origin=None):
    """Candidates among rows + center."""
    if products == "fp32":
        origin = None
    elif origin is None:
        origin = np.zeros(rows.shape[1], np.float32)
    prepared = Queries.of(queries, origin)
    scores = VectorScores(rows, center, origin)
    every = np.arange(len(queries))
    return candidates_within(prepared, every, limits, scores, k)


def cloud(name: str) -> np.ndarray:
    """Rows f32 [500, DIMENSION]."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(500, DIMENSION))
    if name == "far":  # products round by more than the distances between vectors
        rows = 100 + 1e-3 * rows
    elif name == "outliers":
        rows[::50] *= 1000
    elif name == "zeros":
        rows[::3] = 0
    elif name == "tiny":
        rows *= 1e-15
    return rows.astype(np.float32)


@pytest.mark.parametrize("name", ["plain", "far", "outliers", "zeros", "tiny"])
@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_rounding_hides_no_neighbor(products, name, middle, centered):
    rows = cloud(name)
    center = rows[3] / 2 if centered else None
    queries, unlimited = rows[::10].copy(), np.full(50, np.inf, np.float32)
    if centered:
        rows = rows - center
    mine = queries - center if centered else queries
    pairs = np.divmod(np.arange(50 * 500), 500)
    exact = squared_differences(mine, pairs[0], rows, pairs[1]).reshape(50, 500)
    limits = np.sort(exact, axis=1)[:, 4]
    origin = rows.mean(axis=0) + (center if centered else 0) if middle else None
    for bound in (limits, unlimited):
        counts, distances, positions = candidates(products, queries, bound, rows, 5, center, origin)
        owners = np.repeat(np.arange(50), counts)
        there = np.zeros_like(exact, bool)
        there[owners, positions] = True
        np.testing.assert_array_equal(distances, exact[owners, positions])
        if name != "zeros":
            assert there[exact <= limits[:, None]].all()
        else:  # of equal distances, the first ones
            order = np.argsort(exact, axis=1, kind="stable")[:, :5]
            assert np.take_along_axis(there, order, 1).all()


@pytest.mark.parametrize("products", ["int8"], indirect=True)
@pytest.mark.parametrize("string", STRINGS)
def test_products_in_int8_give_the_same_bytes(files, string, monkeypatch, products):
    index = opened(files, string, 3, "full")
    queries = np.concatenate([vectors()[::26], vectors()[::26] + 0.05])
    rounded = ListOrderSearch(index).search(queries, 20)
    monkeypatch.setattr(centers, "multiplies_int8_fast", lambda: False)
    exact = ListOrderSearch(index).search(queries, 20)
    for found, expected in zip(rounded, exact, strict=True):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("products", ["int8"], indirect=True)
def test_bounds_that_tell_nothing_are_replaced(products):
    """Rounded to int8 from a far origin, all of these vectors look the same."""
    rows = 10 + cloud("plain") / 10
    unlimited = np.full(500, np.inf, np.float32)
    looked_at = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_scores, "squared_differences", counting(looked_at))
        candidates(products, rows, unlimited, rows, 5)
    assert sum(looked_at) < 500 * 500 / 2


@pytest.mark.parametrize("products", ["int8"], indirect=True)
def test_exact_scores_leave_rough_ones_their_bounds(products):
    """Vectors near zero, rounded from far: exact scores replace those of the first queries."""
    random = np.random.default_rng(0)
    origin = np.zeros(64, np.float32)
    origin[0] = 1
    rows = (1e-6 * random.normal(size=(2000, 64))).astype(np.float32)
    near_rows = (1e-7 * random.normal(size=(32, 64))).astype(np.float32)
    near_origin = (origin + 1e-6 * random.normal(size=(32, 64))).astype(np.float32)
    queries = Queries.of(np.concatenate([near_rows, near_origin]), origin)
    scores, unlimited = VectorScores(rows, None, origin), np.full(32, np.inf, np.float32)
    for first in (0, 32):
        which = np.arange(first, first + 32)
        counts, _, places = candidates_within(queries, which, unlimited, scores, 5)
        pairs = np.repeat(which, 2000), np.tile(np.arange(2000), 32)
        exact = squared_differences(queries.vectors, pairs[0], rows, pairs[1]).reshape(32, 2000)
        nearest = np.argsort(exact, axis=1, kind="stable")[:, :5]
        found = np.split(places, np.cumsum(counts)[:-1])
        for wanted, got in zip(nearest, found, strict=True):
            assert np.isin(wanted, got).all()


def test_vectors_of_one_dimension(products):
    faiss = faiss_library()
    rows = np.random.default_rng(0).normal(size=(1000, 1)).astype(np.float32)
    for string in ("IVF16,Flat", "IVF16_HNSW4,Flat"):
        index = faiss.index_factory(1, string)
        index.train(rows)
        add_rows(index, rows, np.arange(1000))
        index.nprobe = 16
        assert_same(ListOrderSearch(index).search(rows, 3), search(index, rows, 3), FLAT)


def counting(looked_at: list[int]):
    """`squared_differences` that notes how many were computed."""

    def compute(queries, places, vectors, columns):
        looked_at.append(len(places))
        return squared_differences(queries, places, vectors, columns)

    return compute


def test_a_query_that_is_not_finite_finds_nothing(products):
    rows = cloud("plain")
    queries = rows[:4].copy()
    queries[1, 0], queries[2, 0] = np.nan, np.inf
    counts, _, _ = candidates(products, queries, np.full(4, np.inf, np.float32), rows, 5)
    assert counts[[1, 2]].tolist() == [0, 0]
    assert (counts[[0, 3]] >= 5).all()


def test_candidates_may_come_in_any_order():
    random = np.random.default_rng(0)
    distances = random.integers(0, 9, (6, 400)).astype(np.float32)  # many ties
    ids = np.stack([random.permutation(400) for _ in range(6)])
    order = np.lexsort((ids, distances))[:, :25]
    for width in (3, 40, 400):
        best = NearestCandidates(8, 25)
        for start in range(0, 400, width):
            part = slice(start, start + width)
            rows = random.permutation(6)
            counts = np.full(6, distances[:, part].shape[1])
            best.add(rows + 1, counts, distances[rows, part].ravel(), ids[rows, part].ravel())
        found = best.result()
        np.testing.assert_array_equal(found[1][1:7], np.take_along_axis(ids, order, 1))
        np.testing.assert_array_equal(found[0][1:7], np.take_along_axis(distances, order, 1))
        assert (found[1][[0, 7]] == NO_NEIGHBOR).all()


@pytest.mark.parametrize(
    ("string", "nprobe", "pays"),
    [
        ("IVF4096,Flat", 32, True),
        ("OPQ64_128,IVF4M_HNSW32,PQ64", 4096, True),
        ("IVF131072_HNSW32,SQ8", 8, False),  # 4 queries per list
        ("IVF64,Flat", None, True),
        ("IVF64,PQ8x4fs", 8, False),
        ("Flat", None, False),
        ("IVF64,Flat,RFlat", 8, False),
    ],
)
def test_list_order_pays_where_lists_have_several_queries(string, nprobe, pays):
    assert list_order.list_order_pays(string, nprobe) == pays
    assert (list_order.obstacle(string, nprobe) is None) == (pays or string == "Flat")
    if pays and "4M" not in string:
        assert supports_list_order(faiss_library().index_factory(128, string))


@pytest.mark.parametrize("where", ["full", "parts"])
def test_queries_searched_together_fit_the_memory(files, where, monkeypatch):
    index = opened(files, FLAT, 3, where)
    assert list_order.queries_together(index, 20) == [0]
    wrapped = SharedIndex(ListOrderSearch(index), index.ntotal, DIMENSION)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(list_order, "available_memory", lambda: 1 << 30)
    few, many = list_order.queries_together(wrapped, 20, 1000)
    assert list_order._FEWEST_TOGETHER < many < few == list_order.TOGETHER
    monkeypatch.setattr(list_order, "_ENOUGH_PER_LIST", 1 << 40)
    searched = ListOrderSearch(index)
    held = searched.bytes_per_query(20) + 4 * DIMENSION + list_order._BESIDE
    for available, least in ((1 << 20, 4096), (100 << 20, 4096), (1 << 30, 4096), (64 << 30, None)):
        monkeypatch.setattr(list_order, "available_memory", lambda size=available: size)
        for ranks in (1, 2, 8):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
            (taken,) = list_order.queries_together(wrapped, 20)
            mine = available // ranks // 4 // held
            assert taken == max(4096, min(list_order.TOGETHER, mine)) or taken > list_order.TOGETHER
            assert taken <= max(4096, mine)
            assert (least is None) == (taken > list_order.TOGETHER)
    monkeypatch.setattr(list_order, "available_memory", lambda: 1 << 50)
    assert list_order.queries_together(wrapped, 20) == [8 * list_order.TOGETHER]
    assert list_order.queries_together(wrapped, 20, 5, most=100) == [100, 100]


def test_more_queries_are_taken_of_lists_that_do_not_stay_in_memory(files, monkeypatch):
    searched = ListOrderSearch(opened(files, FLAT, 3, "full"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(list_order, "available_memory", lambda: 1 << 40)
    assert list_order.queries_together(searched, 20) == [list_order.TOGETHER]  # lists have many
    monkeypatch.setattr(list_order, "_MEMORY_SHARE", 0.0)
    assert not searched.stay_in_memory()
    assert list_order.queries_together(searched, 20) == [8 * list_order.TOGETHER]


def test_a_rank_without_parts_does_not_limit_how_many_are_searched_together(monkeypatch):
    monkeypatch.setattr(list_order, "available_memory", lambda: 1 << 50)
    empty = SharedIndex(ListOrderSearch(PartedIndex([], [])), 100, DIMENSION)
    assert list_order.queries_together(empty, 20) == [8 * list_order.TOGETHER]


def test_many_copies_of_a_vector_are_few_candidates(products):
    rows = np.concatenate([np.tile(vectors()[:1], (300, 1)), vectors()[:100]])
    limits = np.full(4, np.inf, np.float32)
    counts, distances, positions = candidates(products, vectors()[:4], limits, rows, 3)
    assert (counts <= width_of(3)).all()
    assert distances[:3].tolist() == [0, 0, 0]
    assert positions[:3].tolist() == [0, 1, 2]


def test_worker_threads_leave_other_threads_as_they_are():
    def threads() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = threads()
    with faiss_threads(1):
        pool = library.worker_threads.__wrapped__()
    assert pool.submit(torch.get_num_threads).result() == 1
    assert threads() == before
    pool.shutdown()


def test_a_rank_without_parts_finds_nothing():
    distances, ids = search(PartedIndex([], []), vectors()[:3], 2)
    assert np.isinf(distances).all()
    assert (ids == NO_NEIGHBOR).all()
    assert ids.shape == (3, 2)
    empty = ListOrderSearch(PartedIndex([], []))
    assert empty.bytes_per_query(2) > 0
    for found, expected in zip(empty.search(vectors()[:3], 2), (distances, ids), strict=True):
        np.testing.assert_array_equal(found, expected)
