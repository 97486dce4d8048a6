"""Parallel layouts, as many as there are GPUs for, against one process.

python -m torch.distributed.run --nproc-per-node 4 -m benchmarks.gpu_report.parallel REQUEST
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.findings import Findings, Skipped
from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.small_runs import shape_of, train
from retro_mcore.distributed import leave

#: Layouts in fp32, by the number of processes they need.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process, distributed optimizer, overlapped": (
        1,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "TP2, sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "TP2 x PP2, sequence parallel": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
}
#: Sums over ranks are added in another order than in one process. Training amplifies it.
BOUND = 1e-4


def parallel(setting: Setting, findings: Findings) -> None:
    """Losses of each layout are those of one process, from the same weights.

    With one GPU, only the layout of one process runs: its collectives are NCCL's, without peers.
    """
    steps = setting.pick(8, 3)
    available = _devices(setting)
    micro = shape_of(setting).batch // 2  # two micro batches, and one per rank of DP2
    findings.figure("backend", "gloo" if setting.device == "cpu" else "nccl")
    findings.figure("processes at most", available)
    with setting.folder() as folder:
        # Pipeline stages draw initial weights of their own, so all layouts load these.
        train(setting, shape_of(setting), 1, folder, micro_batch_size=micro)
        start: dict[str, Any] = {"load": str(folder), "finetune": True, "micro_batch_size": micro}
        expected = train(setting, shape_of(setting), steps, **start).train_losses
        for name, (processes, flags) in LAYOUTS.items():
            with findings.part(name):
                if processes > available:
                    raise Skipped(f"needs {processes} GPUs, {available} here")
                found = _losses(setting, steps, processes, {**flags, **start})
                apart = max(abs(one - other) for one, other in zip(found, expected, strict=True))
                findings.at_most(name, apart, BOUND)


def _devices(setting: Setting) -> int:
    if setting.device == "cpu":
        return 4
    import torch

    return torch.cuda.device_count()


def _losses(setting: Setting, steps: int, processes: int, flags: dict[str, Any]) -> list[float]:
    if processes == 1:
        return train(setting, shape_of(setting), steps, **flags).train_losses
    with setting.folder() as folder:
        request = {"setting": asdict(setting), "steps": steps, "flags": flags}
        request["result"] = str(folder / "losses.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes), "-m", "benchmarks.gpu_report.parallel"]
        done = subprocess.run(
            [*launcher, json.dumps(request)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{processes} processes failed: {done.stderr[-2000:]}")
        return json.loads((folder / "losses.json").read_text(encoding="utf-8"))


def _rank(request: str) -> None:
    """Train on this rank; the first one writes the losses."""
    asked = json.loads(request)
    setting = Setting(**asked["setting"])
    try:
        losses = train(setting, shape_of(setting), asked["steps"], **asked["flags"]).train_losses
        if os.environ["RANK"] == "0":
            Path(asked["result"]).write_text(json.dumps(losses), encoding="utf-8")
    finally:
        leave()


if __name__ == "__main__":
    _rank(sys.argv[1])
