"""The index: any factory string, in parts, on the disk, chosen for a memory and a recall."""

import logging
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import ConfigurationError, CorruptFileError
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder, count_texts, weights_of
from retro_mcore.retrieval.index import (
    Embeddings,
    HeldOut,
    IndexKind,
    RecallMeasure,
    add_part,
    add_to_index,
    choice,
    choose_index,
    cut_parts,
    faiss_search,
    kind_of,
    lists_path,
    load_index,
    load_parts,
    measure_recall,
    merge_on_disk,
    merge_parts,
    num_lists,
    parse_bytes,
    read_exact,
    save_index,
    search,
    set_search_breadth,
    train_index,
    training,
    tune,
    write_exact,
)
from retro_mcore.retrieval.index.breadth import sample_breadth
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.recall import (
    NUM_RESCORED,
    Recall,
    exact_neighbors,
    recall_at,
    without,
)
from retro_mcore.retrieval.index.training import innermost
from retro_mcore.retrieval.neighbor_search import NUM_QUERY
from tests.unit.data.projects import write_rows

DIMENSION = 16
STRINGS = {
    "Flat": IndexKind.CODES,
    "SQ8": IndexKind.CODES,
    "PCA8,SQ8": IndexKind.CODES,
    "IVF8,Flat": IndexKind.LISTS,
    "IVF8_HNSW4,SQ8": IndexKind.LISTS,
    "OPQ4_8,IVF8_HNSW4,PQ4x4": IndexKind.LISTS,
    "RaBitQ4": IndexKind.CODES,
    "RR,IVF8,RaBitQ4": IndexKind.LISTS,
    "IVF8,PQ4x4fs": IndexKind.PACKED,
    "OPQ4_8,IVF8_HNSW4,PQ4x4fs": IndexKind.PACKED,
    "RR,IVF8,RaBitQfs2": IndexKind.PACKED,
    "HNSW8,Flat": IndexKind.WHOLE,
    "PQ4x4fs": IndexKind.WHOLE,
    "IVF8,Flat,RFlat": IndexKind.WHOLE,
}


@cache
def vectors(count: int = 2600) -> np.ndarray:
    """Clusters, with some vectors several times."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(40, DIMENSION))
    rows = centers[random.integers(0, 40, count)] + 0.3 * random.normal(size=(count, DIMENSION))
    rows[count // 2 : count // 2 + 60] = rows[7]
    return rows.astype(np.float32)


@cache
def passages(count: int) -> np.ndarray:
    """Lexical embeddings of real text: passages of Python's help topics and sources."""
    import pydoc_data.topics

    texts = [words for text in pydoc_data.topics.topics.values() for words in _cut(text)]
    import asyncio
    import email
    import json
    import typing
    from pathlib import Path

    for module in (typing, json, email, asyncio):
        folder = Path(module.__file__).parent
        for path in sorted(folder.glob("*.py")):
            if len(texts) >= count:
                break
            texts += _cut(path.read_text(encoding="utf-8", errors="ignore"))
    texts = texts[:count]
    assert len(texts) == count
    return LexicalEmbedder(weights_of(count_texts(texts))).embed(texts)


def _cut(text: str) -> list[str]:
    words = re.findall(r"\S+", text)
    return [" ".join(words[start : start + 40]) for start in range(0, len(words), 40)]


def held_out(rows: np.ndarray, count: int = 50) -> HeldOut:
    """Every so many-th row, and as many new ones."""
    own = np.linspace(0, len(rows) - 1, count).astype(np.int64)
    new = (rows[own] + rows[own[::-1]]) / 2
    return HeldOut(
        np.concatenate([rows[own], new]), np.concatenate([own, np.full(count, NO_NEIGHBOR)])
    )


def fill(tmp_path, string: str, block_size: int = 1024) -> tuple:
    """Trained, filled in parts from last to first, and by one process."""
    embeddings = Embeddings(write_rows(vectors(), tmp_path / "embeddings", 700))
    trained = train_index(string, embeddings, np.arange(len(embeddings)))
    empty = tmp_path / "empty.faissindex"
    save_index(trained, empty)
    add_to_index(trained, embeddings)
    index = load_index(empty)
    parts = cut_parts(tmp_path / "parts", len(embeddings), kind_of(index), block_size)
    for part in parts[::-1]:
        part.path.parent.mkdir(exist_ok=True)
        add_part(index, embeddings, part, part.path)
    return trained, empty, parts


#: Encoded without a matrix product (or by one process): the same bytes, whatever the rows per call.
#: A product of another number of rows may round otherwise, which changes a code on a border.
EXACT = ("Flat", "SQ8", *(name for name, kind in STRINGS.items() if kind is IndexKind.WHOLE))


