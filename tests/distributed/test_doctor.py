"""`doctor` on several real processes: they meet, all-reduce, and miss those that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rendezvous import host_store

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


def run_doctor(folder: Path, world_size: int, started: int, seconds: float) -> dict:
    """Start some ranks of a job; what the first one wrote, after all ended with its exit code."""
    _store, address = host_store()
    found = folder / "found.json"
    command = [sys.executable, "tools/doctor.py", "--device", "cpu", "--save", str(folder / "run")]
    command += ["--time-limit", str(seconds), "--json", str(found)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
                 **address},
        )
        for rank in range(started)
    ]  # fmt: skip
    codes = {process.wait(1800) for process in processes}
    written = json.loads(found.read_text())
    assert codes == {written["exit_code"]}
    return written


@pytest.mark.slow
def test_two_ranks(tmp_path):
    written = run_doctor(tmp_path, 2, 2, 600)
    assert not [found for found in written["findings"] if found["level"] == "error"]
    by_subject = {found["subject"]: found for found in written["findings"]}
    assert "2 ranks, 4 MiB" in by_subject["gloo all-reduce"]["found"]
    assert by_subject["gloo all-reduce"]["ranks"] == [0]
    assert by_subject["CPU"]["ranks"] == [0, 1]
    assert list(tmp_path.iterdir()) == [tmp_path / "found.json"]


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(tmp_path):
    """Ranks that are there take seconds to load; the third is waited for as long again."""
    written = run_doctor(tmp_path, 3, 2, 60)
    assert written["exit_code"] == 2
    (absent,) = [found for found in written["findings"] if found["area"] == "network"]
    assert (absent["subject"], absent["level"]) == ("ranks 2", "error")
    assert absent["found"] == "did not come to 'the start'"
