"""The arguments of a saved model, whichever trainer saved it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.arguments import in_our_form, read_arguments
from retro_mcore.checkpoint.conversion.formats import open_checkpoint
from retro_mcore.checkpoint.conversion.model_fields import MODEL_FIELDS, Flags
from retro_mcore.errors import CheckpointError
from retro_mcore.model.options import ModelArguments
from retro_mcore.training.options.model_sizes import default_ffn_hidden_size
from retro_mcore.training.setup.model_config import number_of_positions


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """The arguments that a checkpoint was saved with, under our names.

    Those of Megatron-LM's trainer are translated. What they do not record (fingerprint of the
    tokenizer, order of the samples) is missing or empty.

    Raises:
        CheckpointError: it cannot be read, holds no arguments of a training run, or its model must
            be converted first.
    """
    arguments = read_arguments(checkpoint)
    if in_our_form(arguments):
        return arguments
    convert = f"Convert it: tools/convert_checkpoint.py --load {checkpoint} --save OTHER "
    found = open_checkpoint(checkpoint, compare=False)
    if found.has_other_names:
        raise CheckpointError(
            checkpoint,
            "is a Retro of Megatron-LM's own, whose weights have other names",
            convert + "--project-dir PROJECT, and name OTHER",
        )
    flags = {"tokenizer_fingerprint": None, **found.flags}  # None: another trainer's
    return {**flags, **complete_arguments(flags, checkpoint, convert + "--model-config FILE")}


def complete_arguments(
    flags: Flags,
    source: object,
    fix: str = "Give them in a YAML file: --model-config FILE (or --project-dir)",
) -> Flags:
    """All arguments of a model, with defaults only for those that do not change its results.

    Args:
        flags: The options that its checkpoint states.
        source: The checkpoint, for the error.
        fix: What to do if it does not state enough.

    Raises:
        CheckpointError: an option is missing that has no safe default.
    """
    missing = [name for name in _needed(flags) if flags.get(name) is None]
    if missing:
        raise CheckpointError(source, f"does not say {', '.join(missing)}", fix)
    values: Flags = {
        "retro_chunk_length": 64,  # not used by a GPT
        "vocab_size": flags["padded_vocab_size"],
        "tokenizer_type": "unknown",
        "tokenizer_fingerprint": "",
        **flags,
    }
    arguments: Flags = {}
    for field in fields(ModelArguments):
        if field.name in values:
            arguments[field.name] = values[field.name]
        elif field.default is not MISSING:
            arguments[field.name] = field.default
    return asdict(_as_trained(ModelArguments(**arguments)))


def _needed(flags: Flags) -> Iterator[str]:
    """Options whose defaults would be silently wrong."""
    kinds = {"always"}
    kinds |= {"rotary"} if flags["position_embedding_type"] == "rope" else set()
    kinds |= set() if flags["no_retrieval"] else {"retrieval"}
    return (name for name, traits in MODEL_FIELDS.items() if traits.needed in kinds)


def _as_trained(arguments: ModelArguments) -> ModelArguments:
    """Turn sizes equal to the defaults into defaults, so a run with the usual flags can resume."""
    heads = arguments.num_attention_heads
    usual = {
        "num_query_groups": heads,
        "kv_channels": arguments.hidden_size // heads,
        "ffn_hidden_size": default_ffn_hidden_size(replace(arguments, ffn_hidden_size=None)),
    }
    left_out: Flags = {
        name: None for name, size in usual.items() if getattr(arguments, name) == size
    }
    positions = arguments.max_position_embeddings or number_of_positions(arguments)
    return replace(arguments, **left_out, max_position_embeddings=positions)
