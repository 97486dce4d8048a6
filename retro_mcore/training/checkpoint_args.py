"""`--use-checkpoint-args`: the options of a model, from its checkpoint."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.safe_loading import read_common
from retro_mcore.training.checkpoint_files import find_checkpoint
from retro_mcore.training.options import ModelOptions


def model_options_of_checkpoint(load: str | None, ckpt_step: int | None = None) -> dict[str, Any]:
    """The options that define the model which a checkpoint holds, by name.

    Those given beside --use-checkpoint-args must not differ; `TrainingPlan.check_resumes` sees to
    that.

    Args:
        load: As --load.
        ckpt_step: As --ckpt-step.

    Raises:
        ConfigurationError: --load is not given.
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    if load is None:
        raise ConfigurationError("--use-checkpoint-args", "given without --load", "Add --load")
    saved = vars(read_common(find_checkpoint(load, ckpt_step))["args"])
    names = [field.name for field in fields(ModelOptions)]
    return {name: saved[name] for name in names if name in saved}
