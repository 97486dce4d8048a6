"""`--load-gpt`: the trainer's decoder from a GPT checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron.core.models.gpt import GPTModel

from retro_mcore.conversion.gpt import LoadedDecoder, load_gpt
from retro_mcore.training.plan import TrainingPlan
from retro_mcore.training.provider import (
    ModelArguments,
    default_ffn_hidden_size,
    number_of_positions,
)


def load_decoder(models: Sequence[GPTModel], plan: TrainingPlan) -> LoadedDecoder | None:
    """What --load-gpt names, into the model's decoder; None where it names nothing.

    Raises:
        CheckpointError: see `retro_mcore.conversion.gpt.load_gpt`.
    """
    directory = plan.options.load_gpt
    if directory is None:
        return None
    return load_gpt(models, directory, resolved_flags(plan.arguments), plan.arguments.vocab_size)


def resolved_flags(arguments: ModelArguments) -> dict[str, Any]:
    """The model's flags, defaults worked out, as checkpoints state them."""
    heads = arguments.num_attention_heads
    return {
        **asdict(arguments),
        "num_query_groups": arguments.num_query_groups or heads,
        "kv_channels": arguments.kv_channels or arguments.hidden_size // heads,
        "ffn_hidden_size": default_ffn_hidden_size(arguments),
        "max_position_embeddings": number_of_positions(arguments),
        # Without biases in the other layers; with them, they are there anyway.
        "add_qkv_bias": arguments.add_qkv_bias and arguments.disable_bias_linear,
    }
