"""From candidates to saved neighbors: the document filter, searching on, BM25."""

import math

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.retrieval import filtering, neighbor_search
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.base import Embedder
from retro_mcore.retrieval.filtering import DocumentFilter, SampleRows, keep_first, rows_of
from retro_mcore.retrieval.neighbor_search import NeighborSearch, answer
from retro_mcore.retrieval.query_chunks import (
    ChunkEmbedder,
    DatabaseChunks,
    EmbeddedVectors,
    QueryBatch,
    QueryCounts,
    SampleChunks,
)
from retro_mcore.retrieval.rerank import BM25, K1, B, count_tokens
from tests.unit.data.projects import built_project


@pytest.fixture(scope="module")
def database():
    return ChunkDatabase.open(built_project())


def candidates_of(database, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(len(database))[:width] for _ in range(rows)])
    ids[1, 5:] = NO_NEIGHBOR
    return ids, np.sort(random.random((rows, width), np.float32))


@pytest.mark.parametrize("slots", [1 << 22, 4])
@pytest.mark.parametrize("count", [3, 40])
def test_neighbors_are_of_other_documents(database, monkeypatch, slots, count):
    """Against a filter that looks at one candidate after the other; few slots are shared."""
    monkeypatch.setattr(filtering, "_SLOTS", slots)
    ids, distances = candidates_of(database, 6, 90)
    samples = [
        SampleRows(0, 2, 0, np.array([0, 3])),
        SampleRows(2, 3, 0, np.array([11])),
        SampleRows(3, 6, 0, np.arange(1, 11)),
    ]
    found, kept = DocumentFilter(database).select(ids, distances, samples, count)
    for sample in samples:
        for row in range(sample.start, sample.end):
            allowed = [
                column
                for column, chunk in enumerate(ids[row])
                if chunk != NO_NEIGHBOR and database.documents(chunk)[1] not in sample.documents
            ][:count]
            missing = count - len(allowed)
            assert found[row].tolist() == [*ids[row, allowed], *[NO_NEIGHBOR] * missing]
            np.testing.assert_array_equal(
                kept[row], [*distances[row, allowed], *[np.nan] * missing]
            )
            following = database.continuation(found[row][found[row] != NO_NEIGHBOR])
            documents = database.documents(following[following != NO_NEIGHBOR])[:, 1]
            assert not set(documents.tolist()) & set(sample.documents.tolist())


def test_samples_of_a_dataset_that_is_not_in_the_database_have_no_chunks_there(database):
    ids, _ = candidates_of(database, 6, 9)
    documents = np.arange(len(database.token_sources[0].starts))
    owners = [SampleRows(0, 5, 1, documents), SampleRows(5, 6, 0, documents)]
    own = DocumentFilter(database).own(ids, owners)
    assert own.tolist() == [*[[False] * 9] * 5, [True] * 9]


def test_rows_of_samples_are_renumbered():
    samples = [SampleRows(0, 2, 0, np.array([1])), SampleRows(2, 4, 1, np.array([2]))]
    found = rows_of(samples, np.array([1, 2, 3]))
    assert [(s.start, s.end, s.dataset) for s in found] == [(0, 1, 0), (1, 3, 1)]
    assert [s.dataset for s in rows_of(samples, np.array([3]))] == [1]


class OneSample:
    """Chunks of the database's first document, as a sample of it and of all but two documents."""

    def __init__(self, database, length: int) -> None:
        documents = np.unique(database.chunks[:, 1])
        self.own = documents[documents != documents[-2]]
        self.tokens = np.concatenate(database.tokens([0, 1]))[: 2 * length + 1]

    def __len__(self) -> int:
        return 1

    def read(self, index):
        return self.tokens, 0, self.own


class Length(Embedder):
    """The chunk's number of characters."""

    name, dimension = "length", 1

    def embed(self, texts):
        return np.array([[len(text)] for text in texts], np.float32)


