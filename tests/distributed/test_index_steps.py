"""Array jobs, torchrun and one process: the same index. Parts on ranks: the same neighbors."""

import io
import logging
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.distributed import get_rank
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.project import ProjectPaths, ProjectSettings
from retro_mcore.retrieval import neighbor_search
from retro_mcore.retrieval.index import list_order
from tests.processes import START_METHOD, run_ranks
from tests.unit.data.projects import documents, preprocess_options, write_corpus

pytestmark = pytest.mark.distributed
STRING = "IVF4,Flat"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def options(project: Path, **changes) -> BuildIndexOptions:
    return replace(BuildIndexOptions(str(project), embedder="lexical", index=STRING), **changes)


def index_and_query(project: Path, changes: dict) -> dict[str, bytes]:
    build_index(options(project, **changes))
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    return contents(project / "query")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    corpus = write_corpus(folder / "corpus.jsonl", documents(30, 500))
    preprocess_corpus(preprocess_options(folder / "project", corpus))
    build_db(BuildDbOptions(str(folder / "project")))
    return folder / "project"


@pytest.mark.parametrize("on_disk", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_jobs_in_any_order_write_the_files_of_one_run(prepared, tmp_path, on_disk, caplog):
    caplog.set_level(logging.INFO)
    changes = {"on_disk": on_disk}
    project = tmp_path / "project"
    shutil.copytree(prepared, project)
    build_index(options(project, **changes))
    expected = contents(project / "index")
    assert sum(name.endswith(".invlists") for name in expected) > 3
    assert any(name.endswith(".ivfdata") for name in expected) == on_disk
    shutil.rmtree(project)

    shutil.copytree(prepared, project)
    with pytest.raises(ProjectError, match="--stage embed first"):
        build_index(options(project, stage="train", **changes))
    for shard in ("2/3", "3/3", "1/3"):
        build_index(options(project, stage="embed", shard=shard, **changes))
    with pytest.raises(ProjectError, match="--stage train first"):
        build_index(options(project, stage="add", shard="1/2", **changes))
    build_index(options(project, stage="train", **changes))
    build_index(options(project, stage="add", shard="2/2", **changes))
    with pytest.raises(ProjectError, match="--stage add first"):
        build_index(options(project, stage="merge", **changes))
    build_index(options(project, stage="add", shard="1/2", **changes))
    build_index(options(project, stage="merge", **changes))
    assert contents(project / "index") == expected
    assert caplog.text.count(f"train index: {STRING}, as --index says") == 2
    assert caplog.text.count("measure index: in list order, nprobe 1, recall@2 ") == 2
    assert not list(project.glob(".lock*"))
    with pytest.raises(ConfigurationError, match="--shard"):
        build_index(options(project, stage="merge", shard="1/2", **changes))


def read_neighbors(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Neighbors and distances, file by file."""
    read = {}
    for name in files:
        if name.endswith(".hdf5"):
            with h5py.File(io.BytesIO(files[name])) as file:
                key = "distances" if "distances" in name else "neighbors"
                read[name] = file[key][:]
    return read


def test_parts_on_ranks_give_the_neighbors_of_one_index(prepared, tmp_path):
    """To the bit: in list order, a distance depends on its query and its vector alone."""
    project = tmp_path / "project"
    shutil.copytree(prepared, project)
    expected = read_neighbors(index_and_query(project, {}))
    shutil.rmtree(project)
    for world in (1, 2):
        shutil.copytree(prepared, project)
        found = read_neighbors(run_ranks(world, index_and_query, project, {"split_index": True})[0])
        assert set(found) == set(expected)
        for name, rows in found.items():
            np.testing.assert_array_equal(rows, expected[name])
        paths = ProjectPaths(project)
        assert ProjectSettings.load(project).index_split
        assert not paths.added_index(STRING).exists()
        shutil.rmtree(project)


def query_with(project: Path, together: list[int]) -> tuple[dict[str, bytes], int]:
    """Search with so many chunks together, as each rank sees it; most of one search, too."""
    asked, search = [], list_order.ListOrderSearch.search

    def counted(self, vectors, k):
        asked.append(len(vectors))
        return search(self, vectors, k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbor_search, "BATCH", 8)
        patch.setattr(list_order, "_queries_in", lambda *_: together[get_rank()])
        patch.setattr(list_order.ListOrderSearch, "search", counted)
        query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    return contents(project / "query"), max(asked, default=0)


def test_how_many_chunks_are_searched_together_changes_no_byte(tmp_path):
    """Parts of a file of 60 chunks, several files, all of them; ranks may see different memory."""
    prepared, project = tmp_path / "prepared", tmp_path / "project"
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents(30, 500))
    preprocess_corpus(preprocess_options(prepared, corpus, samples="aligned", retro_block_size=60))
    build_db(BuildDbOptions(str(prepared)))
    build_index(options(prepared))
    found, most = [], []
    for together in ([16], [130], [10_000], [10_000, 130]):
        shutil.copytree(prepared, project)
        if len(together) == 1:
            ranks = [query_with(project, together)]
        else:
            ranks = run_ranks(len(together), query_with, project, together)
        found.append(ranks[0][0])
        most.append(max(asked for _, asked in ranks))
        shutil.rmtree(project)
    assert len(found[0]) > 20
    for files in found[1:]:
        assert [
            name for name in {**files, **found[0]} if files.get(name) != found[0].get(name)
        ] == []
    assert most[0] == 16 < 60 < most[1] <= 130 < most[2]
    assert most[3] == most[1]  # ranks agree


@pytest.mark.slow
def test_a_kill_while_merging_loses_nothing(prepared, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(prepared, project)
    build_index(options(project, on_disk=True))
    expected = contents(project / "index")
    folder = ProjectPaths(project).index_dir(STRING)
    for name in ("added_1.000_1.000.ivfdata", "added_1.000_1.000.faissindex"):
        for path in folder.glob("added*"):
            path.unlink()
        process = multiprocessing.get_context(START_METHOD).Process(
            target=build_index, args=(options(project, on_disk=True, stage="merge"),)
        )
        process.start()
        deadline = time.monotonic() + 120
        while not list(folder.glob(f"*{name}*")) and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.kill()
        process.join()
        build_index(options(project, on_disk=True))
        assert contents(project / "index") == expected
