"""Commands of the quickstart: run one after the other, or one beside others."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        log: Where its output goes if it runs beside the stages that follow, up to the one that
            needs it.
        needs: Title of a stage that has to be over first.
    """

    title: str
    command: str
    flags: list[str]
    log: Path | None = None
    needs: str = ""


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
    """A command that runs beside others, its output in a file.

    Attributes:
        seconds: How long it took, once `wait` has returned.
    """

    def __init__(self, stage: Stage, log: Path, threads: int) -> None:
        command = command_line(stage, nproc=1)
        show([*command, "&>", str(log), "&"])
        self.stage, self.log = stage, log
        self.seconds = 0.0
        self._start = time.monotonic()
        with log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=_environment(threads)
            )
        self._waiter = Thread(target=self._watch, daemon=True)
        self._waiter.start()

    def _watch(self) -> None:
        self._process.wait()
        self.seconds = time.monotonic() - self._start

    def wait(self) -> int:
        """Its exit code; the output of a failed one is printed."""
        self._waiter.join()
        if self._process.returncode:
            print(self.log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
        return self._process.returncode

    def stop(self) -> None:
        """End it, if it still runs; it saves what it has first."""
        if self._process.poll() is None:
            self._process.terminate()
        self._waiter.join()


def _environment(threads: int | None) -> dict[str, str]:
    """The environment of a command that computes with so many threads; None: with all cores."""
    if threads is None:
        return dict(os.environ)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def show(command: list[str]) -> None:
    quoted = (word if word in ("&", "&>") else shlex.quote(word) for word in command)
    print(f"\n$ {' '.join(quoted)}", flush=True)


def _torchrun(arguments: list[str]) -> int:
    """What the command `torchrun` does, but for its traceback and its exit code, always 1."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0
