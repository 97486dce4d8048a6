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
rank where it is largest.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    return launch(1, whole, sizes, steps), launch(2, layout, sizes, steps)


def memory_of(sizes: dict[str, int], length: int) -> list[float]:
    """Bytes of the rank with most, under context parallelism of 1, 2 and 4."""
    sizes = {**sizes, "batch": 1, "length": length}
    peaks = []
    for size in (1, 2, 4):
        layout = {"context_parallel_size": size} if size > 1 else {}
        peaks.append(launch(size, layout, sizes, steps=0)["peak"])
    return peaks


def launch(ranks: int, layout: dict, sizes: dict[str, int], steps: int) -> dict[str, float]:
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
        "bytes": max(each["bytes"] for each in written),
        "peak": max(each["peak"] for each in written),
    }


def run_rank(request: dict[str, Any]) -> None:
    """Train on this rank; write its figures."""
    from benchmarks.peak_memory import peak_bytes

    sent: list[float] = []
    count_collectives(sent)  # before megatron keeps the functions under names of its own
    step = make_step(request["layout"], request["sizes"], request["folder"])
    step()
    del sent[:]
    peak = peak_bytes(step)
    total, start = sum(sent), time.process_time()
    for _ in range(request["steps"]):
        step()
    spent = time.process_time() - start
    figures = {
        "seconds": spent / max(1, request["steps"]),
        "bytes": total,
        "peak": peak,
    }
    file = Path(request["folder"]) / f"rank_{os.environ['RANK']}.json"
    file.write_text(json.dumps(figures), encoding="utf-8")
    from retro_mcore.distributed import leave

    leave()


def make_step(layout: dict, sizes: dict[str, int], folder: str) -> Callable[[], None]:
    """A step of training under the layout."""
    from retro_mcore.platform import setup_device

    device = setup_device("cpu")
    from benchmarks.trainer_overhead import RandomSamples, random_project
    from retro_mcore.training.loop.loss import forward_backward, reduce_losses
    from retro_mcore.training.loop.trainer import Trainer
    from retro_mcore.training.options.pretrain import TrainingOptions
    from retro_mcore.training.setup.plan import make_plan

    project = random_project(sizes["length"], CHUNK, sizes["batch"])
    options = TrainingOptions(
        project_dir="random",
        num_layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        num_attention_heads=sizes["hidden"] // 32,
        retro_decoder_layers=[2, 4],
        position_embedding_type="rope",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
        micro_batch_size=1,
        num_workers=0,
        lr=1e-4,
        save=folder,
        device="cpu",
        **layout,
    )
    samples = RandomSamples(sizes["length"], CHUNK, sizes["vocabulary"])
    trainer = Trainer(make_plan(options, project, sizes["vocabulary"]), samples, None, device)
    parts, plan = trainer._parts, trainer.plan
    micro_batches = trainer._num_microbatches
    batches = itertools.islice(trainer._train_batches(), 16 * micro_batches)
    again = itertools.cycle(list(batches))
    for chunk in parts.stages:
        chunk.train()

    def step() -> None:
        for chunk in parts.stages:
            chunk.zero_grad_buffer()
        parts.optimizer.zero_grad()
        reports = forward_backward(
            parts.stages, again, micro_batches, plan.sequence_length, 1, with_retrieval=True
        )
        parts.optimizer.step()
        parts.scheduler.step(plan.global_batch_size)
        reduce_losses(reports)

    return step


def count_collectives(sent: list[float]) -> None:
    """Append to `sent` the bytes that this rank sends in each call of torch.distributed."""
    import torch.distributed as dist

    def size_of(group: Any) -> int:
        return dist.get_world_size(group)

    def ring(tensor: Any, group: Any, rounds: int = 1) -> float:
        ranks = size_of(group)
        return rounds * tensor.nbytes * (ranks - 1) / ranks

    def wrap(name: str, count: Callable[..., float]) -> None:
        function = getattr(dist, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            sent.append(count(*args, **kwargs))
            return function(*args, **kwargs)

        setattr(dist, name, counting)

    wrap("all_reduce", lambda tensor, op=None, group=None, **_: ring(tensor, group, 2))
    wrap("broadcast", lambda tensor, src=None, group=None, **_: ring(tensor, group))
    wrap("all_gather_into_tensor", lambda out, given, group=None, **_: ring(out, group))
    wrap("reduce_scatter_tensor", lambda out, given, op=None, group=None, **_: ring(given, group))
    wrap(
        "all_to_all_single",
        lambda out, given, sizes=None, own=None, group=None, **_: ring(given, group),
    )
    wrap(
        "all_gather",
        lambda outs, given, group=None, **_: given.nbytes * (size_of(group) - 1),
    )
    sending, point_to_point = dist.isend, dist.P2POp
    wrap("isend", lambda tensor, *_, **__: tensor.nbytes)
    counting = dist.isend

    def operation(op: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if op is counting:
            sent.append(tensor.nbytes)
        return point_to_point(sending if op is counting else op, tensor, *args, **kwargs)

    setattr(dist, "P2POp", operation)  # noqa: B010 (a type, for mypy)


def show_layout(name: str, runs: list[tuple[dict, dict]]) -> None:
    """A row of the table: medians over the rounds."""
    seconds = [spread["seconds"] / whole["seconds"] for whole, spread in runs]
    whole, spread = runs[0]
    print(
        f"{name:28} CPU {statistics.median(seconds):5.2f} ({min(seconds):.2f} to "
        f"{max(seconds):.2f}) x one process, {spread['bytes'] / 2**20:8.2f} MiB sent, memory "
        f"{spread['peak'] / whole['peak']:.2f} x {whole['peak'] / 2**20:.0f} MiB",
        flush=True,
    )


def show_length(length: int, peaks: list[float]) -> None:
    """Memory at a sequence length, and relative to no context parallelism."""
    cells = [f"{peak / 2**20:8.0f} MiB ({peak / peaks[0]:.2f})" for peak in peaks]
    print(f"S {length:6}: CP1, 2, 4: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