@pytest.mark.parametrize("string", STRINGS)
def test_an_index_merged_from_parts_is_that_of_one_process(tmp_path, string):
    serial, empty, parts = fill(tmp_path, string)
    assert kind_of(serial) is STRINGS[string]
    assert len(parts) == (1 if STRINGS[string] is IndexKind.WHOLE else 3)
    save_index(serial, tmp_path / "serial.faissindex")
    merge_parts(empty, parts, tmp_path / "merged.faissindex", "")
    merged, alone = tmp_path / "merged.faissindex", tmp_path / "serial.faissindex"
    if string in EXACT:
        assert merged.read_bytes() == alone.read_bytes()
        return
    assert merged.stat().st_size == alone.stat().st_size
    if kind_of(serial) is IndexKind.PACKED:
        return  # Faiss 1.15 cannot decode packed codes that were read: searched below
    rows = [stored(load_index(path)) for path in (merged, alone)]
    assert np.isclose(*rows, atol=1e-4).all(axis=1).mean() > 0.99


def stored(index) -> np.ndarray:
    """The vectors as an index holds them, by id."""
    from retro_mcore.retrieval.index.library import faiss_library

    if kind_of(index) is IndexKind.LISTS:
        faiss_library().extract_index_ivf(index).make_direct_map()
    return index.reconstruct_n(0, index.ntotal)


def merged_in_memory(tmp_path, empty, parts, nprobe=None):
    merge_parts(empty, parts, tmp_path / "merged.faissindex", "")
    return load_index(tmp_path / "merged.faissindex", nprobe)


def assert_same_neighbors(found, expected, atol=1e-4) -> None:
    """Distances within rounding, and the ids too but where distances are within it."""
    np.testing.assert_allclose(found[0], expected[0], atol=atol)
    for (distances, ids), (_, wanted) in (
        (rows, others)
        for rows, others in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True)
    ):
        clear = distances < distances[-1] - 2 * atol
        assert set(ids[clear].tolist()) <= set(wanted.tolist())
        equal = np.flatnonzero(distances[1:] == distances[:-1])
        assert ((ids[equal + 1] > ids[equal]) | (ids[equal + 1] < 0)).all()


@pytest.mark.parametrize("string", [name for name, k in STRINGS.items() if k is IndexKind.PACKED])
def test_packed_lists_are_searched_like_those_of_one_process(tmp_path, string):
    serial, empty, parts = fill(tmp_path, string)
    set_search_breadth(serial, 8, None)
    merged = merged_in_memory(tmp_path, empty, parts, 8)
    # Lookup tables of 8 bits: where one code differs by rounding, its distance does in steps.
    found, expected = search(merged, vectors()[:200], 1), search(serial, vectors()[:200], 1)
    assert np.isclose(found[0], expected[0], rtol=1e-3, atol=1e-3).mean() > 0.99
    assert type(innermost(merged)) is type(innermost(serial))


@pytest.mark.parametrize(
    "string", ["IVF8,Flat", "IVF8_HNSW4,SQ8", "RR,IVF8,RaBitQ4", "OPQ4_8,IVF8_HNSW4,PQ4x4"]
)
def test_lists_on_the_disk_are_searched_where_they_lie(tmp_path, string):
    serial, empty, parts = fill(tmp_path, string)
    folder = tmp_path / "index"
    merge_on_disk(empty, parts, folder / "added.faissindex", "")
    shutil.move(folder, tmp_path / "elsewhere")  # a project may be moved
    path = tmp_path / "elsewhere" / "added.faissindex"
    assert lists_path(path).stat().st_size == sum(len(vectors()) * n for n in _sizes(serial))
    assert path.stat().st_size < empty.stat().st_size + 500
    in_memory = search(merged_in_memory(tmp_path, empty, parts, 4), vectors()[:300], 20)
    for mapped in (True, False):
        found = search(load_index(path, 4, mapped=mapped), vectors()[:300], 20)
        assert_same_neighbors(found, in_memory)


def _sizes(index) -> tuple[int, int]:
    from retro_mcore.retrieval.index.training import innermost

    return innermost(index).code_size, 8


