"""What the entry point adds to a step: its time ÷ that of the bare loop around megatron.

    python -m benchmarks.trainer_overhead
    python -m benchmarks.trainer_overhead --project-dir PROJECT --rounds 20    # a project's samples

Both sides train the same model, in one process and in turns of some steps each, so that other work
on the machine hits both alike. The bare side runs zero_grad, forward-backward, optimizer and
schedule on batches that lie ready in memory. The entry point's side is `pretrain_retro`'s own loop:
it reads samples, reduces the loss over ranks, watches for signals and spikes, reports, and writes
metrics (--log-interval 1, the worst case). Saving and validation are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 100_000


class RandomSamples:
    """Samples of random tokens, ready in memory as a memory-mapped project's are."""

    def __init__(
        self, sequence_length: int, chunk_length: int, vocabulary: int, neighbors: bool = True
    ) -> None:
        generator = np.random.default_rng(1)
        chunks = sequence_length // chunk_length
        shape = (64, chunks, 2, 2 * chunk_length)
        self._text = generator.integers(0, vocabulary, (64, sequence_length + 1))
        self._neighbors = generator.integers(0, vocabulary, shape)
        self._mask = np.zeros(shape, dtype=bool)
        self._has_neighbors = neighbors

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % 64
        if not self._has_neighbors:
            return {"text": self._text[row]}
        return {
            "text": self._text[row],
            "neighbor_tokens": self._neighbors[row],
            "neighbor_mask": self._mask[row],
        }


def make_trainer(options: argparse.Namespace, folder: str) -> Any:
    """A trainer, on a project's samples or on random ones."""
    from retro_mcore.platform import setup_device

    device = setup_device(options.device)
    from retro_mcore.project.config import ProjectConfig
    from retro_mcore.training.loop.trainer import Trainer
    from retro_mcore.training.options.pretrain import TrainingOptions
    from retro_mcore.training.setup.plan import make_plan

    if options.project_dir:
        from retro_mcore.data.tokenizers.loading import load_project_tokenizer
        from retro_mcore.project.paths import ProjectPaths
        from retro_mcore.samples.retro_dataset import build_retro_datasets

        project = ProjectConfig.load(options.project_dir)
        samples: Any = build_retro_datasets(options.project_dir, 2, 2)["train"]
        vocabulary = load_project_tokenizer(project, ProjectPaths(options.project_dir)).vocab_size
    else:
        vocabulary = 2048
        project = random_project(options.seq_length, options.chunk_length)
        samples = RandomSamples(options.seq_length, options.chunk_length, vocabulary)
    flags = TrainingOptions(
        project_dir=options.project_dir or "random",
        num_layers=4,
        hidden_size=options.hidden_size,
        num_attention_heads=4,
        retro_decoder_layers=[2, 3, 4],
        position_embedding_type="rope",
        micro_batch_size=project.retro_gpt_global_batch_size,
        num_workers=options.num_workers,
        lr=1e-4,
        save=folder,
        log_interval=1,
        device=options.device,
    )
    return Trainer(make_plan(flags, project, vocabulary), samples, None, device)


def random_project(seq_length: int, chunk_length: int, global_batch_size: int = 4) -> Any:
    """The configuration of random samples."""
    from retro_mcore.project.config import ProjectConfig

    return ProjectConfig(
        retro_block_size=100,
        retro_gpt_chunk_length=chunk_length,
        retro_gpt_seq_length=seq_length,
        retro_gpt_global_batch_size=global_batch_size,
        retro_gpt_train_samples=SAMPLES,
        retro_gpt_eval_interval=SAMPLES,
        retro_gpt_eval_iters=1,
        retro_gpt_split="98,2,0",
        retro_gpt_seed=1234,
        retro_gpt_data_path=["text"],
        retro_gpt_tokenizer_type="GPTSentencePieceTokenizer",
    )


def sides(trainer: Any) -> dict[str, Callable[[], None]]:
    """A step of the bare loop, and one of the entry point's."""
    from retro_mcore.training.loop.loss import forward_backward

    parts, plan = trainer._parts, trainer.plan
    ready = list(itertools.islice(trainer._train_batches(), 16))
    bare_batches, read_batches = itertools.cycle(ready), trainer._train_batches()
    reporter = trainer._reporter().__enter__()
    for chunk in parts.stages:
        chunk.train()

    def bare() -> None:
        for chunk in parts.stages:
            chunk.zero_grad_buffer()
        parts.optimizer.zero_grad()
        forward_backward(
            parts.stages,
            bare_batches,
            1,
            plan.sequence_length,
            plan.options.micro_batch_size,
            True,
        )
        parts.optimizer.step()
        parts.scheduler.step(plan.global_batch_size)

    def entry_point() -> None:
        trainer._train_step(read_batches, reporter, stop=False)

    return {"bare loop": bare, "entry point": entry_point}


def measure(trainer: Any, rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per step of each side: of the processor, and of the clock, for each round."""
    import torch

    both = sides(trainer)
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "clock": []} for name in both}
    for name in both:
        both[name]()  # warm up
    for number in range(rounds):
        for name in sorted(both, reverse=bool(number % 2)):
            cpu, clock = time.process_time(), time.perf_counter()
            for _ in range(steps):
                both[name]()
            torch.cuda.synchronize()  # does nothing on CPU
            seconds[name]["cpu"].append((time.process_time() - cpu) / steps)
            seconds[name]["clock"].append((time.perf_counter() - clock) / steps)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project-dir", help="a project's samples in place of random ones")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--chunk-length", type=int, default=32)
    parser.add_argument("--num-workers", type=int, default=0, help="0: reading counts in full")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="of each side, per round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the seconds here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(make_trainer(options, folder), options.rounds, options.steps)
    for name, measured in seconds.items():
        cpu, clock = (1000 * statistics.median(measured[kind]) for kind in ("cpu", "clock"))
        print(f"{name:12} {cpu:9.1f} ms CPU {clock:9.1f} ms per step")
    for kind in ("cpu", "clock"):
        pairs = zip(seconds["entry point"][kind], seconds["bare loop"][kind], strict=True)
        ratio = statistics.median(ours / bare for ours, bare in pairs)
        print(f"entry point / bare loop, {kind}: {ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
