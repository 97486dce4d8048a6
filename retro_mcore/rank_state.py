"""What a rank tells the others about itself, and what a node's table of processes tells."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import FrameType

import torch.distributed as dist

from retro_mcore import progress
from retro_mcore.activity import Activity

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
ENDS = "ends"


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
        status: "runs", "left" (its work is done, or its error is every rank's), or "ends" (the
            process ends by its error).
        error: The error that its command ended by; empty if there is none.
        work: Command and progress.
        place: Line of this package's code that its main thread is in.
        waits: Whether the main thread waits for other ranks there.
        unchanged: Seconds since work, place or waiting last changed.
        stepped: Seconds since its work last changed, which counts steps.
        idle: Seconds for which its process has surely done nothing, if that is measured.
    """

    rank: int
    host: str
    pid: int
    node: str
    started: int
    beat: int
    status: str
    error: str
    work: str
    place: str
    waits: bool
    unchanged: float
    stepped: float
    idle: float

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
        """The rank, with its error; empty if there is none."""
        return f"{self.name} failed in {self.doing}: {self.error}" if self.error else ""

    def silence(self, seconds: float) -> str:
        """The rank, with the time since it last told."""
        return f"{self.name} has not answered for {seconds:.0f} s; last seen in {self.doing}"


class OwnState:
    """Makes this process's states.

    Args:
        rank: Its rank.
        activity: Measures whether it does nothing; None: that is not told.
    """

    def __init__(self, rank: int, activity: Activity | None = None) -> None:
        self._activity = activity
        self._rank, self._host, self._node = rank, socket.gethostname(), _node()
        own = process_of(os.getpid())
        self._started = own.started if own else 0
        self._beat = 0
        self._last: tuple[str, str, bool] | None = None
        self._since = self._stepped = 0.0
        self._failed_at: str | None = None
        self._command = ""

    def begin(self, command: str) -> None:
        """From now on this rank runs a command."""
        self._command, self._failed_at = command, None

    def fail(self, error: BaseException) -> None:
        """From now on this rank's place is where the error came from."""
        self._failed_at, _ = _place(frame for frame, _ in walk_tb(error.__traceback__))

    def now(self, status: str, error: str) -> RankState:
        """The next state."""
        work, place, waits = self._command, "", False
        with suppress(Exception):  # that this rank lives matters more than where it is
            place, waits = _main_thread()
            work = ": ".join(filter(None, [self._command, progress.latest()]))
        if self._failed_at is not None:
            place, waits = self._failed_at, True
        now = time.monotonic()
        if self._last is None or work != self._last[0]:
            self._stepped = now
        has_moved = (work, place, waits) != self._last
        if has_moved:
            self._last, self._since = (work, place, waits), now
        idle = 0.0 if self._activity is None else self._activity.idle(has_moved or waits)
        self._beat += 1
        return RankState(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            node=self._node,
            started=self._started,
            beat=self._beat,
            status=status,
            error=error,
            work=work,
            place=place,
            waits=waits,
            unchanged=now - self._since,
            stepped=now - self._stepped,
            idle=idle,
        )

    def shares_processes_with(self, other: RankState) -> bool:
        """Whether this process sees the other rank's process."""
        return bool(self._node) and other.node == self._node


@dataclass(frozen=True)
class Process:
    """A process that the system knows.

    Attributes:
        started: When, in clock ticks since the system started.
        cpu: Seconds that its threads have computed.
        ended: Whether it has ended, and its parent does not know yet.
        waits_for_disk: Whether its main thread is in a call that cannot be interrupted.
    """

    started: int
    cpu: float
    ended: bool
    waits_for_disk: bool


def process_of(pid: int) -> Process | None:
    """The process of a number on this node; None if nothing is known about it."""
    try:
        return _process(pid)
    except (OSError, ValueError, IndexError):
        return None


def has_ended(state: RankState) -> bool:
    """Whether the process of a rank on this node has surely ended."""
    if not state.started:
        return False
    try:
        process = _process(state.pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, ValueError, IndexError):  # too many open files, for example
        return False
    return process.ended or process.started != state.started


def _process(pid: int) -> Process:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return Process(
        started=int(fields[19]),
        cpu=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        ended=fields[0] in "ZX" and int(fields[17]) <= 1,  # else other threads go on
        waits_for_disk=fields[0] == "D",
    )


def _node() -> str:
    """Identifies the table of processes that this process sees; empty if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        pids = Path("/proc/self/ns/pid").readlink()
        seen = str(Path("/proc/self").readlink()) == str(os.getpid())  # /proc may be another's
        return f"{socket.gethostname()} {boot} {pids}" if seen else ""
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
