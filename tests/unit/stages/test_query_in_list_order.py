"""query_neighbors over an index of lists: in list order, and as it was run before."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.project import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.retrieval.index import gpu
from retro_mcore.retrieval.index import project as index
from retro_mcore.stages import query_neighbors as stage
from retro_mcore.stages.query_neighbors import QueryNeighborsConfig, QueryNeighborsReport
from tests.unit.data.projects import documents, preprocess_options, write_corpus

#: An index with a graph over its lists is not followed by the graph: all centers are compared.
ORDERS = {"IVF4,Flat": "lists", "IVF4_HNSW8,Flat": "lists, the nearest ones"}


@pytest.fixture(scope="module", params=ORDERS)
def index_string(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def prepared(index_string: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("list_order")
    corpus = write_corpus(folder / "corpus.jsonl", documents(24))
    preprocess_corpus(preprocess_options(folder / "project", corpus))
    build_db(BuildDbOptions(str(folder / "project")))
    build_index(BuildIndexOptions(str(folder / "project"), embedder="lexical", index=index_string))
    return folder / "project"


def query(project: Path) -> QueryNeighborsReport:
    return stage.run(project, QueryNeighborsConfig(num_neighbors_save=5, num_neighbors_query=20))


def saved(project: Path, name: str) -> np.ndarray:
    """All rows of one kind, "neighbors" or "distances"."""
    rows = []
    for path in sorted((project / "query").rglob("*.hdf5")):
        if (path.parent.name == "distances") == (name == "distances"):
            with h5py.File(path) as file:
                rows.append(file[name][:])
    return np.concatenate(rows)


def test_the_neighbors_are_those_of_index_search(
    index_string: str,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lists, before = tmp_path / "lists", tmp_path / "before"
    shutil.copytree(prepared, lists)
    shutil.copytree(prepared, before)
    gpu.log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        query(lists)
    assert re.search(r"search reads each list once for up to \d{5,} chunks", caplog.text)
    recorded = recorded_options(ProjectPaths(lists), stage.STAGE)
    assert recorded["order of the search"] == ORDERS[index_string]
    with monkeypatch.context() as patch:
        patch.setattr(stage, "obstacle", lambda *_: "as before")
        gpu.log_once.cache_clear()
        with caplog.at_level(logging.INFO):
            query(before)
    assert "search goes from chunk to chunk: as before" in caplog.text
    distances = saved(before, "distances")
    np.testing.assert_array_equal(saved(lists, "distances"), distances)
    tied = np.diff(distances, axis=1, append=np.nan) == 0
    tied[:, 1:] |= tied[:, :-1]
    tied[:, -1] = True  # its rival may not have been saved
    same = saved(lists, "neighbors") == saved(before, "neighbors")
    assert (same | tied).all()
    # What was finished before this existed goes on as it was.
    assert "order of the search" not in recorded_options(ProjectPaths(before), stage.STAGE)
    again = query(before)
    assert all(report.built == 0 for report in again.reports.values())


def test_the_order_recorded_is_the_one_used(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index on a GPU is not searched in list order."""
    project = tmp_path / "project"
    shutil.copytree(prepared, project)
    with monkeypatch.context() as patch:
        patch.setattr(index, "num_gpus", lambda: 1)
        patch.setattr(index, "to_gpu_for_search", lambda index, k, _: gpu.GpuIndex(index, index, k))
        report = query(project)
        assert all(shards.built for shards in report.reports.values())
        assert "order of the search" not in recorded_options(ProjectPaths(project), stage.STAGE)
    again = query(project)
    assert all(shards.built == 0 for shards in again.reports.values())
