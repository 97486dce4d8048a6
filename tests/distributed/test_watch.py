"""The watch over ranks: a healthy job never ends by it, a sick one does, and the store may stop.

A real store, and real processes. Times are those of the watch; a test waits for longer.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from retro_mcore import rank_state
from retro_mcore.fault_report import lost_contact
from retro_mcore.rank_state import RUNS, OwnState, has_ended
from retro_mcore.watch import Watch
from tests.distributed import watched_run
from tests.rendezvous import host_store

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are listed on Linux only"),
]

_TIME = 300
_TIMED_OUT = RuntimeError("[/x/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting")


def start(address: dict[str, str], name: str, *arguments: str) -> list[subprocess.Popen]:
    """Two ranks of a job on one node."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.watched_run", name, *arguments],
            env={
                **os.environ,
                **address,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def outputs(ranks: list[subprocess.Popen]) -> list[str]:
    return [rank.communicate(timeout=_TIME)[0] for rank in ranks]


def _slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(
    "name",
    [
        "catches",
        *_slow("catches_together", "opens_too_many_files", "keeps_the_lock"),
        *_slow("cannot_tell", "breaks"),
    ],
)
def test_a_healthy_job_goes_on(name):
    store, address = host_store()
    ranks = start(address, name)
    texts = outputs(ranks)
    del store
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    assert "this rank ends too" not in "".join(texts)
    assert all("done" in text for text in texts)


@pytest.mark.slow
def test_a_suspended_job_goes_on():
    store, address = host_store()
    ranks = start(address, "sleeps")
    for rank in ranks:
        assert rank.stdout.readline() == "joined\n"
    time.sleep(2)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * 60 * watched_run.LIMIT)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
        time.sleep(60 * watched_run.LIMIT / 3)
    texts = outputs(ranks)
    del store
    assert texts == ["done\n", "done\n"]


@pytest.mark.parametrize("method", ["fork", *_slow("spawn", "forkserver")])
def test_processes_of_multiprocessing_leave(method):
    """They end by os._exit."""
    store, address = host_store()
    context = multiprocessing.get_context(method)
    environment = {**address, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        context.Process(target=watched_run.of_multiprocessing, args=(rank, environment))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(_TIME)
    del store
    assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("is_killed", "has ended; last seen in"),
        ("freezes", "has not answered for"),
        ("is_stuck_at_its_end", "failed in its start: ValueError: something is broken"),
    ],
)
def test_a_sick_job_ends(name, told):
    store, address = host_store()
    ranks = start(address, name)
    if name == "is_killed":
        ranks[1].wait(_TIME)
    text = ranks[0].communicate(timeout=_TIME)[0]
    ranks[1].kill()
    ranks[1].communicate()
    del store
    assert ranks[0].returncode == 1
    assert told in text
    assert "this rank ends too. Its threads:" in text


@pytest.mark.slow
def test_a_rank_that_works_for_long_is_told():
    """It does not end the job, however long that takes."""
    store, address = host_store()
    ranks = start(address, "works_alone", "10", "0.4")
    texts = outputs(ranks)
    del store
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    assert re.search(r"rank 1 \(.*\) keeps 1 of 2 ranks waiting, for up to \d+ s", texts[0])
    assert "this rank ends too" not in "".join(texts)


@pytest.mark.slow
def test_a_rank_that_does_nothing_ends_the_job():
    """Long before the limit of collectives; both log their stacks."""
    store, address = host_store()
    ranks = start(address, "reads_in_vain", "60", "1")
    texts = outputs(ranks)
    del store
    assert [rank.returncode for rank in ranks] == [1, 1], texts
    for text in texts:
        assert re.search(r"rank 1 \(.*\) has done nothing for \d+ s: it computed nothing", text)
        assert "this rank ends too. Its threads:" in text


_STORE = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limit"),
    [("works", "0.1"), ("sleeps", "10")],
    ids=["the rank ends", "the rank leaves"],
)
def test_a_store_that_stops_holds_nobody_up(name, limit):
    """A rank that leaves goes on; one that works ends after the time of a silent rank."""
    server = subprocess.Popen([sys.executable, "-c", _STORE], stdout=subprocess.PIPE, text=True)
    port = server.stdout.readline().strip()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    address |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = start(address, name, limit)
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "joined\n"
        time.sleep(2)
        server.send_signal(signal.SIGSTOP)
        texts = outputs(ranks)
    finally:
        server.kill()
        server.communicate()
        for rank in ranks:
            rank.kill()
    if name == "sleeps":
        assert [rank.returncode for rank in ranks] == [0, 0], texts
        assert all("done" in text for text in texts)
    else:
        assert [rank.returncode for rank in ranks] == [1, 1], texts
        assert all("has not answered for" in text for text in texts)


def test_ranks_that_look_for_a_fault_are_none(caplog):
    """Ranks 0 and 2 have waited in vain for rank 1, which lives; rank 0 ends its search first."""
    store, address = host_store()

    def connect() -> dist.Store:
        return dist.TCPStore(address["MASTER_ADDR"], int(address["MASTER_PORT"]), is_master=False)

    first, second = (Watch(connect, rank, 3, [], limit) for rank, limit in ((0, 0.1), (2, 0.15)))
    late = OwnState(1)
    for watch in (second, first):
        watch.start()
    ranks = [
        threading.Thread(target=watch.explain, args=(_TIMED_OUT,)) for watch in (second, first)
    ]
    for number, rank in enumerate(ranks):
        time.sleep(0.1 * number)
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        store.set("rank/1", replace(late.now(RUNS, ""), waits=False, work="its work").text())
        time.sleep(0.1)
    for watch in (first, second):
        watch.leave()
    told = [record.message for record in caplog.records if record.levelname == "CRITICAL"]
    assert re.match(r"rank 1 \(.*\) keeps the others waiting: .* its work", told[0]), told
    assert "has not answered" not in "".join(told)


def test_only_a_process_that_is_surely_gone_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    state = OwnState(0).now(RUNS, "")
    process = rank_state.process_of(child.pid)
    assert process is not None
    other = replace(state, pid=child.pid, started=process.started)
    assert [has_ended(each) for each in (state, other, replace(state, started=0))] == [False] * 3
    child.communicate(b"\n")
    assert has_ended(other)
    assert has_ended(replace(state, started=state.started + 1))
    assert not has_ended(replace(other, started=0))


def test_only_processes_of_one_table_are_compared():
    own = OwnState(0)
    state = own.now(RUNS, "")
    assert own.shares_processes_with(state)
    for node in ("", "other " + state.node):
        assert not own.shares_processes_with(replace(state, node=node))


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("DataLoader timed out after 5 seconds"), False),
        (RuntimeError("socket is closed"), False),
        (TimeoutError("timed out"), False),
        (dist.DistStoreError("wait timeout after 5ms"), False),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("Gloo connectFullMesh failed with timed out"), True),
    ],
)
def test_only_collectives_lose_contact(error, is_lost):
    assert (lost_contact(error) is not None) == is_lost