@pytest.mark.parametrize(
    "string", ["Flat", "SQ8", "IVF8,Flat", "IVF8_HNSW4,SQ8", "OPQ4_8,IVF8_HNSW4,PQ4x4"]
)
@pytest.mark.parametrize("k", [3, 200])
def test_parts_give_the_neighbors_of_the_whole(tmp_path, string, k):
    _, empty, parts = fill(tmp_path, string)
    probes = 4 if "IVF" in string else None
    merged = merged_in_memory(tmp_path, empty, parts, probes)
    expected = search(merged, vectors()[:200], k)
    # All parts in one process, and some of them in each of two, as ranks hold them.
    whole = search(load_parts(empty, parts, probes), vectors()[:200], k)
    ranks = [search(load_parts(empty, parts[i::2], probes), vectors()[:200], k) for i in (0, 1)]
    joined = [np.hstack(arrays) for arrays in zip(*ranks, strict=True)]
    for found in (whole, faiss_search.nearest(*joined, k)):
        assert_same_neighbors(found, expected)
    half = len(vectors()) // 2
    _, ids = search(merged, vectors()[half + 5 : half + 6], 3)  # one of 61 equal vectors
    assert set(ids[0].tolist()) <= {7, *range(half, half + 60)}


def test_the_number_of_threads_does_not_matter(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from retro_mcore.retrieval.index import filling
    from retro_mcore.retrieval.index.library import faiss_library

    results = []
    for threads in (1, 3):
        pool = ThreadPoolExecutor(
            threads, initializer=faiss_library().omp_set_num_threads, initargs=(1,)
        )
        for module in (faiss_search, filling):
            monkeypatch.setattr(module, "worker_threads", lambda pool=pool: pool)
        serial, _, _ = fill(tmp_path / str(threads), "IVF8,SQ8")
        distances, ids = search(serial, vectors()[:700], 50)
        save_index(serial, tmp_path / "index")
        results.append((distances.tobytes(), ids.tobytes(), (tmp_path / "index").read_bytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("string", ["Flat", "SQ8", "PQ8x4fs", "IVF4,PQ8x4fs", "IVF4,RaBitQfs"])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_what_lay_in_the_memory_of_the_results_does_not_matter(monkeypatch, string, k):
    """Fast scans read the first distance before they write any; the lowest lets them find none."""
    metrics = (faiss_library().METRIC_L2, faiss_library().METRIC_INNER_PRODUCT)
    limits = np.finfo(np.float32)
    for metric, worst in zip(metrics, (limits.min, limits.max), strict=True):
        index = faiss_library().index_factory(DIMENSION, string, metric)
        index.train(vectors())
        index.add(vectors())

        def filled(shape, dtype=float, worst=worst, **_):
            return np.full(shape, worst if np.dtype(dtype) == np.float32 else 0, dtype)

        for each in (index, faiss_search.PartedIndex([index], [0])):
            with monkeypatch.context() as patch:
                patch.setattr(np, "empty", filled)
                found = search(each, vectors()[:300], k)[1]
            assert (found[:, 0] >= 0).all()


def test_vectors_are_read_while_another_rank_writes_the_first_file(tmp_path):
    shards = write_rows(vectors(), tmp_path, 700)
    shards[0].path.unlink()
    np.testing.assert_array_equal(Embeddings(shards).rows(np.arange(700, 800)), vectors()[700:800])


@pytest.mark.parametrize(
    "string",
    ["Flat", "IVF8,Flat", "IVF4_HNSW4,Flat", "HNSW8,Flat", "NSG8,Flat", "IVF128(NSG8),Flat"],
)
def test_an_index_finds_its_vectors_and_its_recall_is_measured(tmp_path, string):
    embeddings = Embeddings(write_rows(vectors(), tmp_path, 700))
    index = train_index(string, embeddings, np.arange(len(embeddings)))
    add_to_index(index, embeddings)
    recall = measure_recall(index, embeddings, held_out(vectors()[:1000]))
    assert recall.at[2] >= 0.95
    assert (recall.num_queries, recall.num_held_out) == (100, 50)
    assert (recall.nprobe is None) == ("IVF" not in string)
    assert (recall.ef_search is None) == ("HNSW" not in string and "NSG" not in string)


def test_the_search_is_as_narrow_as_the_recall_allows(tmp_path):
    embeddings = Embeddings(write_rows(passages(3000), tmp_path, 700))
    index = train_index("IVF64,Flat", embeddings, np.arange(3000))
    add_to_index(index, embeddings)
    queries = held_out(passages(3000), 200)
    recalls = [measure_recall(index, embeddings, queries, target=t) for t in (0.7, 0.95, 1.0)]
    probes = [recall.nprobe for recall in recalls]
    assert probes == sorted(probes)
    assert probes[0] < probes[2] <= 64
    assert recalls[0].decisive >= 0.7
    assert recalls[1].decisive >= 0.95
    assert recalls[2].decisive == 1.0
    given = measure_recall(index, embeddings, queries, nprobe=3, target=1.0)
    assert given.nprobe == 3
    assert given.decisive <= recalls[2].decisive


@pytest.mark.parametrize(
    ("best", "error", "nprobe"),
    [
        (1.0, 0.0, 94),
        (1.0, 0.01, 101),  # for .96
        (0.955, 0.01, 165),  # .96 is out of reach: no margin
        (1.0, 0.045, 94),  # .995 would take 166
        (0.9, 0.01, 1024),  # .95 is out of reach
    ],
)
def test_a_margin_for_the_error_of_measurement_is_cheap_or_left_out(best, error, nprobe):
    def measure(nprobe, ef_search):
        recall = best * (1 - 2.0 ** (-nprobe / 21.7))
        return Recall({2: recall}, 100, 100, nprobe, ef_search, error)

    found = tune(measure, 1024, False, 0.95)
    assert nprobe <= found.nprobe <= nprobe * 17 // 16  # found within a sixteenth


@pytest.mark.parametrize("code", ["Flat", "SQ8"])
def test_lists_are_chosen_for_a_search_of_the_nearest_ones(tmp_path, code):
    """A poor graph over the lists misses some, which query_neighbors does not."""
    embeddings = Embeddings(write_rows(passages(3000), tmp_path, 700))
    index = train_index(f"IVF128_HNSW2,{code}", embeddings, np.arange(3000))
    add_to_index(index, embeddings)
    queries = held_out(passages(3000), 200)
    found = measure_recall(index, embeddings, queries)
    _, exact = exact_neighbors(embeddings, queries, Shard(0, 3000, Path()))
    in_order = RecallMeasure(index, queries, exact, embeddings, list_order=True)
    again = in_order(found.nprobe, found.ef_search)
    assert found.in_list_order == again.decisive >= 0.95
    assert 0 < found.error < 0.03
    by_graph = tune(RecallMeasure(index, queries, exact, embeddings), 128, True, 0.95)
    assert by_graph.in_list_order is None
    assert found.nprobe <= by_graph.nprobe


@pytest.mark.parametrize(("memory", "few"), [(None, False), (64 << 10, True)])
def test_training_says_how_many_vectors_it_uses(tmp_path, caplog, memory, few):
    caplog.set_level(logging.INFO)
    embeddings = Embeddings(write_rows(passages(2000), tmp_path, 700))
    train_index("IVF32,Flat", embeddings, np.arange(2000), memory)
    used = 2000 if memory is None else memory // (8 * embeddings.dimension)
    assert f"train index: on {used} of 2000 vectors" in caplog.text
    warning = f"--index-memory leaves {used} training vectors for 32 lists"
    assert (warning in caplog.text) == few


def test_exact_neighbors_of_parts_are_those_of_all(tmp_path):
    rows = vectors()[:1200]  # none twice
    embeddings = Embeddings(write_rows(rows, tmp_path, 700))
    queries = held_out(rows)
    paths = []
    for part in (Shard(0, 500, tmp_path), Shard(500, 1200, tmp_path)):
        paths.append(tmp_path / f"{part.start}.hdf5")
        write_exact(embeddings, queries, part, paths[-1], "")
    with pytest.raises(CorruptFileError, match="other held-out queries"):
        read_exact(paths, len(queries.rows) + 1)
    exact = read_exact(paths, len(queries.rows))
    distances = ((rows[None] - queries.vectors[:, None]) ** 2).sum(-1)
    own = queries.rows >= 0
    distances[own, queries.rows[own]] = np.inf
    found = np.take_along_axis(distances, exact, axis=1)
    # Squared lengths are about 20, and a search in single precision orders within their rounding.
    np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, :10], atol=1e-4)
    assert all(len(set(row)) == 10 for row in exact.tolist())


def test_three_vectors_are_enough(tmp_path):
    rows = np.eye(3, 4, dtype=np.float32)
    embeddings = Embeddings(write_rows(rows, tmp_path, 64))
    chosen = choose_index(embeddings, 1 << 30, 0.95)
    assert chosen.string == "Flat"
    index = train_index(chosen.string, embeddings, np.arange(3))
    add_to_index(index, embeddings)
    queries = HeldOut(rows, np.arange(3))
    assert measure_recall(index, embeddings, queries).at == {1: 1.0, 2: 1.0}
    assert search(index, rows[:1], 5)[1].tolist()[0][3:] == [NO_NEIGHBOR] * 2


@pytest.mark.parametrize("string", ["Flatt", "IVF64,Flat", "IVF4,PQ7"])
def test_an_index_string_that_cannot_work_is_named(tmp_path, string):
    rows = np.zeros((10, 8), np.float32)
    embeddings = Embeddings(write_rows(rows, tmp_path, 64))
    with pytest.raises(ConfigurationError, match="--index: "):
        train_index(string, embeddings, np.arange(10))


def test_a_truncated_index_is_named(tmp_path):
    (tmp_path / "index").write_bytes(b"IxF2")
    with pytest.raises(CorruptFileError, match=r"index: unreadable.*build_index"):
        load_index(tmp_path / "index")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24G", 24 << 30), ("1.5t", 3 << 39), ("512MiB", 512 << 20), ("100", 100), ("2 KB", 2048)],
)
def test_bytes_are_read_with_their_unit(text, expected):
    assert parse_bytes("--index-memory", text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1G", "many", "0", "1X"])
def test_bytes_that_are_none_are_named(text):
    with pytest.raises(ConfigurationError, match="--index-memory"):
        parse_bytes("--index-memory", text)


@pytest.mark.parametrize("dimension", [8, 16])
def test_lists_to_visit_are_expected_from_a_sample(dimension):
    """A larger database holds nearer neighbors, so a smaller share of its lists has to be visited:
    the share of the sample is three times too much."""
    vectors = np.random.default_rng(0).normal(size=(40_000, dimension)).astype(np.float32)
    count, sample = len(vectors), vectors[::4]
    needed = sample_breadth(vectors, count, 512).probes(0.95)
    of_sample = sample_breadth(sample, len(sample), 128).probes(0.95)
    expected = sample_breadth(sample, count, 512).probes(0.95)
    assert needed / 2 < expected < 2 * needed < 512 * of_sample / 128


def test_chunks_of_the_own_document_do_not_count_as_its_neighbors():
    """They are near, and in few lists; those of other documents are spread over many."""
    random = np.random.default_rng(0)
    topics = random.normal(size=(2000, 16))
    rows = np.repeat(topics, 6, axis=0) + 0.02 * random.normal(size=(12_000, 16))
    vectors, documents = rows.astype(np.float32), np.repeat(np.arange(2000), 6)
    alone = sample_breadth(vectors, 12_000, 128)
    others = sample_breadth(vectors, 12_000, 128, documents)
    assert 4 * alone.needed(0.95)[-1] < others.needed(0.95)[-1]
    assert alone.probes(0.95) < others.probes(0.95)
    of_documents = np.full(len(vectors), 7)
    assert sample_breadth(vectors, 12_000, 128, of_documents).probes(0.95) == 128  # none at all


class TestAutomaticIndex:
    """On real text, with the border to lists moved so that a small corpus crosses it."""

    count, recall = 2500, 0.95
    _uncompressed_bytes: int | None = None

    @pytest.fixture(autouse=True)
    def lists_from_a_thousand_on(self, monkeypatch):
        monkeypatch.setattr(choice, "_LARGEST_WITHOUT_LISTS", 1000)
        monkeypatch.setattr(choice, "_WORTHWHILE_SHARE", 1.0)

    @pytest.fixture
    def embeddings(self, tmp_path):
        return Embeddings(write_rows(passages(self.count), tmp_path / "embeddings", 1500))

    @classmethod
    def uncompressed_bytes(cls, embeddings) -> int:
        """Size of the index that is chosen where memory does not matter, found once."""
        if cls._uncompressed_bytes is None:
            cls._uncompressed_bytes = choose_index(embeddings, 1 << 30, cls.recall).num_bytes
        return cls._uncompressed_bytes

    def measured(self, embeddings, memory: int):
        """Chosen, built, and compared with exact search."""
        chosen = choose_index(embeddings, memory, self.recall)
        index = train_index(chosen.string, embeddings, np.arange(self.count))
        add_to_index(index, embeddings)
        queries = held_out(passages(self.count), 200)
        return chosen, measure_recall(index, embeddings, queries, target=self.recall)

    def test_it_reaches_the_recall_uncompressed(self, embeddings):
        chosen, recall = self.measured(embeddings, 1 << 30)
        assert re.fullmatch(r"IVF\d+,Flat", chosen.string)
        assert f"{self.count} vectors in" in chosen.reason
        assert recall.at[2] >= 0.95
        assert recall.nprobe < 256

    def test_lists_that_save_nothing_are_left_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(choice, "_WORTHWHILE_SHARE", 1 / 8)
        random = np.random.default_rng(0)
        scattered = random.normal(size=(4000, 64)).astype(np.float32)
        clustered = 9 * scattered[random.integers(0, 200, 4000)] + scattered
        for vectors, string in ((scattered, r"Flat"), (clustered, r"IVF\d+,Flat")):
            embeddings = Embeddings(write_rows(vectors, tmp_path / string, 1500))
            chosen = choose_index(embeddings, 1 << 30, self.recall)
            assert re.fullmatch(string, chosen.string)
            assert ("would take scanning" in chosen.reason) == (string == "Flat")

    def test_with_little_memory_it_is_compressed(self, embeddings):
        memory = self.uncompressed_bytes(embeddings) // 2
        chosen, recall = self.measured(embeddings, memory)
        assert "SQ" in chosen.string
        assert chosen.num_bytes <= memory
        assert recall.at[2] >= 0.95

    def test_the_impossible_is_refused_with_the_nearest_possible(self, embeddings, capfd):
        memory = self.uncompressed_bytes(embeddings) // 8
        with pytest.raises(ConfigurationError) as caught:
            choose_index(embeddings, memory, self.recall)
        told = str(caught.value)
        assert "--index-memory with --index-recall 0.95" in told
        lower = float(re.search(r"--index-recall ([\d.]+), or give", told)[1])
        assert choose_index(embeddings, memory, lower).num_bytes <= memory
        with pytest.raises(ConfigurationError, match="hold no index; the smallest takes"):
            choose_index(embeddings, 1000, 0.1)
        # Faiss warned of few vectors, once for each part of each code that was tried.
        assert "clustering" not in capfd.readouterr().err

    def test_candidates_that_are_sorted_by_the_stored_vectors_need_small_codes(self, embeddings):
        memory = self.uncompressed_bytes(embeddings) // 8
        chosen = choose_index(embeddings, memory, self.recall, rescore=True)
        assert chosen.num_bytes <= memory
        assert f"among {NUM_RESCORED} candidates" in chosen.reason
        assert NUM_RESCORED == NUM_QUERY
        index = train_index(chosen.string, embeddings, np.arange(self.count))
        add_to_index(index, embeddings)
        queries = held_out(passages(self.count), 200)
        _, exact = exact_neighbors(embeddings, queries, Shard(0, self.count, Path()))
        recalls = []
        for rescore in (False, True):
            measure = RecallMeasure(index, queries, exact, embeddings, rescore)
            recalls.append(tune(measure, num_lists(index), False, self.recall).decisive)
        assert recalls[0] < 0.9 < 0.95 <= recalls[1]

    @pytest.mark.parametrize(("divisor", "split"), [(1, False), (8, False), (1, True)])
    def test_with_rescore_the_fastest_codes_that_reach_the_recall_win(
        self, embeddings, divisor, split
    ):
        memory, dimension = self.uncompressed_bytes(embeddings) // divisor, embeddings.dimension
        chosen = choose_index(embeddings, memory, self.recall, rescore=True, split=split)
        trial = choice._Trial(embeddings, rescore=True)
        codes = sorted(
            choice._codes(self.count, dimension, split), key=lambda c: (c.scan, c.num_bytes)
        )
        place = [code.string for code in codes].index(chosen.string.split(",")[-1])
        assert trial.expected_recall(codes[place]) >= self.recall
        assert f"{trial.expected_recall(codes[place]):.3f}" in chosen.reason
        for faster in codes[:place]:  # half of the loss is for the lists
            fits = choice.index_bytes(self.count, dimension, faster.num_bytes) <= memory
            assert not fits or trial.expected_recall(faster) < 0.975
        assert chosen.num_bytes <= memory
        assert codes[place].kind in (("PQ", "RaBitQ") if split else ("fs",))
        assert codes[place].num_bytes < dimension  # than SQ8

    @pytest.mark.parametrize(
        ("recalls", "wanted", "string"),
        [
            ({"fs": 0.99}, 0.95, "PQ48x4fs"),
            ({"fs": 0.96, "RaBitQ": 0.98}, 0.95, "RaBitQ"),  # lists could lose only 0.01
            ({"RaBitQ": 0.98}, 0.95, "RaBitQ"),
            ({"PQ": 0.98, "RaBitQ": 0.98}, 0.95, "PQ4np"),
            ({"SQ": 0.98}, 0.95, "SQ8"),
            ({"SQ": 0.97, "PQ": 0.96}, 0.95, "SQfp16"),  # the most exact
            ({}, 0.95, "Flat"),
        ],
    )
    def test_the_fastest_kind_that_reaches_the_recall_wins(self, recalls, wanted, string):
        codes = choice._codes(10**6, 384)
        if "RaBitQ" not in {code.kind for code in codes}:
            codes += [choice._rabitq(bits, 384) for bits in range(1, 8)]
        codes.sort(key=lambda code: -code.num_bytes)
        if string not in ("Flat", "SQfp16"):
            codes = codes[1:]

        def expected(code):
            return recalls.get(code.kind, float(code.kind == "Flat" and not recalls))

        trial = SimpleNamespace(count=10**6, expected_recall=expected)
        assert choice._fastest(trial, codes, wanted).string == string

    @pytest.mark.parametrize(
        ("recalls", "wanted", "string"),
        [
            ({}, 0.95, "SQfp16"),
            ({"fs": 0.98}, 0.95, "SQfp16"),
            ({"fs": 0.996}, 0.95, "PQ192x4fs"),
            ({"fs": 0.996}, 0.998, "SQfp16"),  # close, but not enough
            ({"SQ": 0.94, "RaBitQ": 0.93, "fs": 0.936}, 0.95, "SQfp16"),  # none is enough
        ],
    )
    def test_without_rescore_fast_codes_win_where_they_lose_nothing(self, recalls, wanted, string):
        codes = choice._codes(10**6, 384)[1:]
        known = {"SQ": 1.0, "RaBitQ": 0.99, "PQ": 0.8, "fs": 0.7} | recalls
        trial = SimpleNamespace(count=10**6, expected_recall=lambda code: known[code.kind])
        assert choice._most_exact(trial, codes, wanted).string == string

    def test_vectors_without_lists_are_searched_uncompressed(self, embeddings, monkeypatch):
        """By matrix products, whatever is asked for: no code is scanned as fast."""
        monkeypatch.setattr(choice, "_LARGEST_WITHOUT_LISTS", 5000)
        chosen = choose_index(embeddings, 1 << 30, self.recall, rescore=True)
        assert chosen.string == "Flat"
        assert "in exact order as it is" in chosen.reason
        trial = SimpleNamespace(count=5000, expected_recall=lambda code: 1.0)
        for dimension in (64, 4096):
            codes = choice._codes(5000, dimension)
            assert choice._best(trial, codes, self.recall, rescore=True).string == "Flat"

    def test_on_the_disk_nothing_is_compressed(self, embeddings, monkeypatch):
        chosen = choose_index(embeddings, 1000, self.recall, on_disk=True)
        assert chosen.on_disk
        assert chosen.string.endswith(",Flat")
        monkeypatch.setattr(choice, "_LARGEST_WITHOUT_LISTS", 5000)
        with pytest.raises(ConfigurationError, match="--on-disk"):
            choose_index(embeddings, 1000, self.recall, on_disk=True)
        with pytest.raises(ConfigurationError) as refused:
            choose_index(embeddings, 1000, self.recall)
        assert "--on-disk" not in str(refused.value)  # which would be refused


@pytest.mark.parametrize("dimension", [256, 384, 1024])
def test_the_sizes_of_codes_are_those_of_faiss(dimension):
    codes = choice._codes(10**6, dimension)
    sizes = {code.string: code.num_bytes for code in codes}
    for string, size in sizes.items():
        index = training.make_index(string, dimension)
        assert size == (4 * dimension if string == "Flat" else index.sa_code_size()), string
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


def test_codes_that_cannot_be_split_or_used_on_a_gpu_are_left_out():
    every = {code.string for code in choice._codes(10**6, 384)}
    split = {code.string for code in choice._codes(10**6, 384, split=True)}
    gpu = {code.string for code in choice._codes(10**6, 384, gpu=True)}
    assert every - split == {"PQ192x4fs", "PQ96x4fs", "PQ48x4fs"}
    assert split - gpu == {"PQ128np", "RaBitQ", *(f"RaBitQ{bits}" for bits in range(2, 8))}


@pytest.mark.parametrize(
    ("count", "lists"), [(1, 0), (50_000, 0), (100_000, 1024), (5_000_000, 8192), (10**9, 131072)]
)
def test_the_number_of_lists_fits_the_number_of_vectors(count, lists):
    assert choice.num_lists_for(count) == lists


def test_a_graph_is_searched_as_narrowly_as_the_recall_allows(tmp_path):
    embeddings = Embeddings(write_rows(passages(3000), tmp_path, 700))
    index = train_index("IVF64_HNSW8,Flat", embeddings, np.arange(3000))
    add_to_index(index, embeddings)
    recall = measure_recall(index, embeddings, held_out(passages(3000), 200))
    assert recall.decisive >= 0.95
    assert recall.ef_search in (16, 32, 64, 128, 256)


def test_recall_counts_only_neighbors_that_there_are(tmp_path):
    rows = vectors()[:4]
    embeddings = Embeddings(write_rows(rows, tmp_path, 64))
    index = train_index("Flat", embeddings, np.arange(4))
    add_to_index(index, embeddings)
    queries = HeldOut(rows, np.arange(4))
    write_exact(embeddings, queries, Shard(0, 4, tmp_path), tmp_path / "exact.hdf5", "")
    exact = read_exact([tmp_path / "exact.hdf5"], 4)
    measure = RecallMeasure(index, queries, exact, embeddings)
    assert measure(None, None).at == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1.0, 2.0], 1.0),
        ([2.0, 1.0], 1.0),
        ([2.0, 2.0], 1.0),  # both tied with the second
        ([1.0, 2.0 + 1e-9], 1.0),
        ([1.0, 2.1], 0.5),
        ([3.0, np.inf], 0.0),
    ],
)
def test_recall_is_of_distances_not_of_ids(found, expected):
    """On a processor with AVX-512, another of two equally near rows came first: recall .9975."""
    exact = np.array([[1.0, 2.0, 2.0]])
    assert recall_at(2, np.array([found]), exact, 1e-8) == expected
    assert recall_at(2, np.array([found]), np.full((1, 2), np.inf)) == 1.0
    alone = np.array([[1.0, np.inf]])  # a database with one other row
    assert recall_at(2, np.array([found]), alone) == float(min(found) <= 1)


