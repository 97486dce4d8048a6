"""Options that `--use-checkpoint-args` and `--load-gpt` take from a checkpoint."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from retro_mcore.checkpoint.conversion.formats import open_checkpoint
from retro_mcore.checkpoint.conversion.model_fields import MODEL_FIELDS
from retro_mcore.checkpoint.files import existing_checkpoint, find_checkpoint
from retro_mcore.errors import ConfigurationError
from retro_mcore.model.options import ModelOptions
from retro_mcore.training.setup.saved_arguments import saved_arguments


def model_options_of_checkpoint(load: str | None, ckpt_step: int | None = None) -> dict[str, Any]:
    """Options that define a checkpoint's model, by name.

    Explicitly given options must not differ; `TrainingPlan.check_resumes` checks this.

    Args:
        load: Value of --load.
        ckpt_step: Value of --ckpt-step.

    Raises:
        ConfigurationError: --load is not given.
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    if load is None:
        raise ConfigurationError("--use-checkpoint-args", "given without --load", "Add --load")
    saved = saved_arguments(find_checkpoint(load, ckpt_step))
    names = [field.name for field in fields(ModelOptions)]
    return {name: saved[name] for name in names if name in saved}


def model_options_of_gpt(
    load_gpt: str, load: str | None = None, ckpt_step: int | None = None
) -> dict[str, Any]:
    """Options of the GPT in --load-gpt, by name; when resuming, those of the run itself.

    Explicitly given options must not differ, except dropout;
    `retro_mcore.training.setup.retrofit.gpt_arguments` checks this.

    Args:
        load_gpt: Value of --load-gpt.
        load: Value of --load. If it contains a checkpoint, that is resumed and the GPT is not
            needed.
        ckpt_step: Value of --ckpt-step.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    if load is not None and existing_checkpoint(load, ckpt_step) is not None:
        return model_options_of_checkpoint(load, ckpt_step)
    checkpoint = open_checkpoint(load_gpt, compare=False)
    flags = checkpoint.flags
    learned = flags.get("position_embedding_type") == "learned_absolute"
    # Hugging Face's state it only if longer texts would be rotated otherwise.
    states_limit = learned or checkpoint.source in ("huggingface", "gguf")
    unused = () if states_limit else ("max_position_embeddings",)
    names = [name for name, traits in MODEL_FIELDS.items() if traits.gpt and name not in unused]
    return {name: flags[name] for name in names if flags.get(name) is not None}
