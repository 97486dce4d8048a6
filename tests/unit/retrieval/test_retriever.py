"""Live retrieval from a small project of real text."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.errors import ConfigurationError, CorruptFileError, ProjectError
from retro_mcore.project import ProjectPaths, ProjectSettings
from retro_mcore.retrieval.neighbors import CompletedChunk
from retro_mcore.retrieval.rerank import load_reranker
from retro_mcore.retrieval.retriever import Retriever
from tests.unit.data.projects import built_project, forget_neighbors

M = 16


@pytest.fixture(scope="module")
def retriever():
    return Retriever(built_project())


@pytest.fixture
def project(tmp_path):
    """A copy to damage."""
    return shutil.copytree(built_project(), tmp_path / "project")


def whole_chunks(database, count):
    """Ids of chunks of M tokens, evenly spread."""
    lengths = database.chunks[:, 3] - database.chunks[:, 2]
    ids = np.flatnonzero(lengths == M)
    return ids[np.linspace(0, len(ids) - 1, count).astype(int)]


def test_a_chunk_of_the_database_finds_itself_first(retriever):
    ids = whole_chunks(retriever.database, 12)
    found = retriever.search_tokens(retriever.database.tokens(ids))
    texts = retriever.database.texts(ids, retriever.tokenizer)
    assert retriever.database.texts(found.ids[:, 0], retriever.tokenizer) == texts
    np.testing.assert_allclose(found.distances[:, 0], 0, atol=1e-5)
    assert (np.diff(found.distances, axis=1) >= 0).all()


def test_the_search_is_the_nearest_by_embedding(retriever):
    query = "the value of the expression is an integer"
    everything = retriever.database.texts(np.arange(len(retriever.database)), retriever.tokenizer)
    difference = retriever.embedder.embed(everything) - retriever.embedder.embed([query])
    nearest = np.argsort((difference**2).sum(-1), kind="stable")[:2]
    assert retriever.search_texts([query]).ids[0].tolist() == nearest.tolist()


def test_tokens_are_the_neighbor_and_its_continuation_padded_and_masked(retriever):
    database, eod = retriever.database, retriever.tokenizer.eod
    found = retriever.search_tokens(database.tokens(whole_chunks(database, 8)))
    assert found.tokens.shape == found.mask.shape == (8, 2, 2 * M)
    for neighbor, tokens, mask in zip(
        found.ids.ravel(), found.tokens.reshape(-1, 2, M), found.mask.reshape(-1, 2, M), strict=True
    ):
        following = int(database.continuation(np.array(neighbor)))
        for chunk, part, hidden in zip((neighbor, following), tokens, mask, strict=True):
            expected = [] if chunk == NO_NEIGHBOR else database.tokens([chunk])[0].tolist()
            assert part[~hidden].tolist() == expected
            assert (part[hidden] == eod).all()
            assert hidden.tolist() == [False] * len(expected) + [True] * (M - len(expected))


def test_a_batch_finds_what_its_chunks_find_alone(retriever):
    chunks = retriever.database.tokens(whole_chunks(retriever.database, 5))
    asked = [CompletedChunk(0, i, chunk.tolist()) for i, chunk in enumerate(chunks)]
    together = retriever.neighbors_of(asked)
    for row, one in enumerate(asked):
        # Equally near chunks may change places: a batch of another shape rounds otherwise.
        alone = retriever.neighbors_of([one]).distances[0]
        np.testing.assert_allclose(alone, together.distances[row], atol=1e-4)


def test_more_neighbors_than_chunks_are_masked():
    retriever = Retriever(built_project(), num_neighbors=1000)
    found = retriever.search_texts(["anything"])
    number = len(retriever.database)
    assert (found.ids[0, number:] == NO_NEIGHBOR).all()
    assert sorted(found.ids[0, :number]) == list(range(number))
    assert found.mask[0, number:].all()
    assert not found.mask[0, :number, 0].any()
    assert len(retriever.describe(found)[0]) == number


def test_candidates_are_in_the_order_of_bm25_where_the_neighbors_are(project):
    forget_neighbors(project)
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_query=30, rerank="bm25"))
    retriever, by_distance = Retriever(project), Retriever(built_project(), num_neighbors=30)
    bm25 = load_reranker("bm25", ProjectPaths(project), retriever.database, M)
    chunks = retriever.database.tokens(whole_chunks(retriever.database, 12))
    found, candidates = retriever.search_tokens(chunks), by_distance.search_tokens(chunks)
    order = bm25.order(chunks, candidates.ids)[:, :2]
    expected = np.take_along_axis(candidates.ids, order, axis=1)
    np.testing.assert_array_equal(found.ids, expected)
    np.testing.assert_allclose(
        found.distances, np.take_along_axis(candidates.distances, order, axis=1), atol=1e-5
    )
    assert (expected != candidates.ids[:, :2]).any()
    texts = retriever.database.texts(found.ids[:1, 0], retriever.tokenizer)
    assert retriever.search_texts(texts).ids[0, 0] == found.ids[0, 0]


def test_no_texts_find_nothing(retriever):
    assert retriever.search_texts([]).tokens.shape == (0, 2, 2 * M)


def test_descriptions_name_text_continuation_and_source(retriever):
    database, tokenizer = retriever.database, retriever.tokenizer
    chunk = int(whole_chunks(database, 3)[1])
    found = retriever.search_tokens(database.tokens([chunk]))
    ((first, second),) = retriever.describe(found)
    assert first.text == database.texts([chunk], tokenizer)[0]
    assert first.distance <= second.distance
    following = int(database.continuation(np.array(first.id)))
    expected = "" if following == NO_NEIGHBOR else database.texts([following], tokenizer)[0]
    assert first.continuation == expected
    document = int(database.documents(np.array(first.id))[1])
    assert first.source == f"topic-{document} (document {document} of corpus_text_document)"


def test_a_stage_that_has_not_run_is_named(project):
    paths = ProjectPaths(project)
    settings = ProjectSettings.load(project)
    index = paths.added_index(settings.index_string)
    index.unlink()
    with pytest.raises(ProjectError, match="Run build_index"):
        Retriever(project)
    ProjectSettings().save(project)
    with pytest.raises(ProjectError, match=r"retro_mcore\.json.*Run build_index"):
        Retriever(project)
    paths.merged_db("train").unlink()
    with pytest.raises(ProjectError, match="Run build_db"):
        Retriever(project)
    shutil.rmtree(project)
    with pytest.raises(ProjectError, match="not a project directory"):
        Retriever(project)


def test_a_damaged_index_is_refused(project):
    index = ProjectPaths(project).added_index(ProjectSettings.load(project).index_string)
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match=r"added.*Run build_index"):
        Retriever(project).search_texts(["anything"])


@pytest.mark.parametrize("argument", ["num_neighbors", "num_retrieved_chunks"])
def test_nothing_to_retrieve_is_refused(argument):
    with pytest.raises(ConfigurationError, match=f"--retro-{argument.replace('_', '-')}: 0"):
        Retriever(built_project(), **{argument: 0})
