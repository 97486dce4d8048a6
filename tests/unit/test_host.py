"""Memory and cores within the limits of a container or job."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from retro_mcore import host

GIB = 1 << 30


def groups(folder, membership, files):
    """Files of control groups as Linux shows them."""
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "membership").write_text(membership)


@pytest.fixture
def linux(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "_MEMBERSHIP", tmp_path / "membership")
    total = psutil.virtual_memory()._replace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: total)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    return tmp_path


CASES = {
    "no limits": (
        "0::/user\n", {"user/memory.max": "max\n", "user/cpu.max": "max 100000\n"}, 64, 48, 64
    ),
    "no groups": ("", {}, 64, 48, 64),
    "a container of version 2": (
        "0::/\n",
        {"memory.max": f"{8 * GIB}\n", "memory.current": f"{5 * GIB}\n",
         "memory.stat": f"anon 7\ninactive_file {2 * GIB}\n", "cpu.max": "250000 100000\n"},
        8, 5, 3,
    ),
    "a job whose step has a limit of its own": (
        "0::/slurm/job_7/step_0\n",
        {"slurm/job_7/memory.max": f"{16 * GIB}\n", "slurm/job_7/memory.current": f"{14 * GIB}\n",
         "slurm/job_7/step_0/memory.max": f"{12 * GIB}\n",
         "slurm/job_7/step_0/memory.current": f"{1 * GIB}\n"},
        12, 2, 64,
    ),
    "version 1": (
        "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
        {"memory/memory.limit_in_bytes": "9223372036854771712\n",
         "memory/memory.usage_in_bytes": f"{30 * GIB}\n",
         "memory/job/memory.limit_in_bytes": f"{4 * GIB}\n",
         "memory/job/memory.usage_in_bytes": f"{3 * GIB}\n",
         "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
         "cpu/job/cpu.cfs_quota_us": "50000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
        4, 2, 1,
    ),
    "version 1 in a container, which does not see the host's folder": (
        "4:memory:/docker/abc\n3:cpu:/docker/abc\n",
        {"memory/memory.limit_in_bytes": f"{2 * GIB}\n",
         "memory/memory.usage_in_bytes": f"{3 * GIB}\n",
         "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        2, 0, 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_limits_of_control_groups(linux, case):
    membership, files, total, available, cores = CASES[case]
    groups(linux, membership, files)
    assert host.total_memory() == total * GIB
    assert host.available_memory() == available * GIB
    assert host.usable_cores() == cores


def test_more_files_may_be_open_than_a_shell_allows():
    """In a process of its own, whose limit may be lowered."""
    show = (
        "import resource; from retro_mcore.host import most_open_files; "
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)); "
        "print(most_open_files() > 64)"
    )
    command = [sys.executable, "-c", show]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "True"


def test_a_real_group():
    """Needs the right to make one."""
    base, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not base.is_dir():
        base, limit = base.parent, "memory.max"
    group = base / f"retro_mcore_{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(GIB))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    show = "from retro_mcore.host import *; print(total_memory(), available_memory())"
    join = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
    try:
        command = [sys.executable, "-c", join + show]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        total, available = map(int, shown.split())
        assert total == GIB
        assert GIB / 2 < available < GIB
    finally:
        group.rmdir()
