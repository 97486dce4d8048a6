"""Small Retro models and inputs for the tests of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 96

#: Sizes of the small model; every test overrides what it is about.
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "retro_chunk_length": 8,
    "retro_num_neighbors": 2,
    "retro_num_retrieved_chunks": 2,
    "retro_encoder_num_layers": 2,
    "retro_encoder_hidden_dropout": 0.0,
    "retro_encoder_attention_dropout": 0.0,
    "retro_decoder_layers": [2, 4],
    # Large enough for neighbors to show in the logits.
    "init_method_std": 0.2,
}
MODEL_KEYS = ("position_embedding_type", "rotary_percent", "share_embeddings_and_output_weights")


def build_model(origin: str | None = None, **overrides: Any) -> Any:
    """A RetroModel in evaluation mode, randomly initialised (biases and norms too)."""
    from retro_mcore import RetroConfig, RetroModel, get_retro_decoder_block_spec

    fields = {**SMALL, **overrides}
    model_kwargs = {key: fields.pop(key) for key in MODEL_KEYS if key in fields}
    config = RetroConfig.from_upstream(origin, **fields) if origin else RetroConfig(**fields)
    model = RetroModel(
        config=config,
        transformer_layer_spec=get_retro_decoder_block_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        **model_kwargs,
    )
    randomize_vectors(model)
    return model.eval()


def randomize_vectors(model: torch.nn.Module) -> None:
    """Biases and norms start as zeros and ones, which would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1 and not getattr(parameter, "tensor_model_parallel", False):
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.add_(0.1 * noise.to(parameter.dtype))


def make_inputs(
    config: Any, sequence_length: int = 32, batch_size: int = 2, seed: int = 0
) -> dict[str, Tensor]:
    """Random text and neighbors, with padding inside and at the end and one missing neighbor."""
    generator = torch.Generator().manual_seed(seed)
    chunks = config.chunk_grid(sequence_length).num_chunks
    shape = (batch_size, chunks, config.retro_num_neighbors, config.retro_retrieved_length)
    retrieved = torch.randint(VOCABULARY, shape, generator=generator)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., -3:] = True
    mask[0, ..., config.retro_chunk_length - 2 : config.retro_chunk_length] = True
    mask[0, :1, -1] = True
    return {
        "tokens": torch.randint(VOCABULARY, (batch_size, sequence_length), generator=generator),
        "labels": torch.randint(VOCABULARY, (batch_size, sequence_length), generator=generator),
        "retrieved": retrieved,
        "mask": mask,
    }


def run_model(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """The model's forward pass on `make_inputs`.

    A "retrieved" of None turns retrieval off, and "tokens" may be None beside `decoder_input`.
    """
    tokens, retrieved, mask = inputs["tokens"], inputs["retrieved"], inputs["mask"]
    positions = None if tokens is None else torch.arange(tokens.size(1)).expand_as(tokens)
    return model(
        tokens,
        positions,
        None,
        context_input_ids=None if retrieved is None else retrieved.flatten(0, 2),
        context_mask=None if mask is None else mask.flatten(0, 2),
        **kwargs,
    )
