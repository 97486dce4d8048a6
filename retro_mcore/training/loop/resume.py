"""Results of runs: which checkpoint to resume from, and whether a run is already finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from retro_mcore.checkpoint.arguments import require_own
from retro_mcore.checkpoint.files import (
    existing_checkpoint,
    iteration_of,
    latest_iteration,
)
from retro_mcore.checkpoint.loading import LoadScope
from retro_mcore.distributed import get_rank
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.project.atomic import atomic_write
from retro_mcore.training.loop.local_run import may_resume_locally
from retro_mcore.training.loop.sample_reader import Samples, SamplesInOrder
from retro_mcore.training.options.pretrain import TrainingOptions
from retro_mcore.training.reporting.metrics import (
    LOSS_CURVE_FILE,
    METRICS_FILE,
    losses,
    read_metrics,
)
from retro_mcore.training.setup.plan import TrainingPlan
from retro_mcore.training.setup.saved_arguments import saved_arguments

#: File in --save that names the last iteration of a run that has reached it, for launchers: after a
#: signal the exit code does not tell whether there is work left.
FINISHED_FILE = "finished_iteration.txt"


@dataclass
class TrainingResult:
    """Result of a run.

    Attributes:
        iteration: The last iteration.
        consumed_samples: Training samples seen.
        train_losses: Mean loss of each iteration that this process ran (not of those before
            resuming), in nats per token.
        valid_losses: (iteration, loss) of each validation.
        checkpoint: The last checkpoint, if any was saved.
        loss_curve: Path of the PNG, if one was drawn (on rank 0).
        seconds: Wall time of this run.
        reused: Whether the run was already finished, so nothing was trained.
        num_parameters: Number of parameters of the whole model, over all ranks.
        stopped_by: What ended the run early: "SIGTERM" or a flag; None if it ended as planned.
        test_loss: Loss on the test samples, with --skip-train.
    """

    iteration: int
    consumed_samples: int
    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[tuple[int, float]] = field(default_factory=list)
    checkpoint: Path | None = None
    loss_curve: Path | None = None
    seconds: float = 0.0
    reused: bool = False
    num_parameters: int = 0
    stopped_by: str | None = None
    test_loss: float | None = None


def checkpoint_to_resume(plan: TrainingPlan) -> Path | None:
    """The checkpoint to start from: that of --ckpt-step, else the latest; None if there is none.

    Raises:
        CheckpointError: it has another configuration, or a flag needs one and there is none; or it
            is Megatron-LM's, and not only its weights are wanted.
        ConfigurationError: --save holds a checkpoint that the run would overwrite.
    """
    options = plan.options
    checkpoint = None
    if options.load is not None:
        checkpoint = existing_checkpoint(options.load, options.ckpt_step)
    if checkpoint is not None:
        if not options.finetune:
            require_own(checkpoint)
        plan.check_resumes(saved_arguments(checkpoint), checkpoint)
    elif not may_resume_locally(options):
        check_needs_none(options)
    if checkpoint is None or options.finetune:
        _check_overwrites_nothing(options)
    return checkpoint


def check_needs_none(options: TrainingOptions) -> None:
    """Reject a run that has no checkpoint to start from, if a flag needs one.

    Raises:
        CheckpointError: naming the flag.
    """
    if options.needs_checkpoint is not None:
        raise CheckpointError(
            f"--load {options.load}",
            f"holds no checkpoint, and {options.needs_checkpoint} was given",
            "Name the --save of a run that has saved one",
        )


def _check_overwrites_nothing(options: TrainingOptions) -> None:
    saved = None if options.save is None else latest_iteration(options.save)
    if saved is not None:
        raise ConfigurationError(
            f"--save {options.save}",
            f"holds a checkpoint of iteration {saved}, which training from the start would "
            "overwrite",
            f"Resume it with --load {options.save}, or save to another directory",
        )


def load_scope(plan: TrainingPlan) -> LoadScope:
    """The parts of the checkpoint that the run loads."""
    options = plan.options
    return LoadScope(
        optimizer=not (options.finetune or options.no_load_optim),
        random_state=not (options.finetune or options.no_load_rng),
        progress=not options.finetune,
    )


def finished_run(plan: TrainingPlan) -> TrainingResult | None:
    """The result of a run that has already reached its last iteration; None if there is work left.

    Raises:
        CheckpointError: the checkpoint in --load has another configuration.
        ConfigurationError: --save holds a checkpoint that the run would overwrite.
    """
    checkpoint = checkpoint_to_resume(plan)
    if checkpoint is None or plan.options.finetune or iteration_of(checkpoint) < plan.train_iters:
        return None
    iteration = iteration_of(checkpoint)
    curve = checkpoint.parent / LOSS_CURVE_FILE
    return TrainingResult(
        iteration=iteration,
        consumed_samples=plan.batch_sizes.consumed_after(iteration),
        valid_losses=losses(read_metrics(checkpoint.parent / METRICS_FILE), "valid"),
        checkpoint=checkpoint,
        loss_curve=curve if curve.is_file() else None,
        reused=True,
    )


def tell_finished(save: str | None, iteration: int | None) -> None:
    """Write which iteration was the run's last (None: it goes on), on rank 0; see `FINISHED_FILE`.

    Args:
        save: The run's --save, if it has one.
        iteration: Its last iteration, whose checkpoint is written.
    """
    if save is None or get_rank() != 0:
        return
    path = Path(save) / FINISHED_FILE
    if iteration is None:
        path.unlink(missing_ok=True)
    else:
        with atomic_write(path) as temporary:
            temporary.write_text(f"{iteration}\n", encoding="utf-8")


def check_order(saved: Mapping[str, Any], samples: Samples, checkpoint: Path) -> None:
    """Check that the samples trained on so far are still the first samples, in the same order.

    Args:
        saved: The checkpoint's arguments.
        samples: The training samples.
        checkpoint: Its directory.

    Raises:
        CheckpointError: the samples or their order have changed.
    """
    before = saved.get("sample_order")
    if before is None or not isinstance(samples, SamplesInOrder):
        return
    if before["samples"] > len(samples):
        return
    if samples.order_digest(before["samples"]) != before["digest"]:
        raise CheckpointError(
            checkpoint,
            f"was trained on {before['samples']} samples, which are different ones in the "
            "project's current order (retro_gpt_train_samples is "
            f"{saved.get('project_train_samples')} there, {len(samples)} here)",
            "Preprocess the project with --train-samples as it was, or train with another --save "
            "(--finetune keeps the weights)",
        )


def order_of(samples: Samples, consumed: int) -> dict[str, Any]:
    """Description of the consumed samples for a checkpoint; see `check_order`."""
    if not isinstance(samples, SamplesInOrder):
        return {}
    order = {"samples": consumed, "digest": samples.order_digest(consumed)}
    return {"sample_order": order, "project_train_samples": len(samples)}


def num_parameters(stages: Sequence[torch.nn.Module]) -> int:
    """Number of parameters of the whole model, over all model and expert parallel ranks."""
    own = sum(
        parameter.numel() * _ranks_with_others(name, parameter)
        for stage in stages
        for name, parameter in stage.named_parameters()
        if not getattr(parameter, "shared", False)  # a copy of another stage's parameter
    )
    total = torch.tensor(own, device=torch.cuda.current_device())
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return int(total)


def _ranks_with_others(name: str, parameter: torch.nn.Parameter) -> int:
    """Number of ranks that hold parts of a parameter, or other experts of its layer."""
    # Set only on parameters that are divided.
    divided = getattr(parameter, "tensor_model_parallel", False)
    if ".experts." not in name:
        return parallel_state.get_tensor_model_parallel_world_size() if divided else 1
    parts = parallel_state.get_expert_tensor_parallel_world_size() if divided else 1
    return parts * parallel_state.get_expert_model_parallel_world_size()
