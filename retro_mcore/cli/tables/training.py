"""Summaries of training runs and dry runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from retro_mcore.cli.output import print_summary
from retro_mcore.distributed import get_rank

if TYPE_CHECKING:
    from retro_mcore.model.options import ModelArguments
    from retro_mcore.training.loop.trainer import TrainingResult
    from retro_mcore.training.setup.dry_run import DryRun
    from retro_mcore.training.setup.plan import TrainingPlan
    from retro_mcore.training.setup.simulate import Simulation

_GIB = 2**30
_EVEN = "Tokens are assumed to be evenly routed to the experts"
_KEPT_SCORES = (
    "With attention dropout the CPU's attention, which was simulated, keeps all scores, and a "
    "GPU's does not: for a GPU's memory simulate with --attention-dropout 0 "
    "--retro-encoder-attention-dropout 0"
)


def print_training(command: str, plan: TrainingPlan, result: TrainingResult) -> None:
    """Print the summary of a run, on rank 0."""
    rows: dict[str, object] = {}
    if result.reused:
        rows["reused"] = "this training is already finished"
    rows["iterations"] = f"{result.iteration} of {plan.train_iters}"
    if result.stopped_by is not None:
        rows["stopped by"] = f"{result.stopped_by}; run it again to go on"
    rows["samples"] = result.consumed_samples
    if result.num_parameters:
        rows["parameters"] = f"{result.num_parameters:,}"
    if result.train_losses:
        rows["training loss"] = f"{result.train_losses[0]:.4f} -> {result.train_losses[-1]:.4f}"
    if result.valid_losses:
        rows["validation loss"] = f"{result.valid_losses[-1][1]:.4f}"
    if result.test_loss is not None:
        rows["test loss"] = f"{result.test_loss:.4f}"
    rows |= {f"{split} samples": text for split, text in plan.repetitions.items()}
    for name, path in (("checkpoint", result.checkpoint), ("loss curve", result.loss_curve)):
        if path is not None:
            rows[name] = path
    if not result.reused:
        rows["seconds"] = f"{result.seconds:.1f}"
    print_summary(command, rows)


def print_dry_run(result: DryRun) -> None:
    """Print the summary of a dry run, on rank 0."""
    print_summary("pretrain_retro --dry-run", _dry_run_rows(result))
    if result.simulation is not None and get_rank() == 0:
        _print_simulation(result.simulation)
        if result.plan.arguments.num_experts is not None:
            print(_EVEN)
        if drops_attention(result.plan.arguments):
            print(_KEPT_SCORES)


def drops_attention(arguments: ModelArguments) -> bool:
    """Whether an attention of the model has dropout."""
    rates = [arguments.attention_dropout]
    if not arguments.no_retrieval:
        rates.append(arguments.retro_encoder_attention_dropout)
        rates.append(arguments.retro_encoder_cross_attention_dropout or 0.0)
    return max(rates) > 0


def _print_simulation(simulation: Simulation) -> None:
    """A column per pipeline stage: bytes and FLOPs of a training step of one process."""
    stages = simulation.stages
    table = Table(
        title="A simulated step of a process of each stage (local layers)",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("GiB, unless it says otherwise")
    for number in range(1, len(stages) + 1):
        table.add_column(f"stage {number}", justify="right")

    def add(name: str, values: Iterable[float], digits: str = ".2f") -> None:
        table.add_row(name, *(f"{value:{digits}}" for value in values))

    add("memory", (stage.peak / _GIB for stage in stages))
    for kind in stages[0].memory:
        add(f"  {kind}", (stage.memory[kind] / _GIB for stage in stages))
    groups = sorted({group for stage in stages for group, sent in stage.sent.items() if sent})
    add("sent", (sum(stage.sent.values()) / _GIB for stage in stages), ".3f")
    for group in groups:
        add(f"  {group}", (stage.sent.get(group, 0) / _GIB for stage in stages), ".3f")
    add("TFLOPs", (stage.flops / 1e12 for stage in stages), ",.1f")
    if len(stages) > 1:
        add("waiting for other stages, %", (100 * share for share in simulation.waiting), ".1f")
    width = max(80, 34 + 11 * len(stages))
    Console(width=width, markup=False, emoji=False).print(table)


def _dry_run_rows(result: DryRun) -> dict[str, object]:
    plan, memory, count = result.plan, result.memory, result.parameters
    options, copies = plan.options, result.copies
    tokens = plan.global_batch_size * plan.sequence_length
    layout = f"tensor {options.tensor_model_parallel_size}"
    layout += f" x pipeline {options.pipeline_model_parallel_size}"
    if options.context_parallel_size > 1:
        layout += f" x context {options.context_parallel_size}"
    layout += f" x data {copies}"
    if options.expert_model_parallel_size > 1:
        layout += f" (experts over {options.expert_model_parallel_size})"
    model = plan.arguments
    active = f"; {count.active:,} active" if count.inactive else ""
    sent = {}
    if result.context_bytes:
        sent["context parallelism"] = (
            f"about {result.context_bytes / _GIB:.3f} GiB sent by each process for each of "
            f"{result.num_microbatches} micro batches"
        )
    return {
        "model": f"{model.num_layers} layers of {model.hidden_size}, "
        f"{model.num_attention_heads} heads, vocabulary {model.padded_vocab_size}",
        "parameters": f"{count.total:,} (decoder {count.decoder + count.embedding:,}, retrieval "
        f"{count.retrieval:,}){active}",
        "processes": f"{result.world_size} = {layout}",
        "batch": f"{plan.global_batch_size} samples = {result.num_microbatches} x "
        f"{options.micro_batch_size} x {copies}; {tokens:,} tokens",
        "iterations": f"{plan.train_iters:,}; {plan.train_samples * plan.sequence_length:,} tokens",
        "memory per GPU": f"{memory.total / _GIB:.1f} GiB: weights {memory.weights / _GIB:.1f}, "
        f"gradients {memory.gradients / _GIB:.1f}, optimizer {memory.optimizer / _GIB:.1f}, "
        f"activations about {memory.activations / _GIB:.1f}",
        **sent,
        "FLOPs per token": f"{result.flops_per_token:.3e}",
        "FLOPs of the run": f"{result.flops_per_token * tokens * plan.train_iters:.3e}",
    }
