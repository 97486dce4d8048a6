"""End processes that a section started, whatever sessions they are in.

`python -m benchmarks.gpu_report.processes VARIABLE VALUE` ends them when its standard input ends.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path(__file__).parents[2]


def end_all(variable: str, value: str, within: float = 20.0) -> list[int]:
    """Kill every process whose environment holds a variable with a value.

    Processes inherit it. Groups and sessions do not reach all: torchrun starts each rank in a
    session of its own, and a rank whose launcher has died has another parent.

    Args:
        variable: Name of the variable.
        value: Its value, which no other process has.
        within: Seconds after which those that live on are left alone.

    Returns:
        Process ids of those.
    """
    end = time.monotonic() + within
    while found := list(_with(variable, value)):
        if time.monotonic() > end:
            return [process.pid for process in found]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    return []


@contextlib.contextmanager
def ended_with_us(variable: str, value: str) -> Iterator[None]:
    """Let processes with a variable end when this process does, also where it is killed.

    A process that is killed runs nothing more, and the system signals its death to its own children
    only, not to theirs. So another process waits for the end of a pipe that this one holds, and
    kills whoever has the variable.

    Args:
        variable: Name of the variable.
        value: Its value, which this process does not have.
    """
    guard = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_report.processes", variable, value],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,  # a signal to the group of this process is not for it
    )
    try:
        yield
    finally:
        guard.communicate()


def _with(variable: str, value: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            marked = process.environ().get(variable) == value
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                yield process


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_all(sys.argv[1], sys.argv[2])
