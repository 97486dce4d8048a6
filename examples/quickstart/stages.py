"""Commands of the quickstart: run one after the other, or one beside others."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        log: Where its output goes if it runs beside others; None: it never does.
    """

    title: str
    command: str
    flags: list[str]
    log: Path | None = None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line(stage: Stage, nproc: int) -> list[str]:
    """The stage's command, under torchrun if it is for several processes."""
    script = os.path.relpath(REPOSITORY / "tools" / f"{stage.command}.py")
    if nproc == 1:
        return [os.path.relpath(sys.executable), script, *stage.flags]
    torchrun = os.path.relpath(Path(sys.executable).with_name("torchrun"))
    return [torchrun, "--standalone", "--nproc-per-node", str(nproc), script, *stage.flags]


def run_stage(stage: Stage, nproc: int, threads: int | None = None) -> int:
    """Print and run one command; returns its own exit code, from under torchrun too."""
    command = command_line(stage, nproc)
    show(command)
    if nproc == 1:
        return subprocess.run(command, check=False, env=_environment(threads)).returncode
    return _torchrun(command[1:])


class Beside:
    """Commands that run one after the other, beside those of the caller.

    Args:
        stages: The commands; each has a log.
        threads: Threads that each computes with.
    """

    def __init__(self, stages: Sequence[Stage], threads: int) -> None:
        self.stages, self._threads = stages, threads
        self._running: subprocess.Popen[bytes] | None = None
        self._results: dict[str, tuple[int, float]] = {}
        self._lock, self._stopped = Lock(), False
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for stage in self.stages:
            assert stage.log is not None
            began = time.monotonic()
            stage.log.parent.mkdir(parents=True, exist_ok=True)
            with stage.log.open("wb") as output:
                with self._lock:
                    if self._stopped:
                        return
                    self._running = subprocess.Popen(
                        command_line(stage, nproc=1),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=_environment(self._threads),
                    )
                code = self._running.wait()
            self._results[stage.title] = code, time.monotonic() - began
            if code:
                return

    @property
    def is_running(self) -> bool:
        """Whether a command has not ended yet."""
        return self._thread.is_alive()

    def finish(self, stage: Stage) -> tuple[int, float]:
        """Wait for one of the commands, and print it with its output.

        Returns:
            Its exit code and the seconds that it took.
        """
        while stage.title not in self._results and self._thread.is_alive():
            self._thread.join(0.1)
        show(command_line(stage, nproc=1))
        assert stage.log is not None
        code, seconds = self._results[stage.title]
        told = stage.log.read_text(encoding="utf-8", errors="replace")
        print(told, end="", file=sys.stderr if code else sys.stdout, flush=True)
        return code, seconds

    def stop(self) -> None:
        """End the running command, which saves what it has, and start no more."""
        with self._lock:
            self._stopped = True
            if self._running is not None and self._running.poll() is None:
                self._running.terminate()
        self._thread.join()


def _environment(threads: int | None) -> dict[str, str]:
    """The environment of a command that computes with so many threads; None: with all cores."""
    if threads is None:
        return dict(os.environ)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def show(command: list[str]) -> None:
    print(f"\n$ {shlex.join(command)}", flush=True)


def _torchrun(arguments: list[str]) -> int:
    """What the command `torchrun` does, but for its traceback and its exit code, always 1."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0
