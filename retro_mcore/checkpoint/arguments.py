"""Arguments that a checkpoint was saved with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.bridge_config import BRIDGE_FILE
from retro_mcore.checkpoint.contents import read_common
from retro_mcore.errors import CheckpointError
from retro_mcore.model.options import with_unstated

_LOG = logging.getLogger(__name__)


def read_arguments(checkpoint: Path) -> dict[str, Any]:
    """The arguments that a trainer, ours or Megatron's, saved with a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or holds none.
    """
    common = read_common(checkpoint)
    if "args" not in common and (checkpoint / BRIDGE_FILE).is_file():
        raise CheckpointError(
            checkpoint,
            "was written by Megatron-Bridge, and its model is not one of retro_mcore.bridge, so it "
            "does not record the model's options",
            f"Convert it: tools/convert_checkpoint.py --load {checkpoint} --save OTHER "
            "--model-config FILE, a YAML file of options (num_attention_heads, rotary_base, ...)",
        )
    if "args" not in common or "iteration" not in common:
        raise CheckpointError(
            checkpoint,
            "holds no arguments of a training run",
            "Name a checkpoint that pretrain_retro.py wrote",
        )
    return completed(vars(common["args"]), checkpoint)


def completed(arguments: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's arguments with what those of older versions of ours do not state."""
    if in_our_form(arguments) and not arguments["no_retrieval"]:
        arguments = with_unstated(arguments)
    return _with_layers_of_window(arguments, checkpoint)


def _with_layers_of_window(arguments: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Arguments of ours from before the layers with a window were recorded, completed."""
    window, known = arguments.get("sliding_window"), "window_attn_skip_freq" in arguments
    if not window or known or not in_our_form(arguments):
        return arguments
    local = arguments.get("rotary_local_layers")
    if local:
        layers = [int(n in local) for n in range(1, arguments["num_layers"] + 1)]
        return {**arguments, "window_attn_skip_freq": layers}
    _LOG.warning(
        "%s does not say which layers have its window of %d tokens: all of them are taken. Convert "
        "the model again if only some have it",
        checkpoint,
        window,
    )
    return arguments


def in_our_form(arguments: Mapping[str, Any]) -> bool:
    """Whether arguments have our names: our trainer's, or those of a model in Megatron-Bridge."""
    return "no_retrieval" in arguments


def is_own(arguments: Mapping[str, Any]) -> bool:
    """Whether our own trainer saved these arguments."""
    return in_our_form(arguments) and "trainer" not in arguments


def require_own(checkpoint: Path) -> None:
    """Reject a checkpoint that a run cannot go on from, because another trainer wrote it.

    Raises:
        CheckpointError: it is one.
    """
    if not is_own(read_arguments(checkpoint)):
        raise CheckpointError(
            checkpoint,
            "was written by Megatron-LM or Megatron-Bridge, whose optimizer and position in the "
            "data are not read here",
            "Add --finetune, to start from its weights",
        )
