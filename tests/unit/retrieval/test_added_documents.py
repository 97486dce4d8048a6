"""Documents in memory that are searched beside the project's database."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.retriever import Retriever
from tests.unit.data.projects import documents, preprocess_options, write_corpus

TEXTS = documents(60)[50:53]
QUERIES = [TEXTS[0][:60], TEXTS[2][:60], documents()[3][:60]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of an exact index, and the new documents as a corpus."""
    folder = tmp_path_factory.mktemp("added")
    corpus = write_corpus(folder / "corpus.jsonl", documents(16))
    write_corpus(folder / "more.jsonl", TEXTS)
    project = folder / "project"
    preprocess_corpus(preprocess_options(project, corpus, samples="aligned"))
    build_db(BuildDbOptions(str(project)))
    build_index(BuildIndexOptions(str(project), embedder="static", index="Flat"))
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=3))
    return folder


def retriever(project: Path, num_neighbors: int = 6) -> Retriever:
    return Retriever(project, num_neighbors, 2)


def add(searching: Retriever, most_chunks: int = 1000) -> None:
    added = searching.accept_documents(most_chunks)
    names = [f"topic-{number}" for number in range(len(TEXTS))]
    added.add([searching.maker.make(name, text) for name, text in zip(names, TEXTS, strict=True)])


def test_they_are_found_as_after_update_db_append(folder: Path, tmp_path: Path) -> None:
    here = retriever(folder / "project")
    add(here)
    found = here.search_texts(QUERIES)
    copy = shutil.copytree(folder, tmp_path / "copy")
    update_db(UpdateDbOptions(str(copy / "project"), append=[str(copy / "more.jsonl")]))
    there = retriever(copy / "project")
    assert len(there.database) == len(here.database) + len(here._added.now)  # type: ignore[union-attr]
    wanted = there.search_texts(QUERIES)
    # Chunks get the numbers that they would have in the database.
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.distances, wanted.distances, atol=1e-5)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.mask, wanted.mask)
    assert (found.ids[:2, 0] >= len(here.database)).all()
    for mine, theirs in zip(here.describe(found), there.describe(wanted), strict=True):
        assert [one.text for one in mine] == [one.text for one in theirs]
        assert [one.continuation for one in mine] == [one.continuation for one in theirs]
    assert here.describe(found)[1][0].source == "topic-2 (added document 2)"


def test_a_reset_leaves_what_was_read(folder: Path) -> None:
    here = retriever(folder / "project")
    before = here.search_texts(QUERIES)
    add(here)
    found = here.search_texts(QUERIES)
    described = here.describe(found)
    first = int(here._added.now.ids[0])  # type: ignore[union-attr]
    here._added.reset()  # type: ignore[union-attr]
    after = here.search_texts(QUERIES)
    np.testing.assert_array_equal(after.ids, before.ids)
    np.testing.assert_array_equal(after.tokens, before.tokens)
    again = here.describe(found)[0][0]
    assert again.text.strip() == described[0][0].text.strip()
    assert again.source == "an added document, which was removed"
    document = here.maker.make("later", TEXTS[1])
    assert int(here._added.add([document]).ids[0]) > first  # type: ignore[union-attr]


def test_all_or_none(folder: Path) -> None:
    here = retriever(folder / "project")
    added = here.accept_documents(5)
    made = [here.maker.make(f"d{number}", text) for number, text in enumerate(TEXTS)]
    with pytest.raises(ConfigurationError, match="at most 5 fit"):
        added.add(made)
    with pytest.raises(ConfigurationError, match="'d0' is there already"):
        added.add([made[0], made[0]])
    with pytest.raises(ConfigurationError, match="'x' holds no words"):
        here.maker.make("x", " \t\n ")
    assert len(added.now) == 0


def test_a_search_sees_one_state_while_documents_come_and_go(folder: Path) -> None:
    here = retriever(folder / "project", 4)
    added = here.accept_documents(1000)
    made = [here.maker.make(f"d{number}", text) for number, text in enumerate(TEXTS)]
    stop, failed = threading.Event(), []

    def search() -> None:
        try:
            while not stop.is_set():
                found = here.search_texts(QUERIES[:1])
                assert (found.ids != NO_NEIGHBOR).all()
                # A neighbor's chunk and its mask belong together.
                assert not found.mask[..., 0].any()
                here.describe(found)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    for _ in range(50):
        added.add(made)
        added.reset()
    stop.set()
    thread.join()
    assert not failed
