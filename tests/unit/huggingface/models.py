"""Small pairs of models: ours on Megatron, and the same weights in transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.builders import VOCABULARY, make_inputs, randomize_vectors

#: Options of the small model, by the names of our flags.
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "retro_chunk_length": 8,
    "retro_encoder_hidden_dropout": 0.0,
    "retro_encoder_attention_dropout": 0.0,
    "retro_encoder_cross_attention_dropout": 0.0,
    "retro_decoder_layers": [2, 4],
    # Large enough for neighbors to show in the logits.
    "init_method_std": 0.2,
    "max_position_embeddings": 64,
    "seq_length": 32,
    "vocab_size": VOCABULARY - 6,
    "padded_vocab_size": VOCABULARY,
    "tokenizer_type": "unknown",
    "tokenizer_fingerprint": "",
}


def mostly_slow(names: Iterable[str], *fast: str) -> list[Any]:
    """Parameters of a test, of which the default run takes a few."""
    slow = pytest.mark.slow
    return [name if name in fast else pytest.param(name, marks=slow) for name in names]


def pair(**options: Any) -> tuple[Any, Any]:
    """Our model and transformers', both in float64 and evaluation mode."""
    from retro_mcore.model.options import ModelArguments

    ours = our_model(**options)
    arguments = ModelArguments(**{**SMALL, **options})
    return ours, transformers_model(ours, arguments).double().eval()


def our_model(**options: Any) -> Any:
    """Our model in float64 and evaluation mode."""
    from retro_mcore.model.options import ModelArguments
    from retro_mcore.training.options.pretrain import ParallelOptions
    from retro_mcore.training.setup.build import build_model

    arguments = ModelArguments(**{**SMALL, **options})
    ours = build_model(arguments, ParallelOptions())
    randomize_vectors(ours)
    return ours.double().eval()


def transformers_model(ours: Any, arguments: Any) -> Any:
    """The same model in transformers."""
    from retro_mcore.checkpoint.conversion.retro_config import retro_config
    from retro_mcore.checkpoint.conversion.retro_names import to_retro_huggingface
    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.huggingface import RetroForCausalLM

    flags = dict(vars(arguments))
    weights = {
        name: Weight.of(value)
        for name, value in ours.state_dict().items()
        if isinstance(value, Tensor)
    }
    model = RetroForCausalLM(retro_config(flags, eod=3))
    state = {name: weight.load() for name, weight in to_retro_huggingface(weights, flags).items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def inputs_of(model: Any, length: int = 32, batch_size: int = 2) -> dict[str, Tensor]:
    """Inputs of transformers' model: `make_inputs`, with -1 where its mask is True."""
    made = make_inputs(model.config, length, batch_size)
    retrieved = made["retrieved"].masked_fill(made["mask"], -1)
    return {"input_ids": made["tokens"], "retrieved_input_ids": retrieved}


def our_logits(model: Any, inputs: dict[str, Tensor], pad: int = 3) -> Tensor:
    """Logits of our model on inputs of transformers'."""
    tokens, retrieved = inputs["input_ids"], inputs.get("retrieved_input_ids")
    context = {}
    if retrieved is not None:
        mask = (retrieved < 0).flatten(0, 2)
        rows = retrieved.flatten(0, 2).masked_fill(mask, pad)
        context = {"context_input_ids": rows, "context_mask": mask}
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None, **context)


def their_logits(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Logits of transformers' model, of every row of the vocabulary."""
    size, model.config.tokenizer_vocab_size = model.config.tokenizer_vocab_size, None
    with torch.no_grad():
        logits = model(**inputs, **kwargs).logits
    model.config.tokenizer_vocab_size = size
    return logits