class Rising:
    """Finds chunks in the order of their ids, and counts what it was asked."""

    def __init__(self, total: int) -> None:
        self.total, self.asked = total, []

    def search(self, vectors, k):
        self.asked.append((len(vectors), k))
        found = np.tile(np.arange(k), (len(vectors), 1))
        return found.astype(np.float32), found


def test_known_neighbors_hide_no_nearer_ones_behind_those_of_the_own_documents(database):
    """They fill the row, but are farther than what a wider search finds."""
    every = np.arange(len(database))
    own = np.unique(database.documents(every[:5])[:, 1])
    chunks, owners = [database.tokens([0])[0]], [SampleRows(0, 1, 0, own)]
    search = NeighborSearch(database, num_query=2, num_save=2)
    expected = search.select(chunks, every[None], every[None].astype(np.float32), owners)
    assert expected[0].min() > 3
    for far in (1e6, expected[1][0, 0] - 0.5):  # farther than all, nearer than all others
        known = every[None, -2:], np.array([[1, far]], np.float32)
        query = QueryBatch(chunks, np.zeros((1, 1), np.float32), owners, known)
        index = Rising(len(database))
        ids, distances = answer(search.find(query, QueryCounts()), index)
        wanted = expected[0][0, 0] if far == 1e6 else every[-1]
        assert ids.tolist() == [[every[-2], wanted]]
        assert distances.tolist() == [[1, min(far, expected[1][0, 0])]]
        assert (len(index.asked) > 1) == (index.asked[-1][1] > 2)


def test_a_search_goes_on_until_there_are_enough_neighbors(database):
    paths = ProjectPaths(built_project())
    tokenizer = load_project_tokenizer(ProjectConfig.load(paths.root), paths)
    samples, index = OneSample(database, 16), Rising(len(database))
    samples.tokens = np.resize(samples.tokens, 33)
    chunks = SampleChunks(samples, 16, ChunkEmbedder(tokenizer, Length()))
    search = NeighborSearch(database, num_query=4, num_save=2)
    ids, distances = answer(search.batch(chunks, 0, 2, QueryCounts()), index)
    others = np.flatnonzero(~np.isin(database.chunks[:, 1], samples.own))[:2]
    assert len(others) == 2
    assert ids.tolist() == [others.tolist()] * 2
    assert distances.tolist() == [others.tolist()] * 2
    widths = [k for _, k in index.asked]
    assert widths[0] == 4
    assert widths == sorted(widths)
    assert widths[-1] <= len(database)
    assert widths[-2] < others[1] + 1 <= widths[-1]  # no further than it had to


def slow_bm25(database, query, candidate) -> float:
    """Robertson and Zaragoza 2009, term by term over the whole database."""
    chunks = [chunk.tolist() for chunk in database.tokens(np.arange(len(database)))]
    mean = sum(map(len, chunks)) / len(chunks)
    tokens, score = chunks[candidate], 0.0
    for term in query.tolist():
        containing = sum(term in chunk for chunk in chunks)
        idf = math.log(1 + (len(chunks) - containing + 0.5) / (containing + 0.5))
        frequency = tokens.count(term)
        norm = K1 * (1 - B + B * len(tokens) / mean)
        score += idf * frequency * (K1 + 1) / (frequency + norm)
    return score


@pytest.fixture(scope="module")
def bm25(database):
    return BM25(database, count_tokens(database, 500), 16)


def test_bm25_is_the_textbooks(database, bm25):
    query = database.tokens([3])[0]
    ids = np.array([0, 3, 60, len(database) - 1])
    expected = [slow_bm25(database, query, chunk) for chunk in ids]
    np.testing.assert_allclose(bm25.scores(query, ids), expected)


def test_bm25_puts_the_chunk_with_the_same_words_first(database, bm25):
    queries = database.tokens([3, 10])
    candidates = np.array([[50, 60, 3, 70], [10, 20, NO_NEIGHBOR, NO_NEIGHBOR]])
    order = bm25.order(queries, candidates)
    assert order[:, 0].tolist() == [2, 0]
    assert order[1, 2:].tolist() == [2, 3]
    assert sorted(order[0].tolist()) == [0, 1, 2, 3]


