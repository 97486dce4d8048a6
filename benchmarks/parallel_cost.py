"""What a layout costs: processor time, bytes sent and memory, relative to one process.

    python -m benchmarks.parallel_cost                        # every layout
    python -m benchmarks.parallel_cost --only CP2 --rounds 5
    python -m benchmarks.parallel_cost --lengths 2048 4096 8192 16384    # memory under CP 1, 2, 4
    python -m benchmarks.parallel_cost --smoke

Every layout trains the same model on the same samples, on gloo and CPU with one thread a process,
in turns with one process. Processor seconds are those of all ranks for a step, with the optimizer.
Bytes are what a rank of the ring algorithms sends for a step: 2 (n - 1) / n of the tensor for an
all-reduce, (n - 1) / n of the whole for a gather, a scatter or an exchange of all with all. Memory
is the most that tensors take during a step, beyond weights, gradients and optimizer state, on the
rank where it is largest. `simulated` is what `--dry-run --simulate` says of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 of 2": {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
    },
    "CP2": {"context_parallel_size": 2},
    "DP2": {},
    "DP2, distributed optimizer": {"use_distributed_optimizer": True},
}
#: Experts are compared with one process that has them, too.
EXPERTS = {"num_experts": 4, "disable_bias_linear": True}
LAYOUTS["EP2"] = {**EXPERTS, "expert_model_parallel_size": 2}
SIZES = {"layers": 4, "hidden": 256, "length": 512, "batch": 4, "vocabulary": 8192}
SMOKE = {"layers": 4, "hidden": 64, "length": 256, "batch": 4, "vocabulary": 512}
LONG = {"layers": 4, "hidden": 256, "batch": 1, "vocabulary": 8192}
CHUNK = 64


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--rank":
        run_rank(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each layout")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a run")
    parser.add_argument("--lengths", type=int, nargs="+", help="memory by sequence length instead")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only tries the path")
    options = parser.parse_args()
    if options.lengths:
        sizes = SMOKE if options.smoke else LONG
        for length in options.lengths:
            show_length(length, memory_of(sizes, length))
        return
    sizes = SMOKE if options.smoke else SIZES
    rounds, steps = (1, 1) if options.smoke else (options.rounds, options.steps)
    for name in options.only:
        show_layout(name, [compare(name, sizes, steps) for _ in range(rounds)])


def compare(name: str, sizes: dict[str, int], steps: int) -> tuple[dict, dict]:
    """Figures of one process and of the layout, one run each."""
    layout = LAYOUTS[name]
    whole = EXPERTS if "num_experts" in layout else {}
    spread = launch(2, layout, sizes, steps)
    return launch(1, whole, sizes, steps), {**spread, "simulated": simulated_peak(layout, sizes)}


def simulated_peak(layout: dict, sizes: dict[str, int]) -> int:
    """Memory on two ranks as `--dry-run --simulate` computes it: in this process, alone."""
    from retro_mcore.platform import setup_device

    setup_device("cpu")
    from retro_mcore.training.setup.simulate import simulate

    stages = simulate(plan_of(layout, sizes, None), 2).stages
    return max(stage.memory["activations"] + stage.memory["temporary"] for stage in stages)


def memory_of(sizes: dict[str, int], length: int) -> list[float]:
    """Bytes of the rank with most, under context parallelism of 1, 2 and 4."""
    sizes = {**sizes, "batch": 1, "length": length}
    peaks = []
    for size in (1, 2, 4):
        layout = {"context_parallel_size": size} if size > 1 else {}
        peaks.append(launch(size, layout, sizes, steps=0)["peak"])
    return peaks


def launch(ranks: int, layout: dict, sizes: dict[str, int], steps: int) -> dict[str, Any]:
    """Run a layout in processes of its own; its figures over all ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        request = json.dumps({"layout": layout, "sizes": sizes, "steps": steps, "folder": folder})
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(ranks), "-m", "benchmarks.parallel_cost"]
        ended = subprocess.run(
            [*launcher, "--rank", request], env=environment, capture_output=True, text=True
        )
        if ended.returncode:
            raise SystemExit(ended.stderr)
        written = [json.loads(file.read_text()) for file in Path(folder).glob("rank_*.json")]
    return {
        "seconds": sum(each["seconds"] for each in written),
        "bytes": max(sum(each["sent"].values()) for each in written),
        "peak": max(each["peak"] for each in written),
    }


