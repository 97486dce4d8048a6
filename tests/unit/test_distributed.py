"""One rank's error becomes every rank's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retro_mcore.distributed import (
    PeerError,
    broadcast_object,
    get_rank,
    get_world_size,
    raise_together,
)
from retro_mcore.errors import ConfigurationError, CorpusError
from tests.processes import run_ranks
from tests.rendezvous import host_store


def test_alone_without_a_process_group():
    assert (get_rank(), get_world_size(), broadcast_object("x")) == (0, 1, "x")
    with pytest.raises(ValueError, match="mine"), raise_together():
        raise ValueError("mine")


#: A collective whose tensor is released by gloo's thread, while the interpreter ends: the tensor
#: holds an object that takes its time to go. Without `leave`, this aborts more often than not.
_SLOW_TO_GO = """
import time
import torch
from retro_mcore.distributed import initialize

class SlowToGo:
    def __del__(self):
        for _ in range(10):
            time.sleep(0.05)

initialize("gloo")
for _ in range({collectives}):
    tensor = torch.ones(1 << 22)
    tensor.attribute = SlowToGo()
    torch.distributed.all_reduce(tensor, async_op=True)
    del tensor
"""

_PARALLEL = """
import os
from retro_mcore.platform import use_cpu
use_cpu()
from retro_mcore.training.setup.initialize import initialize_parallel
from retro_mcore.distributed import leave

def threads():
    comms = (open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task"))
    return sum("gloo" in comm for comm in comms)

initialize_parallel()
before = threads()
leave()
print(before, threads())
"""


def _run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize("collectives", [1, 3])
def test_the_interpreter_ends_after_gloos_threads(collectives):
    """Whose training had printed its summary, and then ended with SIGABRT."""
    done = _run(_SLOW_TO_GO.format(collectives=collectives))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed on Linux only")
def test_leaving_ends_the_threads_of_megatrons_groups_too():
    before, after = map(int, _run(_PARALLEL).stdout.split())
    assert before > 2
    assert after == 0


#: Rank 1 goes on until its watch has noticed that nobody can be told anything any more.
_OUTLIVES = """
import os
import time
from retro_mcore import watch
from retro_mcore.distributed import initialize

initialize("gloo")
thread = watch._watch._thread
print("joined", flush=True)
while os.environ["RANK"] == "1" and thread.is_alive():
    time.sleep(0.1)
"""


@pytest.mark.distributed
def test_a_store_that_ends_with_other_ranks_is_no_fault():
    store, address = host_store()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _OUTLIVES],
            env={**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    assert ranks[0].communicate(timeout=300)[0] == "joined\n"
    assert ranks[1].stdout.readline() == "joined\n"
    del store
    output = ranks[1].communicate(timeout=300)[0]  # TCPStore itself logs a lost connection
    assert "rank ends" not in output
    assert "Traceback" not in output
    assert [rank.returncode for rank in ranks] == [0, 0]


@pytest.mark.distributed
def test_two_ranks():
    assert run_ranks(2, what_each_rank_sees) == [
        {
            "user error": ("CorpusError", "a.jsonl: line 3. Mend it"),
            "both": ("ConfigurationError", "rank: 0. Mend it"),
            "other": ("PeerError", "rank 1 failed: ValueError: broken"),
            "broadcast": "from 0",
        },
        {
            "user error": ("CorpusError", "a.jsonl: line 3. Mend it"),
            "both": ("ConfigurationError", "rank: 1. Mend it"),
            "other": ("ValueError", "broken"),
            "broadcast": "from 0",
        },
    ]


def what_each_rank_sees():
    def seen(function):
        try:
            with raise_together():
                function()
        except (ConfigurationError, CorpusError, PeerError, ValueError) as error:
            return type(error).__name__, str(error)
        return None

    def only_rank_1(error):
        if get_rank() == 1:
            raise error

    def everybody():
        raise ConfigurationError("rank", str(get_rank()), "Mend it")

    return {
        "user error": seen(lambda: only_rank_1(CorpusError("a.jsonl", "line 3", "Mend it"))),
        "both": seen(everybody),
        "other": seen(lambda: only_rank_1(ValueError("broken"))),
        "broadcast": broadcast_object(f"from {get_rank()}"),
    }