def test_a_wide_search_is_cut_as_a_narrow_one():
    ids = np.tile(np.arange(40_000), (2, 1))
    allowed = ids >= 39_990
    found, _ = keep_first(ids, ids.astype(np.float32), allowed, 3)
    assert found.tolist() == [[39_990, 39_991, 39_992]] * 2


class Lengths:
    """Embeds a chunk as its number of tokens."""

    def embed(self, chunks, first, counts):
        counts.chunks += len(chunks)
        return np.array([[len(chunk)] for chunk in chunks], np.float32)


@pytest.mark.parametrize("together", [1, 40, 1000])
def test_how_many_chunks_are_searched_together_changes_nothing(database, monkeypatch, together):
    """Batches of 16 are read and filtered; the rows of wider searches are collected."""
    monkeypatch.setattr(neighbor_search, "BATCH", 16)
    chunks = DatabaseChunks(database, [0], EmbeddedVectors(database, Lengths()))
    search = NeighborSearch(database, num_query=4, num_save=3, together=together)
    rows = min(100, len(database))
    step = search._step(rows)
    assert step % 16 == 0
    assert step == {1: 16, 40: 48, 1000: 112}[together]
    alone, joined = QueryCounts(), QueryCounts()
    index = Rising(len(database))
    one = [
        answer(search.batch(chunks, s, min(s + 16, rows), alone), index) for s in range(0, rows, 16)
    ]
    found = [
        answer(search.batch(chunks, s, min(s + step, rows), joined), index)
        for s in range(0, rows, step)
    ]
    for part, other in zip(zip(*found, strict=True), zip(*one, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(part), np.concatenate(other))
    assert joined == alone


def test_a_narrow_search_first_finds_the_same_neighbors(database, monkeypatch):
    monkeypatch.setattr(neighbor_search, "_FEWEST_SPARE", 1)
    chunks, rows = DatabaseChunks(database, [0], EmbeddedVectors(database, Lengths())), 40
    found, asked = [], []
    for prefixes in (False, True):
        index = Rising(len(database))
        search = NeighborSearch(database, num_query=30, num_save=3, prefixes=prefixes)
        found.append(answer(search.batch(chunks, 0, rows, QueryCounts()), index))
        asked.append(index.asked)
    for whole, narrow in zip(*found, strict=True):
        np.testing.assert_array_equal(narrow, whole)
    assert asked[0][0] == (rows, 30)
    assert [k for _, k in asked[1][:2]] == [6, 30]
    assert 0 < asked[1][1][0] < rows  # only the chunks with too few


def counting(asks, results):
    """Yields requests, one row per number, and collects the rows of what is found."""
    for numbers, k in asks:
        distances, _ = yield np.array(numbers, np.float32)[:, None], k
        assert distances.shape == (len(numbers), k)
        results.append(distances[:, 0].tolist())


def test_searches_of_several_files_are_joined_by_their_number_of_candidates():
    asked = [[([1, 2], 4), ([2], 16)], [([3], 4)], [], [([5], 4), ([6, 7], 16), ([7], 64)]]
    results = [[] for _ in asked]
    steps = neighbor_search.join_searches(map(counting, asked, results), lambda k: 64 // k)
    requests = []
    try:
        vectors, k = next(steps)
        while True:
            requests.append((vectors[:, 0].tolist(), k))
            vectors, k = steps.send((np.repeat(10 * vectors, k, 1), np.zeros((len(vectors), k))))
    except StopIteration:
        pass
    assert requests == [([1, 2, 3, 5], 4), ([2, 6, 7], 16), ([7], 64)]
    assert results == [[[10, 20], [20]], [[30]], [], [[50], [60, 70], [70]]]


def test_a_failure_closes_the_other_files_searches():
    closed = []

    def open_file():
        try:
            yield np.zeros((1, 2), np.float32), 1
        finally:
            closed.append(True)

    steps = neighbor_search.join_searches([open_file(), open_file()], lambda k: 8)
    next(steps)
    with pytest.raises(ValueError, match="no index"):
        steps.throw(ValueError("no index"))
    assert closed == [True, True]