def test_a_search_that_finds_other_copies_has_full_recall(tmp_path):
    """Every row stands three times: which copies are found is anybody's choice."""
    rows = np.tile(vectors()[:400], (3, 1))
    embeddings = Embeddings(write_rows(rows, tmp_path, 500))
    index = train_index("Flat", embeddings, np.arange(len(rows)))
    add_to_index(index, embeddings)

    class LastCopies:
        """The nearest rows; of equally near ones the last."""

        def search(self, wanted, k):
            distances, ids = search(index, wanted, 3 * k)
            order = np.lexsort((-ids, np.round(distances, 3)))[:, :k]
            return tuple(np.take_along_axis(each, order, 1) for each in (distances, ids))

    queries = held_out(rows, 60)
    _, exact = exact_neighbors(embeddings, queries, Shard(0, len(rows), tmp_path))
    found = without(LastCopies().search(queries.vectors, 11)[1], queries.rows)
    assert (found[:, :2] != exact[:, :2]).any()
    recall = RecallMeasure(LastCopies(), queries, exact, embeddings)(None, None)
    assert recall.at == {1: 1.0, 2: 1.0, 10: 1.0}


def test_exhaustive_search_of_duplicates_has_full_recall(tmp_path):
    """Every row stands three times, and half of the queries are rows."""
    rows = np.tile(passages(1000), (3, 1))
    embeddings = Embeddings(write_rows(rows, tmp_path, 700))
    for string, probes in (("Flat", None), ("IVF16,Flat", 16)):
        index = train_index(string, embeddings, np.arange(len(rows)))
        add_to_index(index, embeddings)
        recall = measure_recall(index, embeddings, held_out(rows, 150), probes, target=1.0)
        assert recall.at == {1: 1.0, 2: 1.0, 10: 1.0}


