"""Loading checkpoints in megatron's torch_dist format, whatever layout they were saved under."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from retro_mcore import distributed
from retro_mcore.checkpoint.arguments import is_own
from retro_mcore.checkpoint.checksums import verify_checkpoint
from retro_mcore.checkpoint.contents import check_files, read_common, read_metadata
from retro_mcore.checkpoint.conversion.formats import open_checkpoint
from retro_mcore.checkpoint.conversion.model_weights import put_weights
from retro_mcore.checkpoint.random_state import set_random_state
from retro_mcore.checkpoint.safe_loading import load_run_state
from retro_mcore.checkpoint.state import (
    FAILURES,
    SQUARES,
    TrainingParts,
    TrainingProgress,
    model_key,
    reason_of,
    state_dict,
)
from retro_mcore.errors import CheckpointError
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.platform.optimizer_state import (
    keeping_adam_steps,
    mark_saved_rates,
    put_squares,
    regroup,
    supply_adam_step,
    unlike_parts,
    unshare_adam_steps,
    use_own_rates,
)
from retro_mcore.platform.parallel import parallel_sizes, unwrap_model
from retro_mcore.platform.torch_checkpoints import load_sharded_state


@dataclass(frozen=True)
class LoadScope:
    """What is taken from a checkpoint beside the weights.

    Attributes:
        optimizer: The optimizer's state and the schedule.
        random_state: The random states (only into the layout that they were saved under).
        progress: Iteration and position in the data.
    """

    optimizer: bool = True
    random_state: bool = True
    progress: bool = True


def load_checkpoint(
    checkpoint: Path, parts: TrainingParts, scope: LoadScope | None = None
) -> TrainingProgress:
    """Put a checkpoint's state into the parts of a run, whatever layout it was saved under.

    Random states are those of the checkpoint if the model is laid out alike; else the run goes on
    with those of its seed. Of a checkpoint of Megatron-LM only the weights can be loaded.

    Args:
        checkpoint: An iter_* directory.
        parts: Filled in place.
        scope: What to take; default: all.

    Raises:
        CheckpointError: it cannot be read, or its model is another; on every rank.
    """
    scope = scope or LoadScope()
    with distributed.raise_together():
        common = read_common(checkpoint)
        verify_checkpoint(checkpoint)
        _check_holds_run(common, scope, checkpoint)
    takes_random_state = scope.random_state and _same_layout(common["args"])
    check_parts(parts, common, scope, checkpoint)
    if is_own(vars(common["args"])):
        request = state_dict(parts, True, scope.optimizer, takes_random_state)
        state = load_state(request, checkpoint)
        return put_state(parts, state, common, scope, takes_random_state, checkpoint)
    assert not scope.optimizer  # only its weights can be loaded
    assert not takes_random_state
    load_megatron_lm([unwrap_model(stage) for stage in parts.stages], checkpoint)
    parts.optimizer.reload_model_params()
    return _progress_of(common, scope)


def check_parts(
    parts: TrainingParts, common: Mapping[str, Any], scope: LoadScope, checkpoint: Path
) -> None:
    """Refuse the state of an optimizer of matrices that has other parts than this run's.

    Raises:
        CheckpointError: it has.
    """
    unlike = scope.optimizer and unlike_parts(parts.optimizer, common.get("optimizer", {}))
    if unlike:
        raise CheckpointError(
            checkpoint,
            f"holds {unlike}",
            "Give --expert-model-parallel-size, and which weights are trained and at which "
            "rates, as before, or add --no-load-optim",
        )


def put_state(
    parts: TrainingParts,
    state: dict[str, Any],
    common: Mapping[str, Any],
    scope: LoadScope,
    takes_random_state: bool,
    checkpoint: Path,
) -> TrainingProgress:
    """Put a loaded state into the parts of a run.

    Args:
        parts: Filled in place.
        state: What a request of `state_dict` was filled with.
        common: What the checkpoint holds beside it.
        scope: What to take.
        takes_random_state: Whether to take the random states.
        checkpoint: For errors.

    Raises:
        CheckpointError: it was trained with another schedule.
    """
    for index, stage in enumerate(parts.stages):
        unwrap_model(stage).load_state_dict(state[model_key(index, parts.stages)])
    if scope.optimizer:
        _load_optimizer(parts, state["optimizer"], common["opt_param_scheduler"], checkpoint)
        put_squares(parts.optimizer, state.get(SQUARES, {}))
    else:
        parts.optimizer.reload_model_params()
    if takes_random_state:
        set_random_state(state["rng_state"][0])
    return _progress_of(common, scope)


def _progress_of(common: Mapping[str, Any], scope: LoadScope) -> TrainingProgress:
    if not scope.progress:
        return TrainingProgress()
    return TrainingProgress(common["iteration"], common["consumed_samples"])


def load_megatron_lm(models: Sequence[DecoderModel], checkpoint: Path) -> None:
    """Load the weights that Megatron-LM's trainer saved into this rank's stages of a model.

    Its GPTs are stored with stacked layers, and Transformer Engine's under other names.

    Raises:
        CheckpointError: they cannot be read, or belong to another model.
    """
    with distributed.raise_together():
        weights = open_checkpoint(checkpoint, compare=False).weights
    put_weights(models, weights, source=checkpoint)


def _check_holds_run(common: Mapping[str, Any], scope: LoadScope, checkpoint: Path) -> None:
    needed = ["args"]
    needed += ["opt_param_scheduler"] if scope.optimizer else []
    needed += ["iteration", "consumed_samples"] if scope.progress else []
    require_entries(checkpoint, common, needed)


def require_entries(checkpoint: Path, saved: Mapping[str, Any], names: Iterable[str]) -> None:
    counters = ("iteration", "consumed_samples")
    missing = [
        name
        for name in names
        if name not in saved or (name in counters and not isinstance(saved[name], int))
    ]
    if missing:
        raise CheckpointError(
            checkpoint,
            f"does not say {', '.join(missing)}",
            "Name a checkpoint that pretrain_retro.py wrote",
        )


def _same_layout(args: Namespace) -> bool:
    # Checkpoints of other programs may lack these arguments.
    return parallel_sizes() == (
        getattr(args, "tensor_model_parallel_size", None),
        getattr(args, "pipeline_model_parallel_size", None),
        getattr(args, "virtual_pipeline_model_parallel_size", None),
        getattr(args, "context_parallel_size", 1),
    )


def _load_optimizer(
    parts: TrainingParts, state: dict[str, Any], schedule: dict[str, Any], checkpoint: Path
) -> None:
    mark_saved_rates(state)
    state = regroup(parts.optimizer, state)
    supply_adam_step(parts.optimizer, state)
    if parts.scheduler.override_opt_param_scheduler:
        use_own_rates(parts.optimizer, state)
    with keeping_adam_steps(parts.optimizer):
        parts.optimizer.load_state_dict(state)
    unshare_adam_steps(parts.optimizer)
    try:
        parts.scheduler.load_state_dict(schedule)
    except AssertionError as error:
        raise CheckpointError(
            checkpoint,
            f"was trained with another schedule ({error})",
            "Give the flags of the schedule as they were, or add --override-opt-param-scheduler",
        ) from error


def load_state(request: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Fill megatron's sharded state from a checkpoint, on all ranks together.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    with distributed.raise_together():  # before megatron's collectives, in which others would wait
        metadata = read_metadata(checkpoint)
        check_files(checkpoint, metadata)
        _check_holds(request, metadata, checkpoint)
    with distributed.raise_together():
        try:
            return load_sharded_state(request, checkpoint, load_run_state)
        except FAILURES as error:
            raise CheckpointError(
                checkpoint,
                f"cannot be loaded ({reason_of(error)})",
                "Load an earlier checkpoint (--ckpt-step) if this one is damaged",
            ) from error
    raise AssertionError("unreachable: raise_together does not swallow errors")


def _check_holds(request: dict[str, Any], metadata: Metadata, checkpoint: Path) -> None:
    """Refuse a checkpoint that lacks what this rank asks for, or has it in other sizes."""
    for entry in sharded_entries(request):
        key = entry.unique_key if isinstance(entry, ShardedObject) else entry.key
        stored = metadata.state_dict_metadata.get(key)
        size = stored.size if isinstance(stored, TensorStorageMetadata) else None
        if stored is not None and not isinstance(entry, ShardedTensor):
            continue
        if stored is not None and (entry.allow_shape_mismatch or size == entry.global_shape):
            continue
        wanted = f" of {tuple(entry.global_shape)}" if isinstance(entry, ShardedTensor) else ""
        found = "holds none" if stored is None else f"holds one of {tuple(size or ())}"
        raise CheckpointError(
            checkpoint,
            f"belongs to another model or optimizer: {key}{wanted} is needed, and it {found}",
            "Use a checkpoint of this model",
        )


def sharded_entries(request: dict[str, Any]) -> Iterator[Any]:
    """The sharded tensors and objects of a state, with those that Megatron makes for saving."""
    for value in nested_values(request):
        if isinstance(value, ShardedTensorFactory):
            yield from nested_values(value.build())
        elif isinstance(value, ShardedBase):
            yield value
