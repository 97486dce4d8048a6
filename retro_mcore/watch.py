"""A watch over the ranks of a job: all end, with a name and their stacks, if one is gone.

Each rank has a thread that tells the others, through a key-value store, that it lives and what it
does. See docs/decisions/0032-a-watch-over-ranks.md for what is a fault, and after which time.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from retro_mcore.fault_report import lost_contact, places, stacks, timed_out
from retro_mcore.rank_state import LEFT, RUNS, OwnState, RankState, has_ended, process_of

_LOG = logging.getLogger(__name__)

#: Seconds between a rank's heartbeats.
BEAT = 5.0
#: Seconds without a heartbeat after which a rank counts as gone. Long enough for an overloaded
#: node, and for a call into a library that keeps Python's lock.
SILENCE = 300.0
_EXIT_CODE = 1
_STORE_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Verdict:
    """Why the job ends.

    Attributes:
        gone: Ranks that cannot report any more.
        lines: What happened.
    """

    gone: Sequence[int]
    lines: Sequence[str]


class Watch:
    """A rank's part of the watch.

    Args:
        connect: Makes a client of a store that the ranks share. The watch uses it alone, since a
            client that waits for a key blocks.
        rank: This rank.
        world_size: Number of ranks.
        on_node: Ranks that may run on this node.
        limit_minutes: Time limit of collectives.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        world_size: int,
        on_node: Iterable[int],
        limit_minutes: float,
    ) -> None:
        self._connect, self._store = connect, connect()
        self._rank, self._world_size = rank, world_size
        self._limit_minutes = limit_minutes
        self._silence = min(SILENCE, 60 * limit_minutes)
        self._pause = min(BEAT, self._silence / 10)
        self.own, self._status, self._pid = OwnState(rank), RUNS, os.getpid()
        self._on_node: dict[int, RankState | None] = {
            other: None for other in on_node if other != rank and other < world_size
        }
        self._next, self._seen, self._silent = rank, (-1, -1), 0.0
        self._store_silent = 0.0
        self._lock, self._stopped = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Tell the others that this rank lives, and go on in a thread."""
        self._tell_state()
        self._thread.start()

    def leave(self) -> None:
        """Tell that this rank has no more part in the job."""
        if os.getpid() != self._pid or self._stopped.is_set():
            return
        with self._lock, suppress(RuntimeError, ValueError):  # the store may have ended before
            self._stopped.set()
            if self._status == RUNS:
                self._status = LEFT
                self._tell_state()
        self._thread.join(self._pause)

    def stop(self) -> None:
        """Tell nothing more: this process ends by an error."""
        with self._lock:
            self._stopped.set()
        self._thread.join(self._pause)

    def explain(self, error: BaseException) -> None:
        """Tell why this rank ends by an error: its own, or which other rank is gone."""
        if os.getpid() != self._pid or self._stopped.is_set():
            return
        self.own.fail(error)
        if getattr(error, "raised_together", False):
            self.leave()
        elif (text := lost_contact(error)) is None:
            with self._lock, suppress(RuntimeError, ValueError):
                self._status = f"{type(error).__name__}: {error}"
                self._tell_state()
        else:
            with suppress(RuntimeError, ValueError), _undisturbed():
                self._report(self._find(timed_out(text)))

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self._pause):
            # A watch that was held up itself knows nothing about the others in that time.
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * self._pause), now
            with self._lock:
                if self._stopped.is_set():
                    return
                try:
                    self._turn(elapsed)
                    self._store_silent = 0.0
                except (RuntimeError, ValueError):
                    if not self._await_store(elapsed):
                        return

    def _turn(self, elapsed: float) -> None:
        self._tell_state()
        verdict = self._verdict() or self._accuse(self._ended()) or self._accuse_silent(elapsed)
        if verdict is not None:
            self._report(verdict)
            os._exit(_EXIT_CODE)

    def _tell_state(self) -> None:
        self._store.set(f"rank/{self._rank}", self.own.now(self._status).text())

    def _read(self, rank: int) -> RankState | None:
        key = f"rank/{rank}"
        return RankState.parse(self._store.get(key)) if self._store.check([key]) else None

    def _read_all(self) -> list[RankState]:
        keys = [f"rank/{rank}" for rank in range(self._world_size)]
        if self._store.check(keys):
            return [RankState.parse(text) for text in self._store.multi_get(keys)]
        return [state for rank in range(self._world_size) if (state := self._read(rank))]

    def _verdict(self) -> Verdict | None:
        if not self._store.check(["verdict"]):
            return None
        return Verdict(**json.loads(self._store.get("verdict")))

    def _accuse(self, gone: dict[int, str], lines: Sequence[str] = ()) -> Verdict | None:
        """Tell all ranks why the job ends; the first to tell is heard.

        Args:
            gone: What happened to ranks that are gone.
            lines: More lines.
        """
        if not gone and not lines:
            return None
        mine = json.dumps({"gone": sorted(gone), "lines": [*gone.values(), *lines]})
        return Verdict(**json.loads(self._store.compare_set("verdict", "", mine)))

    def _ended(self) -> dict[int, str]:
        """Ranks on this node whose process has ended without leaving the job."""
        found = {}
        for rank, known in self._on_node.items():
            state = self._on_node[rank] = known or self._read(rank)
            if state is None or not self.own.shares_processes_with(state) or not has_ended(state):
                continue
            last = self._read(rank) or state
            if last.status == RUNS:
                found[rank] = f"{last.name} has ended; last seen in {last.doing}"
            elif last.status != LEFT:
                found[rank] = last.failure
        return found

    def _accuse_silent(self, elapsed: float) -> Verdict | None:
        """Look at the next rank that has not left; each rank looks at one."""
        for rank in (*range(self._next, self._world_size), *range(self._next)):
            state = None if rank == self._rank else self._read(rank)
            if state is not None and state.status != LEFT:
                break
        else:
            return None
        process = process_of(state.pid) if self.own.shares_processes_with(state) else None
        seen = (state.beat, process.cpu if process else 0)
        if rank != self._next or seen != self._seen:
            self._next, self._seen, self._silent = rank, seen, 0.0
            return None
        self._silent += elapsed
        if self._silent < self._silence:
            return None
        return self._accuse(self._without_beats(state))

    def _without_beats(self, first: RankState) -> dict[int, str]:
        """A silent rank and the others that were last heard about as long ago."""
        states = [state for state in self._read_all() if state.status != LEFT]
        now = max(state.time for state in states)
        return {
            state.rank: state.silence(now - state.time) if state.status == RUNS else state.failure
            for state in states
            if state.rank == first.rank or now - state.time > self._silence / 2
        }

    def _find(self, is_late: bool) -> Verdict:
        """Find out which rank is gone, after a collective has failed; the thread stops then."""
        with self._lock:
            before = {state.rank: state.beat for state in self._read_all()}
        started, rounds = time.monotonic(), 0
        while (patience := time.monotonic() - started) < 3 * self._pause:
            with self._lock:
                failed = {}
                if patience >= rounds * self._pause:  # all ranks may ask for all states
                    failed, rounds = self._failed(), rounds + 1
                found = self._verdict() or self._accuse(self._ended() or failed)
                if found is not None:
                    self._stopped.set()  # the thread would report it too
                    return found
            time.sleep(0.1 if patience < 1 else 1.0)
        with self._lock:
            self._tell_state()
            states = self._read_all()
            others = [each for each in states if each.status == RUNS and each.rank != self._rank]
            gone = {
                state.rank: state.silence(patience)
                for state in others
                if state.beat == before.get(state.rank)
            }
            lines = [*([] if gone else self._awaited(others)), *places(states)]
            verdict = self._accuse(gone, [*lines, *([self._hint()] if is_late else [])])
            assert verdict is not None
            self._stopped.set()
            return verdict

    def _failed(self) -> dict[int, str]:
        """Ranks of any node that told of an error of their own."""
        return {
            state.rank: state.failure
            for state in self._read_all()
            if state.status not in (RUNS, LEFT)
        }

    def _awaited(self, others: Sequence[RankState]) -> list[str]:
        """Of ranks that do not wait for others."""
        return [
            f"{state.name} keeps the others waiting: for {state.time - state.since:.0f} s it has "
            f"been in {state.doing}"
            for state in others
            if not state.waits
        ] or [f"rank {self._rank} lost contact, but no rank is known to be gone"]

    def _hint(self) -> str:
        return (
            f"a collective may take {self._limit_minutes:g} minutes: if that rank was at work, "
            "raise --distributed-timeout-minutes"
        )

    def _report(self, verdict: Verdict) -> None:
        """Say why the job ends, and where this rank is; then give the others time to do so too."""
        for line in verdict.lines:
            _LOG.critical("%s", line)
        _LOG.critical("this rank ends too. Its threads:\n%s", stacks())
        reported = self._store.add("reported", 1)
        end = time.monotonic() + 2 * self._pause
        while reported < self._world_size - len(verdict.gone) and time.monotonic() < end:
            time.sleep(0.1)
            reported = self._store.add("reported", 0)

    def _await_store(self, elapsed: float) -> bool:
        """Whether to go on, after the store did not answer; if possible, with a new connection.

        If the process that serves it has ended, nothing can be told any more: rank 0 may have
        finished, and otherwise collectives fail by themselves.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with suppress(TimeoutError, OSError):
            try:
                socket.create_connection((host, port), timeout=self._pause).close()
            except (ConnectionRefusedError, ConnectionResetError):
                return False
            with suppress(RuntimeError, ValueError):
                self._store = self._connect()
        self._store_silent += elapsed
        if self._store_silent < self._silence:
            return True
        _LOG.critical(
            "%s:%s, where the ranks meet (rank 0 or its launcher), has not answered for %.0f s. "
            "This rank ends too. Its threads:\n%s",
            host,
            port,
            self._store_silent,
            stacks(),
        )
        os._exit(_EXIT_CODE)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Finish although a launcher sends SIGTERM, as it does to all ranks when one has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


_watch: Watch | None = None
_round = count()


def start(rank: int, world_size: int, limit_minutes: float) -> None:
    """Start to watch the ranks that have just joined the default group by environment variables."""
    global _watch
    place = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_round)}"

    def connect() -> dist.Store:
        client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=_STORE_TIMEOUT,
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"retro_mcore/watch/{place}", client)

    first = rank - int(os.environ.get("LOCAL_RANK", 0))
    on_node = range(max(first, 0), first + int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    _watch = Watch(connect, rank, world_size, on_node, limit_minutes)
    _watch.own.command = _command
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, AttributeError):  # stderr without a file
            faulthandler.enable()  # NCCL's own watchdog aborts
    _watch.start()


_command = ""


def begin(command: str) -> None:
    """Tell the others which command this rank runs."""
    global _command
    _command = command
    if _watch is not None:
        _watch.own.command = command


def leave() -> None:
    """This rank has done its part; see `Watch.leave`."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def stop() -> None:
    """This process ends by an error; see `Watch.stop`."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def explain(error: BaseException) -> None:
    """This rank ends by an error; see `Watch.explain`."""
    if _watch is not None:
        _watch.explain(error)
