"""The neighbors of an aligned project's chunks: the same bytes after a kill and on any ranks."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.retrieval import neighbor_search
from tests.processes import START_METHOD, run_ranks
from tests.unit.data.aligned import aligned_database
from tests.unit.data.projects import documents, forget_neighbors, write_corpus

pytestmark = pytest.mark.distributed


def search(project: Path) -> None:
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))


def append(project: Path, corpus: Path) -> int | None:
    """Returns how many new chunks were searched."""
    result = update_db(UpdateDbOptions(str(project), append=[str(corpus)]))
    return result.neighbors.num_searched if result.neighbors else None


def search_and_die(project: Path) -> None:
    """Search, and be killed in the middle of the fourth file."""
    find_copies, left = neighbor_search.find_copies, iter(range(3))

    def find_or_die(*given):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return find_copies(*given)

    neighbor_search.find_copies = find_or_die
    search(project)


def tables(project: Path) -> dict[str, bytes]:
    query = project / "query"
    return {
        str(path.relative_to(query)): path.read_bytes()
        for path in sorted(query.rglob("*"))
        if path.is_file() and path.suffix != ".tmp"
    }


@pytest.mark.slow
def test_a_killed_search_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    project = aligned_database(tmp_path, True, documents(12, 200))
    build_index(BuildIndexOptions(str(project), embedder="lexical", index="IVF4,Flat"))
    search(project)
    undisturbed = tables(project)
    settings = (project / "retro_mcore.json").read_bytes()

    forget_neighbors(project)
    process = multiprocessing.get_context(START_METHOD).Process(
        target=search_and_die, args=(project,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (project / "stages" / "query_neighbors.json").exists()
    left = tables(project)
    assert 0 < len(left) < len(undisturbed)
    # The searched files are kept, and two ranks do the rest.
    done = list(project.glob("query/chunks_train/*.hdf5"))
    kept = {path: path.stat().st_ino for path in done}
    run_ranks(2, search, project)
    assert tables(project) == undisturbed
    assert {path: path.stat().st_ino for path in done} == kept
    assert (project / "retro_mcore.json").read_bytes() == settings

    # New documents: on two ranks, and on one.
    corpus = write_corpus(tmp_path / "more.jsonl", documents(60, 200)[40:44])
    copy = shutil.copytree(project, tmp_path / "copy")
    searched = run_ranks(2, append, project, corpus)
    assert searched == [append(copy, corpus)] * 2
    assert searched[0]
    assert tables(project) == tables(copy)
