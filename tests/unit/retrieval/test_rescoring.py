"""Candidates in exact order, from the stored vectors."""

import logging
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.distributed import get_rank
from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project import ProjectConfig, ProjectPaths, ProjectSettings
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.index import Embeddings, add_to_index, rescoring, search, train_index
from retro_mcore.retrieval.index.gpu import log_once
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.rescoring import RescoredIndex, RescoredSharedIndex, rescored
from retro_mcore.retrieval.index.shared import SharedIndex
from retro_mcore.retrieval.retriever import Retriever
from tests.processes import run_ranks
from tests.unit.data.projects import blended_project, forget_neighbors, write_rows

ROWS = np.random.default_rng(0).normal(size=(900, 16)).astype(np.float32)
ROWS[500:510] = ROWS[3]


@pytest.fixture
def embeddings(tmp_path) -> Embeddings:
    return Embeddings(write_rows(ROWS, tmp_path / "embeddings", 200))


def exact(queries: np.ndarray, rows: np.ndarray = ROWS) -> np.ndarray:
    return ((rows[None].astype(np.float64) - queries[:, None]) ** 2).sum(-1)


@pytest.mark.parametrize("block_bytes", [1, 5000, 1 << 20])
def test_candidates_are_sorted_by_exact_distance_then_id(embeddings, monkeypatch, block_bytes):
    monkeypatch.setattr(rescoring, "_BLOCK_BYTES", block_bytes)
    random = np.random.default_rng(1)
    queries = ROWS[:40] + np.float32(0.1)
    ids = np.stack([random.permutation(900)[:60] for _ in queries])
    ids[0, :11] = [3, *range(500, 510)][::-1]
    ids[1, 20:] = NO_NEIGHBOR
    distances, found = rescored(embeddings, queries, ids)
    for row, true in enumerate(exact(queries)):
        there = ids[row][ids[row] != NO_NEIGHBOR]
        np.testing.assert_allclose(distances[row, : len(there)], np.sort(true[there]), rtol=1e-5)
        assert sorted(found[row, : len(there)]) == sorted(there)
        assert (found[row, len(there) :] == NO_NEIGHBOR).all()
    equal = found[0][np.isin(found[0], ids[0, :11])]
    assert equal.tolist() == [3, *range(500, 510)]


def test_a_compressed_index_gives_the_exact_order(embeddings):
    index = train_index("PQ4x4", embeddings, np.arange(900))
    add_to_index(index, embeddings)
    queries = ROWS[::30] + np.float32(0.2)
    order = np.argsort(exact(queries), axis=1)[:, :2]
    coarse = search(index, queries, 200)[1]
    distances, ids = search(RescoredIndex(index, embeddings), queries, 200)
    assert (np.diff(distances, axis=1) >= 0).all()
    hits = [(np.sort(found[:, :2]) == np.sort(order)).mean() for found in (coarse, ids)]
    assert hits[0] < 0.5 < 0.9 < hits[1]


@pytest.mark.parametrize(
    ("string", "exact"),
    [("Flat", True), ("IVF8192_HNSW32,Flat", True), ("IVF8(NSG),Flat", True), ("HNSW32", True),
     ("HNSW16,Flat", True), ("NSG_Flat", True), ("IVF8,SQ8", False), ("PCA64,IVF8,Flat", False),
     ("HNSW32_SQ8", False), ("IVF8,PQ4x4fs", False)],
)  # fmt: skip
def test_the_log_says_where_there_is_nothing_to_sort(caplog, string, exact):
    log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        rescoring.log_if_in_vain(string)
    assert ("--rescore gains nothing" in caplog.text) == exact


