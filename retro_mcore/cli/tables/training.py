"""Summaries of training runs and dry runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retro_mcore.cli.output import print_summary

if TYPE_CHECKING:
    from retro_mcore.training.loop.trainer import TrainingResult
    from retro_mcore.training.setup.dry_run import DryRun
    from retro_mcore.training.setup.plan import TrainingPlan

_GIB = 2**30


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
