"""A model rebuilt from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path

from megatron.core.models.gpt import GPTModel

from retro_mcore import distributed
from retro_mcore.checkpoint.arguments import read_arguments
from retro_mcore.checkpoint.checksums import verify_checkpoint
from retro_mcore.checkpoint.files import find_checkpoint
from retro_mcore.checkpoint.loading import load_state, require_entries
from retro_mcore.checkpoint.state import METADATA
from retro_mcore.model.options import ModelArguments
from retro_mcore.training.options.pretrain import ParallelOptions
from retro_mcore.training.setup.build import arguments_from, build_model
from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds


def load_model_from_checkpoint(
    directory: str | Path, parallel: ParallelOptions | None = None, ckpt_step: int | None = None
) -> tuple[GPTModel, ModelArguments]:
    """Rebuild a model from a checkpoint in `directory`, alone.

    It may have been saved under any layout. Call `retro_mcore.platform.setup_device` first;
    process groups are made here.

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
    initialize_parallel(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    with distributed.raise_together():
        checkpoint = find_checkpoint(directory, ckpt_step)
        saved = read_arguments(checkpoint)
        verify_checkpoint(checkpoint)
        require_entries(checkpoint, saved, ("seed", "bf16", "fp16"))
        arguments = arguments_from(saved)
    set_seeds(saved["seed"])
    names = ("bf16", "fp16", "fp32_residual_connection")
    precision = {name: saved[name] for name in names if name in saved}
    layout = ParallelOptions(**{**vars(parallel), **precision})
    with distributed.raise_together():
        model = build_model(arguments, layout)
    state = load_state({"model": model.sharded_state_dict(metadata=METADATA)}, checkpoint)
    model.load_state_dict(state["model"])
    return model.eval(), arguments
