"""The node's memory, shared memory and limits."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from retro_mcore.host import available_memory
from retro_mcore.stages.doctor.findings import Finding, ok, warning

AREA = "host"
_GIB = 2**30
#: Least memory per process, shared memory of a node, and open files.
_LEAST_MEMORY, _LEAST_SHARED, _LEAST_FILES = 4 * _GIB, _GIB, 4096


def check_host(local_world_size: int) -> list[Finding]:
    """Check the node for `local_world_size` processes."""
    return [*_memory(local_world_size), *_shared_memory(), *_limits()]


def _memory(processes: int) -> Iterator[Finding]:
    available = available_memory()
    found = f"{available // _GIB} GiB available, {processes} processes"
    if available < _LEAST_MEMORY * processes:
        fix = "Free memory, or start fewer processes; loading a checkpoint takes its size"
        yield warning(AREA, "memory", found, fix)
    else:
        yield ok(AREA, "memory", found)


def _shared_memory(folder: str = "/dev/shm") -> Iterator[Finding]:
    if not Path(folder).is_dir():
        return
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.1f} GiB free"
    if free < _LEAST_SHARED:
        fix = "Docker: --ipc=host or --shm-size; Kubernetes: an emptyDir with medium Memory"
        yield warning(AREA, folder, f"{found}; NCCL and data loaders use it", fix)
    else:
        yield ok(AREA, folder, found)


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _LEAST_FILES and files != resource.RLIM_INFINITY:
        yield warning(AREA, "open files", f"at most {files}", f"ulimit -n {_LEAST_FILES} or more")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited; Docker: --ulimit memlock=-1"
        yield warning(AREA, "locked memory", f"at most {locked} bytes, with InfiniBand", fix)
