"""An index that grows by new documents: only their vectors are added."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.project import ProjectPaths
from retro_mcore.retrieval.index import build, cut_parts, inherited, load_index
from retro_mcore.retrieval.index.filling import find_parts
from retro_mcore.retrieval.index.inherited import InheritedIndex
from retro_mcore.retrieval.index.training import IndexKind
from tests.unit.data.projects import documents, preprocess_options, write_corpus


@pytest.fixture(scope="module")
def cut_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project after build_db, and new documents."""
    folder = tmp_path_factory.mktemp("grown")
    texts = documents(60)
    write_corpus(folder / "corpus.jsonl", texts[:24])
    write_corpus(folder / "more.jsonl", texts[40:50])
    preprocess_corpus(preprocess_options(folder / "project", folder / "corpus.jsonl"))
    build_db(BuildDbOptions(str(folder / "project"), retro_doc_block_size=6))
    return folder


def indexed(cut_project: Path, folder: Path, index: str, **options: object) -> Path:
    shutil.copytree(cut_project, folder, dirs_exist_ok=True)
    project = folder / "project"
    given = BuildIndexOptions(str(project), embedder="lexical", index=index, **options)
    build_index(given)
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    return project


def append(project: Path) -> ProjectPaths:
    result = update_db(UpdateDbOptions(str(project), append=[str(project.parent / "more.jsonl")]))
    return ProjectPaths(result.project)


def test_old_parts_are_kept_and_the_index_is_that_of_all(
    cut_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = "IVF4,SQ8"
    added: list[range] = []
    add_part = build.add_part

    def counting(trained, embeddings, part, path, gpu=False):
        added.append(range(part.start, part.end))
        add_part(trained, embeddings, part, path, gpu)

    monkeypatch.setattr(build, "add_part", counting)
    project = indexed(cut_project, tmp_path / "a", index)
    growth = load_index(ProjectPaths(project).added_index(index)).ntotal
    added.clear()
    grown = append(project)
    assert min(rows.start for rows in added) == growth  # no old vector
    olds = sorted(ProjectPaths(project).index_parts(index).glob("*.invlists"))
    news = sorted(grown.index_parts(index).glob("*.invlists"))
    assert [path.stat().st_ino for path in olds] == [p.stat().st_ino for p in news[: len(olds)]]
    # The same update by filling everything.
    monkeypatch.setattr(InheritedIndex, "link_parts", lambda *given: None)
    other = append(indexed(cut_project, tmp_path / "b", index))
    assert grown.added_index(index).read_bytes() == other.added_index(index).read_bytes()
    assert grown.recall_report(index).read_bytes() == other.recall_report(index).read_bytes()


def test_a_graph_is_added_to(cut_project: Path, tmp_path: Path) -> None:
    """It is not the graph of one process that adds all, but it holds the same vectors."""
    project = indexed(cut_project, tmp_path, "HNSW8,Flat")
    before = load_index(ProjectPaths(project).added_index("HNSW8,Flat"))
    grown = append(project)
    after = load_index(grown.added_index("HNSW8,Flat"))
    assert after.ntotal > before.ntotal
    old = before.reconstruct_n(0, before.ntotal)
    np.testing.assert_array_equal(after.reconstruct_n(0, before.ntotal), old)
    vectors = after.reconstruct_n(0, after.ntotal)
    distances, _ = after.search(vectors[before.ntotal :], 1)
    assert (distances < 1e-4).mean() > 0.9


def test_parts_that_an_older_version_cut_are_found(tmp_path: Path) -> None:
    """It forgot growth. A split index consists of these files."""
    wanted = (tmp_path, 5000, IndexKind.LISTS, 20)
    older, newer = cut_parts(*wanted), cut_parts(*wanted, [4321])
    assert find_parts(*wanted, [4321]) == newer != older
    for part in older:
        part.path.touch()
    assert find_parts(*wanted, [4321]) == older
    for part in newer:
        part.path.touch()
    assert find_parts(*wanted, [4321]) == newer


@pytest.mark.parametrize("kind", [IndexKind.LISTS, IndexKind.CODES])
def test_grown_parts_begin_with_the_old_ones(kind: IndexKind, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = np.cumsum(10 ** random.uniform(1, 7, 4)).astype(int).tolist()
        block = int(10 ** random.uniform(1, 5))
        cuts = [
            [(p.start, p.end) for p in cut_parts(tmp_path, size, kind, block, sizes[:place])]
            for place, size in enumerate(sizes)
        ]
        for bounds, size in zip(cuts, sizes, strict=True):
            assert bounds[0][0] == 0
            assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
            assert bounds[-1][1] == size
        for size, (old, new) in zip(sizes, pairwise(cuts), strict=False):
            # Codes are filled again from the last whole block of 1,024 on.
            kept = size if kind is IndexKind.LISTS else size - size % 1024
            assert all(part in new for part in old if part[1] <= kept)


def test_the_rows_that_a_database_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, of which the last is shorter than the extended database's."""
    monkeypatch.setattr(inherited, "_BATCH", 4)
    rows = np.arange(20).reshape(10, 2)
    assert all(inherited.begins_with(rows, rows[:count]) for count in range(11))
    assert not inherited.begins_with(rows, rows[1:7])
    assert not inherited.begins_with(rows[:6], rows)
