"""End processes that a section started, whatever sessions they are in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil


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


def _with(variable: str, value: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            marked = process.environ().get(variable) == value
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                yield process
