"""What this process may use: memory and cores of its host, within the limits of its container
or job, and the processor's instruction sets.

Docker, Kubernetes and Slurm set such limits by Linux's control groups (cgroups, version 1 or 2).
psutil and os.cpu_count() do not know them and tell of the whole host.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil

_UNLIMITED = 1 << 20
_CPUINFO = Path("/proc/cpuinfo")
_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def total_memory() -> int:
    """Bytes of memory that this process and its neighbors in the same job may use."""
    limits = [limit for limit, _ in _memory_limits()]
    return min([psutil.virtual_memory().total, *limits])


def available_memory() -> int:
    """Bytes of memory that can still be used; cached files count as free."""
    left = [max(0, limit - used) for limit, used in _memory_limits()]
    return min([psutil.virtual_memory().available, *left])


def usable_cores() -> int:
    """Cores that this process may run on, at least 1; a limit of 1.5 counts as 2."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([allowed or 1, *(math.ceil(limit) for limit in _core_limits())]))


@cache
def processor_features() -> frozenset[str]:
    """Instruction sets of this processor, by Linux's names; empty on other systems."""
    if not _CPUINFO.is_file():
        return frozenset()
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split() if found else ())


def return_freed_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps what lies between used blocks."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def most_open_files() -> int:
    """Files that this process may have open, after its limit was raised as far as it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS allows fewer than it says
            pass
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def most_mapped_files() -> int:
    """Files that one of several tables may keep mapped: Linux maps 65,530 files per process, and
    Python keeps each of them open."""
    return max(1, min(8192, most_open_files() // 8))


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and use of each group that has a limit, in bytes."""
    for group in _groups("memory"):
        for limit_file, used_file, idle in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and used is not None and limit < psutil.virtual_memory().total:
                yield limit, used - _statistic(group / "memory.stat", idle)


def _core_limits() -> Iterator[float]:
    for group in _groups("cpu"):
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            yield int(words[0]) / int(words[1])
        quota, period = (_number(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota and period:
            yield quota / period


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, each before those that contain it."""
    for line in _text(_MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controller if controllers else _GROUPS
        # In a container the path may be the host's: then only the root is there.
        inner = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        yield from dict.fromkeys(root / one for one in inner)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    words = (line.split() for line in _text(path).splitlines())
    return next((int(value) for key, value in words if key == name), 0)


def _text(path: Path) -> str:
    """A file's text; empty if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
