"""Checkpoints in megatron's torch_dist format, written atomically.

    DIR/latest_checkpointed_iteration.txt      the last complete iteration, as Megatron writes it
    DIR/iter_0000100/                          model, optimizer, schedule, random states, arguments

A checkpoint is written into a temporary directory, renamed, and only then named in the tracker
file, so a crash while saving leaves the previous one loadable.
"""

from __future__ import annotations

import random
import shutil
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from retro_mcore import distributed
from retro_mcore.errors import CheckpointError
from retro_mcore.platform.compatibility import (
    allocate_adam_state,
    keeping_adam_steps,
    results_through_a_file,
    supply_adam_step,
    unpadded_bucket_offsets,
    unshare_adam_steps,
)
from retro_mcore.project.atomic import atomic_write
from retro_mcore.training.initialize import initialize_parallel, parallel_sizes, set_seeds
from retro_mcore.training.optimizer import unwrap_model
from retro_mcore.training.options import ParallelOptions
from retro_mcore.training.provider import ModelArguments, arguments_from, build_model

TRACKER = "latest_checkpointed_iteration.txt"

# How megatron lays out the state: in the shapes of the parameters, so that a checkpoint loads into
# any layout. Layers with cross-attention have parameters that others lack: non-homogeneous.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
}


@dataclass
class TrainingProgress:
    """How far a run has come.

    Attributes:
        iteration: Optimizer steps taken (or skipped for an overflow in fp16).
        consumed_samples: Training samples seen; the position in the data.
    """

    iteration: int = 0
    consumed_samples: int = 0


@dataclass
class TrainingParts:
    """What a checkpoint holds the state of."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def latest_iteration(directory: str | Path) -> int | None:
    """The iteration that the tracker file names; None where there is no checkpoint.

    Raises:
        CheckpointError: the tracker file is malformed, or its checkpoint is missing.
    """
    tracker = Path(directory) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise CheckpointError(
            str(tracker), f"names {text!r}, not an iteration", "Name one of the iter_* directories"
        )
    path = checkpoint_path(directory, int(text))
    if not (path / "metadata.json").is_file():
        raise CheckpointError(
            str(tracker),
            f"names iteration {text}, but {path} is not a complete checkpoint",
            "Write the iteration of a complete checkpoint into the tracker file",
        )
    return int(text)


def checkpoint_path(directory: str | Path, iteration: int) -> Path:
    """Where a checkpoint lies: `iter_0000100`, as in Megatron."""
    return Path(directory) / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """The iteration in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("iter_"))