def run_rank(request: dict[str, Any]) -> None:
    """Train on this rank; write its figures."""
    from retro_mcore.platform import setup_device

    setup_device("cpu")
    from retro_mcore.distributed import leave
    from retro_mcore.training.loop.loss import reduce_losses
    from retro_mcore.training.loop.trainer import compute_gradients

    trainer, batches, measured = measure(request["layout"], request["sizes"], request["folder"])
    parts, plan, micro_batches = trainer._parts, trainer.plan, trainer._num_microbatches
    again = itertools.cycle(list(itertools.islice(batches, 4 * micro_batches)))

    def step() -> None:
        reports = compute_gradients(parts, again, micro_batches, plan)
        parts.optimizer.step()
        parts.scheduler.step(plan.global_batch_size)
        reduce_losses(reports)

    step()  # without the tracker
    start = time.process_time()
    for _ in range(request["steps"]):
        step()
    spent = time.process_time() - start
    figures = {
        "seconds": spent / max(1, request["steps"]),
        "peak": measured.memory["activations"] + measured.memory["temporary"],
        **asdict(measured),
    }
    file = Path(request["folder"]) / f"rank_{os.environ['RANK']}.json"
    file.write_text(json.dumps(figures), encoding="utf-8")
    leave()


def measure(
    layout: dict, sizes: dict[str, int], folder: str | None, evenly: bool = False
) -> tuple[Any, Iterator[Any], Any]:
    """A trainer after two steps, its micro batches, and what the second step took on this rank.

    Call it after `setup_device`, on every rank.

    Args:
        layout: Options of the run.
        sizes: Of the model and its samples.
        folder: Of checkpoints; None: none are written.
        evenly: Whether experts get equal numbers of tokens, whatever their routers choose.
    """
    from retro_mcore.platform.experts import routing_evenly
    from retro_mcore.platform.tracking import Tracker
    from retro_mcore.training.loop.trainer import Trainer
    from retro_mcore.training.setup.simulate import measure_step

    plan, device = plan_of(layout, sizes, folder), torch.device("cpu")
    with Tracker() as tracker:
        trainer = Trainer(plan, random_samples(sizes, plan.with_retrieval), None, device)
        batches = trainer._train_batches()
        stages = trainer._parts.stages
        for chunk in stages:
            chunk.train()
        with routing_evenly(stages, tracker) if evenly else nullcontext():
            for _ in range(2):  # the first step makes the optimizer's state
                step = measure_step(
                    trainer._parts, trainer.plan, batches, trainer._num_microbatches, tracker
                )
    return trainer, batches, step


def random_samples(sizes: dict[str, int], neighbors: bool) -> Any:
    """Samples of random tokens."""
    from benchmarks.trainer_overhead import RandomSamples

    return RandomSamples(sizes["length"], CHUNK, sizes["vocabulary"], neighbors)


def plan_of(layout: dict, sizes: dict[str, int], folder: str | None) -> Any:
    """The plan of a run under the layout. Call it after `setup_device`."""
    from benchmarks.trainer_overhead import random_project
    from retro_mcore.training.options.pretrain import TrainingOptions
    from retro_mcore.training.setup.plan import make_plan

    project = random_project(sizes["length"], CHUNK, sizes["batch"])
    defaults: dict[str, Any] = {
        "num_layers": sizes["layers"],
        "hidden_size": sizes["hidden"],
        "num_attention_heads": sizes["hidden"] // 32,
        "retro_decoder_layers": [2, 4],
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "retro_encoder_hidden_dropout": 0.0,
        "retro_encoder_attention_dropout": 0.0,
        "micro_batch_size": 1,
        "num_workers": 0,
        "lr": 1e-4,
        "save": folder,
        "device": "cpu",
    }
    options = TrainingOptions(project_dir="random", **{**defaults, **layout})
    return make_plan(options, project, sizes["vocabulary"])


def show_layout(name: str, runs: list[tuple[dict, dict]]) -> None:
    """A row of the table: medians over the rounds."""
    seconds = [spread["seconds"] / whole["seconds"] for whole, spread in runs]
    whole, spread = runs[0]
    print(
        f"{name:28} CPU {statistics.median(seconds):5.2f} ({min(seconds):.2f} to "
        f"{max(seconds):.2f}) x one process, {spread['bytes'] / 2**20:8.2f} MiB sent, memory "
        f"{spread['peak'] / whole['peak']:.2f} x {whole['peak'] / 2**20:.0f} MiB, simulated "
        f"{spread['simulated'] / spread['peak']:.3f} of it",
        flush=True,
    )


def show_length(length: int, peaks: list[float]) -> None:
    """Memory at a sequence length, and relative to no context parallelism."""
    cells = [f"{peak / 2**20:8.0f} MiB ({peak / peaks[0]:.2f})" for peak in peaks]
    print(f"S {length:6}: CP1, 2, 4: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
