"""What ranks of tests/distributed/test_watch.py do: healthy jobs, and sick ones."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from retro_mcore import distributed, progress, rank_state, watch
from retro_mcore.cli.log_files import logged_run
from retro_mcore.errors import ConfigurationError

#: Minutes of a collective's limit: a rank may be silent for 6 seconds.
LIMIT = 0.1
#: Longer than any limit here.
LONG = 12.0


def catches(rank: int) -> None:
    """Rank 1 catches an error of its own and ends early."""
    if rank == 1:
        try:
            with logged_run("first", ()):
                raise ValueError("caught")
        except ValueError:
            pass
    else:
        time.sleep(LONG)


def catches_together(rank: int) -> None:
    """All ranks catch one error; the next command is watched again."""
    try:
        with logged_run("first", ()), distributed.raise_together():
            raise ConfigurationError("flag", "0", "Mend it")
    except ConfigurationError:
        pass
    with logged_run("second", ()):
        time.sleep(LONG if rank == 0 else LONG / 4)
        assert watch._watch._status == rank_state.RUNS


def opens_too_many_files(rank: int) -> None:
    """Rank 0 cannot open /proc any more."""
    if rank:
        time.sleep(LONG)
        return
    time.sleep(2)
    used = len([*Path("/proc/self/fd").iterdir()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1, used + 64))
    time.sleep(LONG - 4)


def keeps_the_lock(rank: int) -> None:
    """Rank 0 computes for longer than the limit, in C code that keeps Python's lock."""
    if rank:
        time.sleep(2 * LONG)
        return
    seconds, letters = 0.0, 24
    while seconds < 2 / 3 * LONG:
        began = time.monotonic()
        re.match(r"(a+)+$", "a" * letters + "b")
        seconds, letters = time.monotonic() - began, letters + 1


def cannot_tell(rank: int) -> None:
    """Rank 0's progress cannot be shown, so its watch fails where it describes it."""

    class Broken:
        def __str__(self) -> str:
            raise ZeroDivisionError

    if rank == 0:
        progress._latest = Broken()  # type: ignore[assignment]
    time.sleep(LONG)


def breaks(rank: int) -> None:
    """Rank 0's watch cannot read what somebody wrote."""
    time.sleep(2)
    if rank == 0:
        watch._watch._connect().set("verdict", "no JSON")
    time.sleep(LONG / 2)


def sleeps(rank: int) -> None:
    """Both are stopped, as a suspended machine, and one goes on before the other."""
    time.sleep(LONG)


def works(rank: int) -> None:
    """Both work for longer than any test waits for a fault."""
    time.sleep(10 * LONG)


def works_alone(rank: int) -> None:
    """Rank 1 computes without a step for longer than a rank may do nothing, and rank 0 waits."""
    end = time.monotonic() + 4 * LONG
    while rank == 1 and time.monotonic() < end:
        sum(range(1_000_000))
    distributed.barrier()


def reads_in_vain(rank: int) -> None:
    """Rank 1 reads what nobody writes, as from a file system whose server is gone."""
    reader, _writer = os.pipe()
    if rank == 1:
        os.read(reader, 1)
    distributed.barrier()


def is_killed(rank: int) -> None:
    """Rank 1 ends without leaving."""
    time.sleep(3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10 * LONG)


def freezes(rank: int) -> None:
    """Rank 1 is stopped."""
    time.sleep(3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(10 * LONG)


def is_stuck_at_its_end(rank: int) -> None:
    """Rank 1 raises, and its end does not end, as where a library waits for other ranks."""
    if rank == 1:
        multiprocessing.util.Finalize(None, time.sleep, (10 * LONG,), exitpriority=1)
        raise ValueError("something is broken")
    time.sleep(10 * LONG)


def main(function: Callable[[int], None], limit: float = LIMIT, stall: float | None = None) -> None:
    """Join, and be healthy or not."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank = int(os.environ["RANK"])
    distributed.initialize("gloo", limit, stall)
    print("joined", flush=True)
    function(rank)
    print("done", flush=True)


def of_multiprocessing(rank: int, environment: dict[str, str]) -> None:
    """The rank of a process that multiprocessing starts."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    distributed.initialize("gloo", LIMIT)
    time.sleep(LONG if rank == 0 else 1)


if __name__ == "__main__":
    main(globals()[sys.argv[1]], *map(json.loads, sys.argv[2:]))
