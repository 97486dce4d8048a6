"""Saving and loading a checkpoint: time and size, in the background and not, in one run.

python -m benchmarks.checkpointing --num-layers 12 --hidden-size 512 --rounds 5 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from retro_mcore.platform import setup_device

VOCABULARY = 32_000


def main() -> None:
    """Measure and print the table."""
    arguments = _arguments()
    setup_device(arguments.device)
    parts = _build(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        figures = measure(parts, Path(folder), arguments.rounds)
    print(table(figures))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=4), encoding="utf-8")


def measure(parts: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """Save in turn, so that other work on the machine hits both alike; then load.

    Returns:
        Lists of seconds by name, and the size in bytes.
    """
    from retro_mcore.checkpoint.loading import load_checkpoint
    from retro_mcore.checkpoint.saving import CheckpointSaver
    from retro_mcore.checkpoint.state import TrainingProgress

    figures: dict[str, Any] = {"load": []}
    for how in ("sync", "async"):
        figures.update({f"{how} held": [], f"{how} held, CPU": [], f"{how} complete": []})
    for iteration in range(1, rounds + 1):
        for how in ("sync", "async"):
            saver = CheckpointSaver(folder / how, asynchronous=how == "async")
            start, start_cpu = time.perf_counter(), time.process_time()
            saver.save(parts, TrainingProgress(iteration, iteration), _saved_arguments())
            figures[f"{how} held"].append(time.perf_counter() - start)
            figures[f"{how} held, CPU"].append(time.process_time() - start_cpu)
            saver.finish()
            figures[f"{how} complete"].append(time.perf_counter() - start)
        checkpoint = folder / "sync" / f"iter_{iteration:07d}"
        start = time.perf_counter()
        load_checkpoint(checkpoint, parts)
        figures["load"].append(time.perf_counter() - start)
    figures["bytes"] = sum(path.stat().st_size for path in checkpoint.iterdir())
    return figures


def table(figures: dict[str, Any]) -> str:
    """Medians, and the medians of the rounds' ratios."""
    lines = ["| | sync | async | async ÷ sync |", "|---|---|---|---|"]
    for title, key in (
        ("training is held, s", "held"),
        ("of it CPU, s", "held, CPU"),
        ("until the checkpoint is complete, s", "complete"),
    ):
        sync, background = figures[f"sync {key}"], figures[f"async {key}"]
        ratio = statistics.median(b / a for a, b in zip(sync, background, strict=True))
        medians = f"{statistics.median(sync):.3f} | {statistics.median(background):.3f}"
        lines.append(f"| {title} | {medians} | {ratio:.2f} |")
    load, size = statistics.median(figures["load"]), figures["bytes"] / 2**20
    return "\n".join([*lines, "", f"load {load:.3f} s, size {size:.1f} MiB"])


def _build(arguments: argparse.Namespace) -> Any:
    from retro_mcore.checkpoint.state import TrainingParts
    from retro_mcore.training.loop.optimizer import (
        build_optimizer,
        build_scheduler,
        share_embeddings,
        wrap_model,
    )
    from retro_mcore.training.setup.build import build_model_stages
    from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds

    initialize_parallel()
    set_seeds(1234)
    plan = _plan(arguments)
    models = build_model_stages(plan.arguments, plan.options, plan.options)
    groups = share_embeddings(models)
    chunks = [wrap_model(model, plan) for model in models]
    optimizer = build_optimizer(chunks, groups, plan)
    return TrainingParts(chunks, optimizer, build_scheduler(optimizer, plan))


def _plan(arguments: argparse.Namespace) -> Any:
    from retro_mcore.project.config import ProjectConfig
    from retro_mcore.training.options.pretrain import TrainingOptions
    from retro_mcore.training.setup.plan import make_plan

    project = ProjectConfig(
        retro_block_size=100,
        retro_gpt_chunk_length=64,
        retro_gpt_seq_length=512,
        retro_gpt_global_batch_size=1,
        retro_gpt_train_samples=1000,
        retro_gpt_eval_interval=100,
        retro_gpt_eval_iters=1,
        retro_gpt_split="98,2,0",
        retro_gpt_seed=1234,
        retro_gpt_data_path=["text"],
        retro_gpt_tokenizer_type="GPTSentencePieceTokenizer",
    )
    options = TrainingOptions(
        project_dir="none",
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        num_attention_heads=arguments.hidden_size // 64,
        micro_batch_size=1,
        lr=1e-4,
        device=arguments.device,
        use_distributed_optimizer=arguments.use_distributed_optimizer,
    )
    return make_plan(options, project, VOCABULARY)


def _saved_arguments() -> Namespace:
    return Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--directory", help="where to write; default: the temporary directory")
    parser.add_argument("--json", help="file for all figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