def search_damaged(shards: list[Shard]) -> str:
    """Search on two ranks; the candidate of rank 1 alone has a NaN in its stored vector."""
    damaged = Embeddings(shards)
    local = faiss_library().IndexFlatL2(16)
    local.add(ROWS[:40])
    index = RescoredSharedIndex(SharedIndex(local, 40, 16), damaged)
    with pytest.raises(CorruptFileError) as raised:
        index.search_together(ROWS[30 * get_rank() :][:1], 1)
    return str(raised.value)


@pytest.mark.distributed
def test_all_ranks_stop_where_one_reads_damaged_vectors(tmp_path):
    rows = ROWS[:40].copy()
    rows[25:] = np.nan
    first, second = run_ranks(2, search_damaged, write_rows(rows, tmp_path, 40))
    assert first == second
    assert "1 vectors are NaN" in first


def test_vectors_stored_in_half_precision_are_read(tmp_path):
    path = tmp_path / "0-900.hdf5"
    with h5py.File(path, "w") as file:
        file["data"] = ROWS.astype(np.float16)
    half = Embeddings([Shard(0, 900, path)])
    ids = np.tile(np.arange(20), (5, 1))
    distances, found = rescored(half, ROWS[100:105], ids)
    true = exact(ROWS[100:105], ROWS[:20].astype(np.float16))
    np.testing.assert_allclose(distances, np.take_along_axis(true, found, 1), rtol=1e-5)


@pytest.fixture
def project(tmp_path) -> Path:
    return forget_neighbors(shutil.copytree(blended_project(), tmp_path / "project"))


def saved(project: Path) -> tuple[np.ndarray, np.ndarray]:
    """Neighbors and distances of the training split."""
    folder = ProjectPaths(project).query / ProjectConfig.load(project).neighbor_dir("train")
    files = sorted(folder.glob("*.hdf5"))
    result = []
    for name, paths in (
        ("neighbors", files),
        ("distances", [folder / "distances" / file.name for file in files]),
    ):
        result.append(np.concatenate([h5py.File(path)[name][:] for path in paths]))
    return tuple(result)


def test_a_search_with_rescore_is_recorded_and_retrieval_does_the_same(project, capsys):
    plain = saved(blended_project())
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5, rescore=True))
    assert "by the stored vectors" in capsys.readouterr().out
    found = saved(project)
    there = found[0] != NO_NEIGHBOR
    # The index is exact, so only rows at one distance may change places.
    np.testing.assert_allclose(found[1][there], plain[1][there], atol=1e-5)
    assert ProjectSettings.load(project).rescore
    retriever = Retriever(project)
    assert isinstance(retriever.index, RescoredIndex)
    texts = ["the value of an expression", "a list of integers"]
    expected = Retriever(blended_project()).search_texts(texts)
    np.testing.assert_allclose(
        retriever.search_texts(texts).distances, expected.distances, atol=1e-5
    )
    with pytest.raises(ProjectError, match="--rescore"):
        query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))


def test_missing_vectors_are_named_with_how_to_restore_them(project):
    files = sorted(ProjectPaths(project).embeddings.glob("*.hdf5"))
    files[0].unlink()
    with pytest.raises(ProjectError, match=rf"{files[0].name}: missing.*--stage embed"):
        query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5, rescore=True))
    build_index(BuildIndexOptions(str(project), embedder="lexical", stage="embed"))
    assert files[0].is_file()
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5, rescore=True))


def test_an_index_measured_with_rescoring_is_searched_so(project):
    paths = ProjectPaths(project)
    shutil.rmtree(paths.index)
    paths.stage_record("build_index").unlink()
    options = BuildIndexOptions(str(project), embedder="lexical", index="SQ4", rescore=True)
    report = build_index(options)
    assert report.recall.decisive == 1.0  # among 200 candidates of fewer rows
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    settings = ProjectSettings.load(project)
    assert settings.index_rescored
    assert settings.rescore
    found, exact = saved(project), saved(blended_project())
    there = found[0] != NO_NEIGHBOR
    np.testing.assert_allclose(found[1][there], exact[1][there], atol=1e-5)
