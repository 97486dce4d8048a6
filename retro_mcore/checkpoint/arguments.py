"""What a training run's checkpoint was saved with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.contents import read_common
from retro_mcore.errors import CheckpointError


def read_arguments(checkpoint: Path) -> dict[str, Any]:
    """The arguments that a checkpoint was saved with.

    Raises:
        CheckpointError: it cannot be read.
    """
    common = read_common(checkpoint)
    if "args" not in common or "iteration" not in common:
        raise CheckpointError(
            checkpoint,
            "holds no arguments of a training run",
            "Name a checkpoint that pretrain_retro.py wrote",
        )
    if "no_retrieval" not in vars(common["args"]):
        raise CheckpointError(
            checkpoint,
            "was written by Megatron-LM, whose arguments do not suffice here",
            f"Convert it: tools/convert_checkpoint.py --load {checkpoint} --save OTHER "
            "--project-dir PROJECT, and name OTHER",
        )
    return vars(common["args"])
