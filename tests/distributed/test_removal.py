"""Documents are removed and the database is compacted: the same after SIGKILL and on any ranks."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.retrieval import following_search
from retro_mcore.retrieval.database import ChunkDatabase
from tests.distributed.test_aligned_search import search, tables
from tests.processes import START_METHOD, run_ranks
from tests.unit.data.aligned import aligned_database
from tests.unit.data.projects import documents

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

REMOVED = ["topic-9", "0_text_document:2"]


def compact(project: Path) -> None:
    update_db(UpdateDbOptions(str(project), remove=REMOVED, compact=True))


def compact_and_die(project: Path, left: int) -> None:
    """Be killed before one of the files of neighbors is written."""
    write = following_search.FollowingSearch._write
    files = iter(range(left))

    def write_or_die(*given):
        if next(files, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*given)

    following_search.FollowingSearch._write = write_or_die
    compact(project)


def test_a_killed_removal_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    project = aligned_database(tmp_path / "a", True, documents(12, 200))
    build_index(BuildIndexOptions(str(project), embedder="lexical", index="IVF4,Flat"))
    search(project)
    straight = shutil.copytree(project, tmp_path / "straight")
    compact(straight)
    count = len(list((straight / "query").glob("chunks_*_*/*.hdf5")))
    for left in (2, 2 + count // 2):  # in the first search, and after compacting
        process = multiprocessing.get_context(START_METHOD).Process(
            target=compact_and_die, args=(project, left)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        database = ChunkDatabase.open(project)
        assert database.removed is not None  # marked before anything is searched
    run_ranks(2, compact, project)
    assert ChunkDatabase.open(project).removed is None
    assert tables(project) == tables(straight)
