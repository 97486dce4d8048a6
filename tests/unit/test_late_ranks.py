"""Who keeps others waiting is told ever more rarely; who surely does nothing is a fault."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from retro_mcore import activity
from retro_mcore.activity import Activity
from retro_mcore.errors import ConfigurationError
from retro_mcore.late_ranks import LATE, LateRanks
from retro_mcore.rank_state import LEFT, RUNS, OwnState, RankState
from retro_mcore.time_limit import check_stall

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="bytes are counted on Linux only")


def state(rank: int, **changes: object) -> RankState:
    changes = {"waits": False, "work": "its work", **changes}
    return replace(OwnState(rank).now(RUNS, ""), **changes)


def test_late_ranks_are_told_again_after_twice_the_time():
    ranks, told = LateRanks(60.0), []
    for minutes in range(100):
        waiting = state(0, waits=True, unchanged=60.0 * minutes)
        left = replace(state(2), status=LEFT)
        lines = ranks.warnings([waiting, state(1, stepped=7.0), left])
        told += [(minutes, line) for line in lines]
    assert [minutes for minutes, _ in told] == [10, 20, 40, 80]
    assert "rank 1 (" in told[0][1]
    assert "keeps 1 of 3 ranks waiting, for up to 600 s" in told[0][1]
    assert "its last step 7 s ago" in told[0][1]
    assert ranks.warnings([state(0, waits=True, unchanged=0.0), state(1)]) == []
    assert len(ranks.warnings([state(0, waits=True, unchanged=LATE), state(1)])) == 1  # anew


def test_nobody_is_late_where_the_last_has_just_come():
    ranks = LateRanks(60.0)
    first, last = (state(rank, waits=True, unchanged=LATE) for rank in (0, 1))
    assert ranks.warnings([first, replace(last, unchanged=1.0)]) == []
    assert ranks.warnings([first, last])[0].startswith("all ranks wait for one another, 600 s")


def test_only_a_rank_that_surely_does_nothing_is_a_fault():
    idle = state(1, idle=3600.0, stepped=3600.0)
    assert LateRanks(60.0).stalled([state(0), state(2, idle=3599.0, stepped=1e6)]) == []
    (line,) = LateRanks(60.0).stalled([state(0), idle])
    assert line.startswith("rank 1 (")
    assert "has done nothing for 3600 s" in line
    assert LateRanks(60.0).stalled([replace(idle, waits=True)]) == []
    assert LateRanks(60.0).stalled([replace(idle, status=LEFT)]) == []
    assert LateRanks(0.0).stalled([idle]) == []  # no limit


@pytest.mark.parametrize("minutes", [-1.0, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(minutes):
    with pytest.raises(ConfigurationError, match="--stall-timeout-minutes"):
        check_stall(minutes)


@pytest.mark.parametrize(
    ("used", "idles"),
    [
        ([(0.0, 0)] * 9, True),
        ([(0.1 * i, 1000 * i) for i in range(9)], True),  # the watch itself
        ([(1.0 * i, 0) for i in range(9)], False),
        ([(0.0, 10_000_000 * i) for i in range(9)], False),
        ([(0.0, -1 * i) for i in range(9)], False),  # a process of its own has ended
        ([None] * 9, False),
    ],
)
def test_any_sign_of_work_counts(monkeypatch, used, idles):
    """In windows of 60 s; the first measures nothing yet."""
    clock, values = [0.0], iter(used)
    monkeypatch.setattr(activity.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(activity, "_used", lambda: next(values))
    measured, found = Activity(60.0), []
    for _ in range(5 * 12):
        clock[0] += 5.0
        found.append(measured.idle(has_moved=False))
    assert max(found) == (240.0 if idles else 55.0)
    assert measured.idle(has_moved=True) == 0.0
    clock[0] += 1000.0  # suspended
    assert measured.idle(has_moved=False) == 0.0


@on_linux
def test_what_this_process_and_its_own_use(tmp_path):
    computed, moved = activity._used()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    after = activity._used()
    assert after[0] >= computed + 0.05
    assert after[1] >= moved + (1 << 20)
    busy = "import os\nos.write(1, b'x')\nwhile True: pass"
    child = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
    child.stdout.read(1)
    before = activity._used()[0]
    while activity._used()[0] < before + 0.05:  # of the child, or this test does not end
        time.sleep(0.05)
    child.kill()
    child.communicate()
