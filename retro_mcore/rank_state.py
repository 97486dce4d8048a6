"""What a rank tells the others about itself, and what a node's table of processes tells."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import FrameType

import torch.distributed as dist

from retro_mcore import progress

_OURS = str(Path(__file__).parent) + os.sep
#: Between a caller and its collective, or around a whole command; they tell nothing.
_HELPERS = ("distributed.py", "watch.py", "rank_state.py", "cli/log_files.py", "cli/command.py")
#: Frames of these files mean that a rank waits for others.
_WAITING = (
    str(Path(dist.__file__).parent) + os.sep,
    os.path.join("megatron", "core", "pipeline_parallel", "p2p_communication.py"),  # noqa: PTH118
)

RUNS = "runs"
LEFT = "left"


@dataclass(frozen=True)
class RankState:
    """A rank, as it last told.

    Attributes:
        rank: The rank.
        host: Name of its node.
        pid: Its process.
        node: Identifies the node's table of processes; empty if there is none.
        started: When the process started, as that table says.
        beat: Counts how often the rank has told.
        time: When it told, in seconds since the epoch.
        status: "runs", "left" (its work is done, or its error is every rank's), or its error.
        work: Command and progress.
        place: Line of this package's code that its main thread is in.
        waits: Whether the main thread waits for other ranks there.
        since: When work, place or waiting last changed.
    """

    rank: int
    host: str
    pid: int
    node: str
    started: int
    beat: int
    time: float
    status: str
    work: str
    place: str
    waits: bool
    since: float

    @classmethod
    def parse(cls, text: str | bytes) -> RankState:
        """Read what `text` wrote."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @property
    def name(self) -> str:
        """The rank, as messages name it."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """Its work and place."""
        return " at ".join(filter(None, [self.work, self.place])) or "its start"

    @property
    def failure(self) -> str:
        """The rank, with its error."""
        return f"{self.name} failed in {self.doing}: {self.status}"

    def silence(self, seconds: float) -> str:
        """The rank, with the time since it last told."""
        return f"{self.name} has not answered for {seconds:.0f} s; last seen in {self.doing}"


class OwnState:
    """Makes this process's states."""

    def __init__(self, rank: int) -> None:
        self._rank, self._host, self._node = rank, socket.gethostname(), _node()
        own = process_of(os.getpid())
        self._started = own.started if own else 0
        self._beat = 0
        self._last: tuple[str, str, bool] | None = None
        self._since = 0.0
        self._failed_at: str | None = None
        self.command = ""

    def fail(self, error: BaseException) -> None:
        """From now on this rank's place is where the error came from."""
        self._failed_at, _ = _place(frame for frame, _ in walk_tb(error.__traceback__))

    def now(self, status: str) -> RankState:
        """The next state."""
        place, waits = _main_thread()
        if self._failed_at is not None:
            place, waits = self._failed_at, True
        work = ": ".join(filter(None, [self.command, progress.latest()]))
        now = time.time()
        if (work, place, waits) != self._last:
            self._last, self._since = (work, place, waits), now
        self._beat += 1
        return RankState(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            node=self._node,
            started=self._started,
            beat=self._beat,
            time=now,
            status=status,
            work=work,
            place=place,
            waits=waits,
            since=self._since,
        )

    def shares_processes_with(self, other: RankState) -> bool:
        """Whether this process sees the other rank's process."""
        return bool(self._node) and other.node == self._node


@dataclass(frozen=True)
class Process:
    """A process that the system knows.

    Attributes:
        started: When, in clock ticks since the system started.
        cpu: Time that it has computed, in clock ticks.
        ended: Whether it has ended, and its parent does not know yet.
    """

    started: int
    cpu: int
    ended: bool


def process_of(pid: int) -> Process | None:
    """The process of a number on this node; None if there is none, or no table of processes."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return Process(int(fields[19]), int(fields[11]) + int(fields[12]), fields[0] in "ZX")


def has_ended(state: RankState) -> bool:
    """Whether the process of a rank on this node has ended."""
    process = process_of(state.pid)
    return process is None or process.ended or process.started != state.started


def _node() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _main_thread() -> tuple[str, bool]:
    """Line of this package that the main thread is in, and whether it waits there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return _place(reversed([each for each, _ in walk_stack(frame)]) if frame else [])


def _place(frames: Iterable[FrameType]) -> tuple[str, bool]:
    """The innermost line of this package, and whether a collective was called there.

    Args:
        frames: From the outermost.
    """
    place, waits = "", False
    for frame in frames:
        file = frame.f_code.co_filename
        own = file[len(_OURS) :] if file.startswith(_OURS) else ""
        if own and own not in _HELPERS:
            place, waits = f"{own}:{frame.f_lineno} in {frame.f_code.co_name}", False
        waits = waits or file.startswith(_WAITING[0]) or file.endswith(_WAITING[1])
    return place, waits
