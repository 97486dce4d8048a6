"""A run's local checkpoints: which one it resumes from, and which ones it saves."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from retro_mcore.checkpoint.files import iteration_of
from retro_mcore.checkpoint.loading import LoadScope
from retro_mcore.checkpoint.local import LocalCheckpoints, LocalState, make_copies
from retro_mcore.checkpoint.local_runs import runs_of
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
    return runs_of(options.load).run


class LocalRun:
    """Local checkpoints of a run. All ranks make it and call its methods together.

    Args:
        plan: With --non-persistent-ckpt-type local.
        checkpoint: The checkpoint in --load that the run would resume from otherwise.

    Attributes:
        found: The local checkpoint to resume from; None if the other one is as new.
        notes: What the log should say of local checkpoints that are not used.
        name: Of this start, under which it saves.

    Raises:
        CheckpointError: one cannot be read.
        ConfigurationError: --replication-jump does not fit the number of processes.
    """

    def __init__(self, plan: TrainingPlan, checkpoint: Path | None) -> None:
        options = plan.options
        assert options.save is not None
        assert options.non_persistent_local_ckpt_dir is not None
        copies = None
        if options.replication:
            with raise_together():
                copies = make_copies(options.replication_jump or 1, options.replication_factor)
        self._checkpoints = LocalCheckpoints(
            options.non_persistent_local_ckpt_dir,
            options.save,
            options.non_persistent_local_ckpt_algo,
            copies,
            _layout(options),
        )
        self.name = self._checkpoints.name
        self.found: LocalState | None = None
        self.notes: list[str] = []
        source = on_first_rank(lambda: _run_to_resume(options))
        if source is not None:
            after = -1 if checkpoint is None else iteration_of(checkpoint)
            self.found, self.notes = self._checkpoints.newest_after(source, after)

    def load(self, parts: TrainingParts, scope: LoadScope) -> TrainingProgress:
        """Put the state of `found` into the parts of the run, and forget it."""
        assert self.found is not None
        found, self.found = self.found, None
        return self._checkpoints.load(found, parts, scope)

    def save(self, parts: TrainingParts, progress: TrainingProgress, args: Namespace) -> Path:
        """Save one; returns where this rank's part lies."""
        return self._checkpoints.save(parts, progress, args)

    def remove(self) -> None:
        """Remove all from the nodes, after the run's last checkpoint in --save."""
        self._checkpoints.remove()


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