def find_checkpoint(directory: str | Path) -> Path:
    """The latest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    iteration = latest_iteration(directory)
    if iteration is None:
        raise CheckpointError(
            f"--load {directory}",
            f"holds no checkpoint (no {TRACKER})",
            "Name the directory that pretrain_retro.py was given as --save",
        )
    return checkpoint_path(directory, iteration)


def read_arguments(checkpoint: Path) -> dict[str, Any]:
    """The arguments that a checkpoint was saved with.

    Raises:
        CheckpointError: it cannot be read.
    """
    return vars(_read_common(checkpoint)["args"])


def save_checkpoint(
    directory: str | Path, parts: TrainingParts, progress: TrainingProgress, args: Namespace
) -> Path:
    """Write a checkpoint, from all ranks together; returns its directory."""
    final = checkpoint_path(directory, progress.iteration)
    temporary = final.with_name(final.name + ".tmp")
    with distributed.raise_together():
        if distributed.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    state = _state_dict(parts, is_loading=False)
    state.update(
        args=args,
        checkpoint_version=3.0,
        iteration=progress.iteration,
        consumed_samples=progress.consumed_samples,
        opt_param_scheduler=parts.scheduler.state_dict(),
    )
    with results_through_a_file():
        dist_checkpointing.save(state, str(temporary), content_metadata=dict(_METADATA))
    with distributed.raise_together():
        if distributed.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            with atomic_write(Path(directory) / TRACKER) as tracker:
                tracker.write_text(str(progress.iteration), encoding="utf-8")
    return final


def load_checkpoint(checkpoint: Path, parts: TrainingParts) -> TrainingProgress:
    """Put a checkpoint's state into the parts of a run, whatever layout it was saved under.

    Random states are those of the checkpoint if the model is laid out alike; else the run goes on
    with those of its seed.

    Raises:
        CheckpointError: it cannot be read, or its model is another.
    """
    common = _read_common(checkpoint)
    args = common["args"]
    same_layout = parallel_sizes() == (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        getattr(args, "virtual_pipeline_model_parallel_size", None),
    )
    request = _state_dict(parts, is_loading=True, random_state=same_layout)
    state = _load(request, checkpoint)
    for index, chunk in enumerate(parts.chunks):
        unwrap_model(chunk).load_state_dict(state[_model_key(index, parts.chunks)])
    supply_adam_step(parts.optimizer, state["optimizer"])
    with keeping_adam_steps(parts.optimizer):
        parts.optimizer.load_state_dict(state["optimizer"])
    unshare_adam_steps(parts.optimizer)
    parts.scheduler.load_state_dict(common["opt_param_scheduler"])
    if same_layout:
        _set_random_state(state["rng_state"][0])
    return TrainingProgress(common["iteration"], common["consumed_samples"])


def load_model_from_checkpoint(
    directory: str | Path, parallel: ParallelOptions | None = None
) -> tuple[GPTModel, ModelArguments]:
    """Rebuild a model from the latest checkpoint in `directory`, alone.

    It may have been saved under any tensor parallel size. Call
    `retro_mcore.platform.setup_device` first; process groups are made here.

    Args:
        directory: What pretrain_retro.py was given as --save.
        parallel: The layout to load into; default: one process. The precision is the checkpoint's.

    Returns:
        The model on its device, in evaluation mode, and its arguments.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
        ConfigurationError: the layout does not fit the model.
    """
    parallel = parallel or ParallelOptions()
    initialize_parallel(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    with distributed.raise_together():
        checkpoint = find_checkpoint(directory)
        saved = read_arguments(checkpoint)
        arguments = arguments_from(saved)
    set_seeds(saved["seed"])
    precision = {"bf16": saved["bf16"], "fp16": saved["fp16"]}
    layout = ParallelOptions(**{**vars(parallel), **precision})
    with distributed.raise_together():
        model = build_model(arguments, layout)
    state = _load({"model": model.sharded_state_dict(metadata=_METADATA)}, checkpoint)
    model.load_state_dict(state["model"])
    return model.eval(), arguments


def _state_dict(
    parts: TrainingParts, is_loading: bool, random_state: bool = True
) -> dict[str, Any]:
    allocate_adam_state(parts.optimizer)
    state: dict[str, Any] = {
        _model_key(index, parts.chunks): unwrap_model(chunk).sharded_state_dict(metadata=_METADATA)
        for index, chunk in enumerate(parts.chunks)
    }
    with unpadded_bucket_offsets(parts.optimizer):
        state["optimizer"] = parts.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=_METADATA
        )
    if random_state:
        state["rng_state"] = _sharded_random_state()
    return state


def _model_key(index: int, chunks: Sequence[object]) -> str:
    """As Megatron names them: `model`, or `model0`, `model1`, … in the interleaved schedule."""
    return "model" if len(chunks) == 1 else f"model{index}"


def _load(request: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # megatron's use of torch
            return dist_checkpointing.load(request, str(checkpoint), strict="raise_unexpected")
    except Exception as error:  # megatron raises many kinds for a damaged or foreign checkpoint
        raise CheckpointError(
            str(checkpoint),
            f"cannot be loaded into this model ({type(error).__name__}: {error})",
            "Use the checkpoint of this model, or an earlier one if this one is damaged",
        ) from error


def _read_common(checkpoint: Path) -> Mapping[str, Any]:
    try:
        common = dist_checkpointing.load_common_state_dict(str(checkpoint))
        common["args"], common["iteration"]
    except Exception as error:  # see _load
        raise CheckpointError(
            str(checkpoint),
            f"is not a readable torch_dist checkpoint ({type(error).__name__}: {error})",
            "Name a checkpoint that pretrain_retro.py wrote",
        ) from error
    return common


def _sharded_random_state() -> ShardedObject:
    return ShardedObject(
        "rng_state",
        [_random_state()],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        replica_id=parallel_state.get_data_parallel_rank(),
    )


def _random_state() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002 (the global generator is saved)
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])  # noqa: NPY002
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
