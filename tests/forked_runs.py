"""For scripts that run another program's trainer on the CPU: several runs after one import.

A file of runs in JSON lists, for each, a name, the number of ranks and what the script needs. Ranks
are forked from the script after its imports, which cost most of the time. A rank's output goes to
NAME.RANK.txt, and all exit codes to codes.json, in the working directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]


def pretend_cuda() -> None:
    """Let trainers that insist on CUDA run on the CPU; before megatron is imported."""
    if not hasattr(typing, "override"):  # megatron-core from 0.17 on is written for Python 3.12
        typing.override = lambda method: method  # type: ignore[attr-defined]
    from retro_mcore.platform import use_cpu

    use_cpu()
    import torch

    # Initialization asks for a device, logging for the device's memory.
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.empty_cache = lambda: None
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        total_memory=2**30, major=8, minor=0
    )
    cuda.memory_stats = lambda device=None: {"num_alloc_retries": 0}
    memory = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    for name in memory:
        setattr(cuda, name, lambda device=None: 0)
    import megatron.core.datasets.utils

    megatron.core.datasets.utils.compile_helpers = lambda: None  # wheels contain no makefile


def run_all(file: str, call: Callable[[dict], Any]) -> None:
    """Run every entry of a file of runs.

    Those on one rank run side by side. Then come those on several, which may resume one of them.
    """
    sys.stdout.flush()
    runs = json.loads(Path(file).read_text(encoding="utf-8"))
    waves = [[run for run in runs if run["ranks"] == 1]]
    waves += [[run] for run in runs if run["ranks"] > 1]
    codes = {}
    for wave in waves:
        started = {run["name"]: _fork_ranks(run, call) for run in wave}
        for name, (_store, children) in started.items():
            codes[name] = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in children]
    Path("codes.json").write_text(json.dumps(codes), encoding="utf-8")


def _fork_ranks(run: dict, call: Callable[[dict], Any]) -> tuple[Any, list[int]]:
    """Start the ranks of a run; returns the store where they meet, and their process ids."""
    from tests.rendezvous import host_store

    (store, address), children = host_store(), []
    for rank in range(run["ranks"]):
        if not (child := os.fork()):
            _rank_main(run, rank, address, call)
        children.append(child)
    return store, children


def _rank_main(run: dict, rank: int, address: dict, call: Callable[[dict], Any]) -> None:
    """Run one rank in this process, and end the process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["ranks"]}
    os.environ |= {**address, **{name: str(n) for name, n in place.items()}}
    output = os.open(f"{run['name']}.{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = _exit_code(call, run)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(call: Callable[[dict], Any], run: dict) -> int:
    try:
        call(run)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as ended:
            return int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        return 1
    return 0


def start(script: Path, runs: list[dict], folder: Path) -> None:
    """Run a script that calls `run_all`, in a folder."""
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    subprocess.run(
        [sys.executable, str(script), "runs.json"],
        env={**os.environ, **environment},
        cwd=folder,
        check=True,
    )


def output(folder: Path, name: str, code: int = 0, rank: int = -1) -> str:
    """The output of a run's last rank, or another, if all ranks ended with this exit code."""
    codes = json.loads((folder / "codes.json").read_text())[name]
    text = (folder / f"{name}.{range(len(codes))[rank]}.txt").read_text()
    assert codes == [code] * len(codes), text[-3000:]
    return text
