"""Rebuild a model from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retro_mcore import distributed
from retro_mcore.checkpoint.arguments import is_own, read_arguments
from retro_mcore.checkpoint.checksums import verify_checkpoint
from retro_mcore.checkpoint.files import find_checkpoint
from retro_mcore.checkpoint.loading import load_megatron_lm, load_state, require_entries
from retro_mcore.checkpoint.state import METADATA
from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.options import ModelArguments
from retro_mcore.training.options.pretrain import ParallelOptions
from retro_mcore.training.setup.build import arguments_from, build_model
from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds
from retro_mcore.training.setup.saved_arguments import saved_arguments


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint's model before it is built.

    Attributes:
        path: The checkpoint.
        entries: Everything that the checkpoint records about its run.
        arguments: Arguments that the model is built from.
        is_own: Whether our own trainer saved it; otherwise Megatron-LM's did.
    """

    path: Path
    entries: Mapping[str, Any]
    arguments: ModelArguments
    is_own: bool = True

    @classmethod
    def find(cls, directory: str | Path, ckpt_step: int | None = None) -> SavedModel:
        """Read a checkpoint's records. All ranks call it, inside `raise_together`.

        Args:
            directory: The --save directory of the run.
            ckpt_step: The iteration; default: the latest.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        path = find_checkpoint(directory, ckpt_step)
        entries = saved_arguments(path)
        verify_checkpoint(path)
        require_entries(path, entries, ("seed", "bf16", "fp16"))
        return cls(path, entries, arguments_from(entries), is_own(read_arguments(path)))

    def with_attention_gate(self, gate: float | None) -> SavedModel:
        """The same model with a different attention gate; None keeps the trained model's gate.

        Raises:
            ConfigurationError: the model was trained without retrieval, so it has no gate.
        """
        if gate is None:
            return self
        if self.arguments.no_retrieval:
            raise ConfigurationError(
                "--retro-attention-gate",
                f"the model of {self.path.parent} was trained without retrieval",
                "Leave it out",
            )
        return replace(self, arguments=replace(self.arguments, retro_attention_gate=gate))

    def load(self, parallel: ParallelOptions) -> DecoderModel:
        """Build this rank's part of the model, load its weights, and set evaluation mode.

        Args:
            parallel: The layout to load into. The precision is the checkpoint's.

        Raises:
            CheckpointError: the weights cannot be read.
            ConfigurationError: the layout does not fit the model.
        """
        set_seeds(self.entries["seed"])
        names = ("bf16", "fp16", "fp32_residual_connection")
        precision = {name: self.entries[name] for name in names if name in self.entries}
        layout = ParallelOptions(**{**vars(parallel), **precision})
        with distributed.raise_together():
            model = build_model(self.arguments, layout)
        if self.is_own:
            state = load_state({"model": model.sharded_state_dict(metadata=METADATA)}, self.path)
            model.load_state_dict(state["model"])
        else:
            load_megatron_lm([model], self.path)
        return model.eval()


def require_whole_experts(layout: ParallelOptions) -> None:
    """Reject a layout that divides experts: a model that is not trained has all of them.

    Raises:
        ConfigurationError: it does.
    """
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if (getattr(layout, name) or 1) > 1:
            found = f"{getattr(layout, name)}, but experts are divided in training alone"
            raise ConfigurationError(flag_of(name), found, "Leave it out")


def load_model_from_checkpoint(
    directory: str | Path, parallel: ParallelOptions | None = None, ckpt_step: int | None = None
) -> tuple[DecoderModel, ModelArguments]:
    """Rebuild a model from a checkpoint in `directory`, without other information.

    It may have been saved under any layout. Call `retro_mcore.platform.setup_device` first. This
    function creates the process groups.

    Args:
        directory: Value of pretrain_retro.py's --save.
        parallel: The layout to load into; default: one process. The precision is the checkpoint's.
        ckpt_step: The iteration; default: the latest.

    Returns:
        The model on its device, in evaluation mode, and its arguments.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
        ConfigurationError: the layout does not fit the model.
    """
    parallel = parallel or ParallelOptions()
    require_whole_experts(parallel)
    initialize_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )
    with distributed.raise_together():
        saved = SavedModel.find(directory, ckpt_step)
    return saved.load(parallel), saved.arguments
