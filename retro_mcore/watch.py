"""A watch over the ranks of a job: all end, with a name and their stacks, if one is gone.

Each rank has a thread that tells the others, through a key-value store, that it lives and what it
does. See docs/decisions/0032-a-watch-over-ranks.md for what is a fault, and after which time.
A job that is well must never end by this: what is not known for sure is no fault.
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

import torch.distributed as dist

from retro_mcore import launcher
from retro_mcore.activity import Activity
from retro_mcore.fault_report import lost_contact, places, stacks, timed_out
from retro_mcore.late_ranks import LateRanks
from retro_mcore.rank_state import (
    ENDS,
    LEFT,
    RUNS,
    OwnState,
    Process,
    RankState,
    has_ended,
    process_of,
)

_LOG = logging.getLogger(__name__)

#: Seconds between a rank's heartbeats.
BEAT = 5.0
#: Most seconds without a heartbeat after which a rank may count as gone: a collective's time limit
#: is hours where one rank may work alone, but its thread goes on telling then.
SILENCE = 1800.0
#: A process on this node that computed for this part of a core's time is at work: it keeps
#: Python's lock. One whose threads only poll uses less.
_AT_WORK = 0.01
#: Seconds that the main thread waits for an answer of the store.
_PATIENCE = 10.0
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


@dataclass
class _Heard:
    """What this rank last heard from another.

    Attributes:
        state: What it told.
        process: Its process at that time, if it is on this node and known.
        seconds: Time since then, by this rank's clock.
    """

    state: RankState
    process: Process | None
    seconds: float = 0.0


class Watch:
    """A rank's part of the watch.

    Its thread alone asks the store, for a store that has stopped does not answer and does not
    refuse either. The main thread never waits for longer than `_PATIENCE` without an answer.

    Args:
        connect: Makes a client of a store that the ranks share. ConnectionRefusedError or
            ConnectionResetError: nobody serves it any more.
        rank: This rank.
        world_size: Number of ranks.
        on_node: Ranks that may run on this node.
        limit_minutes: Time limit of collectives.
        stall_minutes: How long a rank may do nothing (0: any time); None: that is not looked at,
            nor who keeps others waiting.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        world_size: int,
        on_node: Iterable[int],
        limit_minutes: float,
        stall_minutes: float | None = None,
    ) -> None:
        self._connect = connect
        self._client: dist.Store | None = None
        self._rank, self._world_size = rank, world_size
        self._limit_minutes = limit_minutes
        self._silence = min(SILENCE, 60 * limit_minutes)
        self._pause = min(BEAT, self._silence / 10)
        self._late = None if stall_minutes is None else LateRanks(stall_minutes)
        activity = Activity(self._late.pause) if self._late and stall_minutes else None
        self.own, self._pid = OwnState(rank, activity), os.getpid()
        self._status, self._error, self._lost = RUNS, "", ""
        self._on_node: dict[int, RankState | None] = {
            other: None for other in on_node if other != rank and other < world_size
        }
        self._heard: dict[int, _Heard] = {}
        self._missing: set[int] = set()
        self._answers, self._answered = 0, time.monotonic()
        self._asked, self._told, self._warned = 0, 0, False
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = self._new_thread()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Tell the others that this rank lives, and go on in a thread."""
        self._wake.set()
        self._thread.start()
        threading.Thread(target=self._time_store, name="watch's clock", daemon=True).start()

    def begin(self, command: str) -> None:
        """Tell the others which command this rank runs; errors before it are done with."""
        self.own.begin(command)
        self._status, self._error = RUNS, ""

    def leave(self) -> None:
        """Tell that this rank has no more part in the job."""
        self._stop(LEFT)

    def end(self, error: BaseException) -> None:
        """Tell that this process ends by an error, unless all do or it asked for its end."""
        asked = isinstance(error, SystemExit) and not (error.code and self._error)
        if not asked and self._status == RUNS:
            self._error = self._error or f"{type(error).__name__}: {error}"
            self._stop(ENDS)
        else:
            self._stop(LEFT)

    def explain(self, error: BaseException) -> None:
        """Tell of an error: this rank's own, or which other rank is gone.

        The program may catch an error of its own and go on, so that alone is no fault.
        """
        if os.getpid() != self._pid or not self._thread.is_alive():
            return
        if getattr(error, "raised_together", False):
            self._status = LEFT  # until the next command begins
            self._await_turn()
        elif (text := lost_contact(error)) is None:
            self.own.fail(error)
            self._error = f"{type(error).__name__}: {error}"
            self._await_turn()
        else:
            self.own.fail(error)
            self._lost = text
            with _undisturbed():
                self._await_turn()

    def _stop(self, status: str) -> None:
        if os.getpid() != self._pid or self._stopping.is_set():
            return
        self._status = status
        self._stopping.set()
        self._await_turn()

    def _await_turn(self) -> None:
        """Let the thread take a turn now, and wait for it as long as the store answers."""
        self._asked += 1
        asked, began = self._asked, time.monotonic()
        self._wake.set()
        while self._thread.is_alive() and self._told < asked:
            if time.monotonic() - max(began, self._answered) > _PATIENCE:
                return
            time.sleep(0.01)

    def _run(self) -> None:
        last, goes_on, is_new = time.monotonic(), True, True
        while goes_on:
            self._wake.wait(self._pause)
            self._wake.clear()
            asked = self._asked
            goes_on = not self._stopping.is_set()
            now = time.monotonic()
            elapsed, last = now - last, now
            try:
                goes_on = self._turn(elapsed) and goes_on
                is_new = False
            except (ConnectionRefusedError, ConnectionResetError):
                # Nothing can be told any more: rank 0 may have finished. Collectives fail by
                # themselves.
                return
            except (dist.DistError, TimeoutError):
                if threading.current_thread() is not self._thread:
                    return
                self._client = None
                if not is_new:  # at once, with a new connection
                    goes_on = is_new = True
                    self._wake.set()
                    continue
            except Exception:  # a watch that is broken is no reason to end a job
                self._answers += 1
                if not self._warned:
                    self._warned = True
                    _LOG.warning("the watch over ranks does not work", exc_info=True)
            self._told = asked

    def _time_store(self) -> None:
        """End this rank if the store does not answer for as long as a silent rank may be silent.

        A connection may be lost without a sign, so new ones are tried before.
        """
        last, answers, silent, renewed = time.monotonic(), 0, 0.0, 0.0
        while not self._stopping.wait(self._pause) and self._thread.is_alive():
            now = time.monotonic()
            elapsed, last = now - last, now
            if self._answers != answers or not answers or elapsed > 3 * self._pause:
                answers, silent, renewed = self._answers, 0.0, 0.0
                continue
            silent += elapsed
            if silent >= self._silence and self._status == RUNS:
                _LOG.critical(
                    "the store where the ranks meet (%s:%s, rank 0 or its launcher) has not "
                    "answered for %.0f s. This rank ends too. Its threads:\n%s",
                    os.environ.get("MASTER_ADDR"),
                    os.environ.get("MASTER_PORT"),
                    silent,
                    stacks(),
                )
                os._exit(_EXIT_CODE)
            if silent - renewed >= self._silence / 5:
                renewed, self._client, self._thread = silent, None, self._new_thread()
                self._thread.start()

    @property
    def _store(self) -> dist.Store:
        if threading.current_thread() is not self._thread:
            raise SystemExit  # another thread has taken over: this one waited for too long
        self._answered = time.monotonic()  # to the last question
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _turn(self, elapsed: float) -> bool:
        """Tell, look, and end the job if there is a fault; whether to go on.

        Args:
            elapsed: Seconds since the last turn began.
        """
        status = self._tell()
        if status != RUNS:
            return True
        if elapsed > 3 * self._pause:  # held up, it knows nothing about the others in that time
            self._heard, self._missing = {}, set()
        if self._lost:
            self._report(self._find(timed_out(self._lost)))
            return False
        verdict = (
            self._verdict()
            or self._accuse(self._ended())
            or self._accuse(self._silent(elapsed))
            or self._accuse({}, self._stalled(elapsed))
        )
        if verdict is not None:
            end = threading.Timer(6 * self._pause, os._exit, (_EXIT_CODE,))  # logs may be stuck
            end.daemon = True
            end.start()
            self._report(verdict)
            os._exit(_EXIT_CODE)
        return True

    def _tell(self) -> str:
        """Tell the others this rank's state; return its status."""
        status = self._status
        self._store.set(f"rank/{self._rank}", self.own.now(status, self._error).text())
        self._answers += 1
        return status

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
        """Ranks on this node whose process had ended at the last look too, and did not leave."""
        found, missing = {}, set()
        for rank, known in self._on_node.items():
            state = self._on_node[rank] = known or self._read(rank)
            if state is None or not self.own.shares_processes_with(state) or not has_ended(state):
                continue
            missing.add(rank)
            last = self._read(rank) or state
            if rank in self._missing and last.status != LEFT:
                found[rank] = last.failure or f"{last.name} has ended; last seen in {last.doing}"
        self._missing = missing
        return found

    def _silent(self, elapsed: float) -> dict[int, str]:
        """Which of the ranks that this one listens to are gone.

        Whether a silent rank of its own node works, the system tells. One of another node is gone
        if all ranks of that node are silent; otherwise these decide.
        """
        before, self._heard = self._heard, {}

        def listen(state: RankState) -> _Heard:
            heard = self._heard.get(state.rank) or before.get(state.rank)
            if heard is None or (heard.state.beat, heard.state.pid) != (state.beat, state.pid):
                shared = self.own.shares_processes_with(state)
                heard = _Heard(state, process_of(state.pid) if shared else None)
            elif state.rank not in self._heard:
                heard.seconds += elapsed
            self._heard[state.rank] = heard
            return heard

        for state in self._neighbours():
            heard = listen(state)
            gone = [heard]
            if state.status == ENDS:
                if heard.seconds >= 3 * self._pause:
                    return {state.rank: state.failure}
                continue
            if self.own.shares_processes_with(state):
                if heard.seconds < self._silence:
                    continue
                if not _does_nothing(heard):
                    del self._heard[state.rank]  # it works: count anew
                    continue
            elif heard.seconds >= 6 * self._pause:
                gone = [listen(other) for other in self._read_all() if _same_node(other, state)]
            if min(each.seconds for each in gone) >= self._silence:
                return {each.state.rank: each.state.silence(each.seconds) for each in gone}
        return {}

    def _stalled(self, elapsed: float) -> list[str]:
        """Tell who keeps others waiting; why the job ends, if that rank surely does nothing.

        The first rank that has not left looks, at all. A rank that does nothing can report.
        """
        if self._late is None or not self._late.is_due(elapsed):
            return []
        before = map(self._read, range(self._rank))
        if not all(state is not None and state.status == LEFT for state in before):
            return []
        states = self._read_all()
        stalled = self._late.stalled(states)
        if stalled:
            return [*stalled, *places(states)]
        for line in self._late.warnings(states):
            _LOG.warning("%s", line)
        return []

    def _neighbours(self) -> list[RankState]:
        """The next rank that has not left, and the next of this node."""
        ring = [(self._rank + step) % self._world_size for step in range(1, self._world_size)]
        near = (
            rank
            for rank in ring
            if (known := self._on_node.get(rank)) and self.own.shares_processes_with(known)
        )
        found = {}
        for ranks in (ring, near):
            for rank in ranks:
                if (state := self._read(rank)) is not None and state.status != LEFT:
                    found[rank] = state
                    break
        return list(found.values())

    def _find(self, is_late: bool) -> Verdict:
        """Find out which rank is gone, after a collective has failed."""
        before = {state.rank: state.beat for state in self._read_all()}
        started, rounds = time.monotonic(), 0
        while (patience := time.monotonic() - started) < 3 * self._pause:
            failed = {}
            if patience >= rounds * self._pause:  # all ranks may ask for all states
                self._tell()  # others look for the fault too, and this rank is none
                failed, rounds = self._failed(), rounds + 1
            found = self._verdict() or self._accuse(self._ended() or failed)
            if found is not None:
                return found
            time.sleep(0.1 if patience < 1 else min(1.0, self._pause / 2))
        self._tell()
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
        return verdict

    def _failed(self) -> dict[int, str]:
        """Ranks of any node that told of an error of their own."""
        return {state.rank: state.failure for state in self._read_all() if state.error}

    def _awaited(self, others: Sequence[RankState]) -> list[str]:
        """Of ranks that do not wait for others."""
        return [
            f"{state.name} keeps the others waiting: for {state.unchanged:.0f} s it has "
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
            self._answers += 1


def _same_node(one: RankState, other: RankState) -> bool:
    """Whether ranks are one, or both take part and run on one node."""
    return one.rank == other.rank or (
        one.status == RUNS and bool(one.node) and one.node == other.node
    )


def _does_nothing(heard: _Heard) -> bool:
    """Whether a silent process on this node surely does not work."""
    then, now = heard.process, process_of(heard.state.pid)
    if then is None or now is None or now.waits_for_disk:
        return False
    return now.cpu - then.cpu < _AT_WORK * heard.seconds


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


def start(
    rank: int, world_size: int, limit_minutes: float, stall_minutes: float | None, nonce: str
) -> None:
    """Start to watch the ranks that have just joined the default group by environment variables.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        limit_minutes: Time limit of collectives.
        stall_minutes: How long a rank may do nothing; see `Watch`.
        nonce: Of these ranks only: those that failed before may have used the same store.
    """
    global _watch
    address = launcher.meeting_place()

    def connect() -> dist.Store:
        # A client of a store tries again for long if it is refused.
        socket.create_connection(address, timeout=_STORE_TIMEOUT.total_seconds()).close()
        client = dist.TCPStore(
            *address, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False
        )
        return dist.PrefixStore(f"retro_mcore/watch/{nonce}", client)

    place = launcher.read()
    first = 0 if place.local_rank is None else rank - place.local_rank
    on_node = range(max(first, 0), first + (place.local_world_size or world_size))
    _watch = Watch(connect, rank, world_size, on_node, limit_minutes, stall_minutes)
    if _command:
        _watch.begin(_command)
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, AttributeError):  # stderr without a file
            faulthandler.enable()  # NCCL's own watchdog aborts
    _watch.start()


_command = ""


def begin(command: str) -> None:
    """Tell the others which command this rank runs; see `Watch.begin`."""
    global _command
    _command = command
    if _watch is not None:
        _watch.begin(command)


def leave() -> None:
    """This rank has done its part; see `Watch.leave`."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def end(error: BaseException) -> None:
    """This process ends by an error; see `Watch.end`."""
    global _watch
    if _watch is not None:
        _watch.end(error)
        _watch = None


def explain(error: BaseException) -> None:
    """A command ends by an error; see `Watch.explain`."""
    if _watch is not None:
        _watch.explain(error)
