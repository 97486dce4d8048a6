"""`evaluate_perplexity`: perplexity on held-out documents with real, shuffled and no neighbors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.table import Table

from retro_mcore import distributed
from retro_mcore.cli.command import run_command
from retro_mcore.distributed import get_rank
from retro_mcore.errors import ConfigurationError
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import ProjectConfig
from retro_mcore.training.options import ParallelOptions

if TYPE_CHECKING:
    from retro_mcore.evaluation.perplexity import Perplexity
    from retro_mcore.training.provider import ModelArguments

PERPLEXITY_FILE = "perplexity.json"


@dataclass(kw_only=True)
class EvaluatePerplexityOptions:
    """Measure perplexity on held-out documents with real, shuffled and no neighbors.

    Shuffled: each chunk is given the neighbors of a chunk of another sample. The model is rebuilt
    from its checkpoint alone.
    """

    project_dir: str
    """The project directory."""
    load: str
    """Directory of checkpoints; the latest is evaluated."""
    split: Literal["valid", "test", "both"] = "valid"
    """Which held-out documents."""
    retro_eval_neighbors: list[Literal["real", "shuffled", "none"]] = field(default_factory=list)
    """Which neighbors to give. Default: real, shuffled and none, as far as the model retrieves."""
    eval_iters: int | None = None
    """Global batches to evaluate. Default: all samples of the split."""
    micro_batch_size: int = 4
    """Samples per process and forward pass."""
    num_workers: int = 0
    """Processes that read samples, for each process."""
    seed: int = 1234
    """Seed of the shuffling."""
    output: str | None = None
    """JSON file to write. Default: perplexity.json in --load."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: CUDA where there is one, else the CPU."""
    tensor_model_parallel_size: int = 1
    """Processes that share one copy of the model; need not be as in training."""
    sequence_parallel: bool = False
    """Split the norms' activations over the tensor parallel processes."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers' implementation."""


@dataclass(frozen=True)
class EvaluatePerplexityResult:
    """What was measured.

    Attributes:
        perplexities: One per split and kind of neighbors.
        output: The JSON file.
    """

    perplexities: list[Perplexity]
    output: Path

    def perplexity(self, neighbors: str, split: str = "valid") -> float:
        """The perplexity of one row of the table."""
        return next(
            row.perplexity
            for row in self.perplexities
            if (row.neighbors, row.split) == (neighbors, split)
        )


def evaluate_perplexity(options: EvaluatePerplexityOptions) -> EvaluatePerplexityResult:
    """Measure, print a table and write it as JSON.

    Raises:
        RetroError: options, project and checkpoint do not fit together.
    """
    setup_device(options.device)
    distributed.initialize(distributed_backend())
    # Megatron is imported only after the device is set up.
    from retro_mcore.evaluation.perplexity import check_shape, check_tokenizer
    from retro_mcore.training.checkpointing import load_model_from_checkpoint

    with distributed.raise_together():
        _check(options)
        project = ProjectConfig.load(options.project_dir)
    layout = ParallelOptions(
        device=options.device,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        sequence_parallel=options.sequence_parallel,
        transformer_impl=options.transformer_impl,
    )
    model, arguments = load_model_from_checkpoint(options.load, layout)
    with distributed.raise_together():
        check_tokenizer(arguments, project, options.project_dir)
        check_shape(arguments, project, options.project_dir)
    rows = _measure(options, project, model, arguments)
    output = Path(options.output or Path(options.load) / PERPLEXITY_FILE)
    with distributed.raise_together():
        if get_rank() == 0:
            write_json(output, [asdict(row) for row in rows])
    _print_table(rows)
    return EvaluatePerplexityResult(rows, output)


def _check(options: EvaluatePerplexityOptions) -> None:
    for flag, value in (
        ("--micro-batch-size", options.micro_batch_size),
        ("--eval-iters", options.eval_iters),
        ("--tensor-model-parallel-size", options.tensor_model_parallel_size),
    ):
        if value is not None and value < 1:
            raise ConfigurationError(flag, str(value), "Choose at least 1")


def _measure(
    options: EvaluatePerplexityOptions,
    project: ProjectConfig,
    model: torch.nn.Module,
    arguments: ModelArguments,
) -> list[Perplexity]:
    from retro_mcore.datasets.retro_dataset import build_retro_datasets
    from retro_mcore.evaluation.perplexity import measure_perplexity
    from retro_mcore.training.data import require_split

    splits = ("valid", "test") if options.split == "both" else (options.split,)
    with distributed.raise_together():
        kinds = _neighbor_sources(options, arguments)
    datasets = build_retro_datasets(
        options.project_dir, arguments.retro_num_neighbors, arguments.retro_num_retrieved_chunks
    )
    with distributed.raise_together():
        chosen = {split: require_split(datasets, split, options.project_dir) for split in splits}
    rows = []
    for split, dataset in chosen.items():
        limit = (options.eval_iters or len(dataset)) * project.retro_gpt_global_batch_size
        rows += [
            measure_perplexity(
                model,
                dataset,
                split,
                neighbors,
                num_samples=min(len(dataset), limit),
                micro_batch_size=options.micro_batch_size,
                num_workers=options.num_workers,
                seed=options.seed,
            )
            for neighbors in kinds
        ]
    return rows


def _neighbor_sources(options: EvaluatePerplexityOptions, arguments: ModelArguments) -> list:
    asked = list(dict.fromkeys(options.retro_eval_neighbors))
    if not arguments.no_retrieval:
        return asked or ["real", "shuffled", "none"]
    if set(asked) - {"none"}:
        raise ConfigurationError(
            "--retro-eval-neighbors",
            f"{' '.join(asked)}, but the model of {options.load} has no retrieval",
            "Leave it out, or say none",
        )
    return ["none"]


def _print_table(rows: list[Perplexity]) -> None:
    if get_rank() != 0:
        return
    table = Table(title="evaluate_perplexity", title_justify="left", title_style="bold")
    for name in ("split", "neighbors", "loss", "perplexity", "tokens", "seconds"):
        table.add_column(name, justify="left" if name in ("split", "neighbors") else "right")
    for row in rows:
        table.add_row(
            row.split,
            row.neighbors,
            f"{row.loss:.4f}",
            f"{row.perplexity:.3f}",
            f"{row.num_tokens:,}",
            f"{row.seconds:.1f}",
        )
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(EvaluatePerplexityOptions, evaluate_perplexity, argv)


if __name__ == "__main__":
    sys.exit(main())