def test_many_lists_are_clustered_faster_and_as_well(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    rows = random.normal(size=(60, 128))[random.integers(0, 60, 3000)] + random.normal(
        size=(3000, 128)
    )
    embeddings = Embeddings(write_rows(rows.astype(np.float32), tmp_path, 1500))
    distances, made, faiss = [], [], faiss_library()
    fast = faiss.SuperKMeans
    monkeypatch.setattr(faiss, "SuperKMeans", lambda *args: made.append(args[1]) or fast(*args))
    for fewest in (4096, 64):  # Lloyd's algorithm, then SuperKMeans
        monkeypatch.setattr(training, "_FEWEST_FAST_LISTS", fewest)
        index = train_index("IVF64,Flat", embeddings, np.arange(3000))
        distances.append(search(index.quantizer, embeddings.rows(np.arange(3000)), 1)[0].mean())
    assert made == [64]
    assert distances[1] == pytest.approx(distances[0], rel=0.03)


def test_few_files_are_open_at_a_time(tmp_path):
    """However many embeddings and neighbors have: a shell may allow 1,024, Linux maps 65,530."""
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from pathlib import Path
import numpy as np
from retro_mcore.retrieval.index import Embeddings
from tests.unit.data.projects import write_rows
vectors = np.arange(1200, dtype=np.float32).reshape(300, 4)
found = Embeddings(write_rows(vectors, Path(sys.argv[1]), 1))
for _ in range(2):
    assert (found.rows(np.arange(300)) == vectors).all()
    assert (found.rows(np.array([299, 0, 150, 0])) == vectors[[299, 0, 150, 0]]).all()

import h5py
from retro_mcore.retrieval.neighbor_tables import SavedNeighbors
for row in range(300):
    with h5py.File(Path(sys.argv[2]) / f"{row}-{row + 1}.hdf5", "w") as file:
        file["neighbors"] = np.full((1, 2), row)
found = SavedNeighbors(sys.argv[2], 300)
for _ in range(2):
    assert (found.rows(0, 300) == np.arange(300)[:, None]).all()
    assert (found.rows_at([299, 0, 150])[:, 1] == [299, 0, 150]).all()
"""
    (tmp_path / "neighbors").mkdir()
    folders = [str(tmp_path / name) for name in ("embeddings", "neighbors")]
    command = [sys.executable, "-c", script, *folders]
    subprocess.run(command, check=True)
