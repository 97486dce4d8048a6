"""A run's local checkpoints: which one it resumes from, and which ones it saves."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from retro_mcore.checkpoint.files import iteration_of
from retro_mcore.checkpoint.loading import LoadScope
from retro_mcore.checkpoint.local import (
    LocalCheckpoints,
    LocalState,
    make_copies,
    run_of,
    start_run,
)
from retro_mcore.checkpoint.state import TrainingParts, TrainingProgress
from retro_mcore.distributed import get_world_size, on_first_rank, raise_together
from retro_mcore.platform.parallel import parallel_sizes
from retro_mcore.training.options.pretrain import TrainingOptions
from retro_mcore.training.setup.plan import TrainingPlan

#: Options by which the state is divided, or that change what it holds.
_OF_STATE = ("optimizer", "use_distributed_optimizer", "bf16", "fp16", "freeze_decoder")


def may_resume_locally(options: TrainingOptions) -> bool:
    """Whether there may be a local checkpoint that the run would resume from."""
    return _run_to_resume(options) is not None


def _run_to_resume(options: TrainingOptions) -> str | None:
    wanted = options.non_persistent_ckpt_type is not None and options.ckpt_step is None
    if options.load is None or options.finetune or not wanted:
        return None
    return run_of(options.load)


class LocalRun:
    """Local checkpoints of a run. All ranks make it and call its methods together.

    Args:
        plan: With --non-persistent-ckpt-type local.
        checkpoint: The checkpoint in --load that the run would resume from otherwise.

    Attributes:
        found: The local checkpoint to resume from; None if the other one is as new.
        notes: What the log should say of local checkpoints that are not used.

    Raises:
        CheckpointError: one cannot be read.
        ConfigurationError: --replication-jump does not fit the number of processes.
    """

    def __init__(self, plan: TrainingPlan, checkpoint: Path | None) -> None:
        options = plan.options
        self._copies = None
        if options.replication:
            with raise_together():
                self._copies = make_copies(
                    options.replication_jump or 1, options.replication_factor
                )
        self._plan = plan
        self.found: LocalState | None = None
        self.notes: list[str] = []
        source = on_first_rank(lambda: _run_to_resume(options))
        if source is not None:
            self._source = self._checkpoints(source)
            after = -1 if checkpoint is None else iteration_of(checkpoint)
            self.found, self.notes = self._source.newest_after(after)
        self._own = self._checkpoints(on_first_rank(lambda: _run_to_save(options)))

    def load(self, parts: TrainingParts, scope: LoadScope) -> TrainingProgress:
        """Put the state of `found` into the parts of the run, and forget it."""
        assert self.found is not None
        found, self.found = self.found, None
        return self._source.load(found, parts, scope)

    def save(self, parts: TrainingParts, progress: TrainingProgress, args: Namespace) -> Path:
        """Save one; returns where this rank's part lies."""
        return self._own.save(parts, progress, args)

    def _checkpoints(self, run: str) -> LocalCheckpoints:
        options = self._plan.options
        assert options.non_persistent_local_ckpt_dir is not None
        return LocalCheckpoints(
            options.non_persistent_local_ckpt_dir,
            run,
            options.non_persistent_local_ckpt_algo,
            self._copies,
            _layout(options),
        )


def _run_to_save(options: TrainingOptions) -> str:
    """A run that goes on keeps its name; one that starts does not meet what others left."""
    assert options.save is not None
    goes_on = options.load and Path(options.load).resolve() == Path(options.save).resolve()
    return (run_of(options.save) if goes_on else None) or start_run(options.save)


def _layout(options: TrainingOptions) -> dict[str, Any]:
    tensor, pipeline, virtual, context = parallel_sizes()
    return {
        "processes": get_world_size(),
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": context,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        **{name: getattr(options, name) for name in _OF_STATE},
    }
