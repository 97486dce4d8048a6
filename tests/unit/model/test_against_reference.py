"""The model equals the plain-torch reference: logits, and the gradient of every parameter."""

from __future__ import annotations

import pytest
import torch

from tests.reference.retro_reference import RetroReference
from tests.unit.model.builders import build_model, make_inputs, run_model

VARIANTS = {
    "defaults": {},
    "rotary": {"position_embedding_type": "rope"},
    "rotary over half the head": {"position_embedding_type": "rope", "rotary_percent": 0.5},
    "grouped queries": {"num_query_groups": 2},
    "wide heads": {"kv_channels": 12},
    "RMSNorm, SwiGLU, no biases": {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
    },
    "LayerNorm-1p": {"layernorm_zero_centered_gamma": True},
    "tied output": {"share_embeddings_and_output_weights": True},
    "one neighbor, one retrieved chunk, one encoder layer": {
        "retro_num_neighbors": 1,
        "retro_num_retrieved_chunks": 1,
        "retro_encoder_num_layers": 1,
    },
    "three neighbors of three chunks, every layer": {
        "retro_num_neighbors": 3,
        "retro_num_retrieved_chunks": 3,
        "retro_decoder_layers": [1, 2, 3, 4],
    },
    "right-aligned": {"retro_chunk_alignment": "right"},
    "normed residual, no positions in the encoder": {
        "retro_encoder_residual": "normed",
        "retro_encoder_positions": False,
        "position_embedding_type": "rope",
    },
    "no final norm": {"retro_final_layernorm": False},
    "neighbors as they are embedded": {"retro_encoder_input": "raw"},
    "retrieved tokens found by themselves": {"retro_cross_attention_keys": "own"},
    "retrieved tokens found by those before": {"retro_cross_attention_keys": "previous"},
    "relative positions in cross-attention": {
        "retro_cross_attention_positions": "rotary",
        "num_query_groups": 2,
    },
    "a smaller encoder": {
        "retro_encoder_hidden_size": 24,
        "retro_encoder_num_attention_heads": 2,
        "position_embedding_type": "rope",
    },
    "a larger encoder with more heads and its own MLP": {
        "retro_encoder_hidden_size": 48,
        "retro_encoder_num_attention_heads": 6,
        "retro_encoder_ffn_hidden_size": 40,
        "num_query_groups": 2,
    },
    "DeepNorm": {"retro_deepnorm": True},
    "DeepNorm, a smaller encoder, RMSNorm, SwiGLU": {
        "retro_deepnorm": True,
        "retro_encoder_hidden_size": 24,
        "retro_encoder_num_attention_heads": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "retro_attention_gate": 0.5,
    },
    "half-open gate": {"retro_attention_gate": 0.5},
}


@pytest.mark.parametrize("sequence_length", [32, 29, 8, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_reference(megatron, variant, sequence_length):
    overrides = VARIANTS[variant]
    model = build_model(**overrides)
    inputs = make_inputs(model.config, sequence_length)
    weights = {name: value.detach().clone().requires_grad_() for name, value in parameters(model)}
    reference = RetroReference(
        model.config,
        weights,
        rotary_percent=overrides.get("rotary_percent", 1.0),
        rope=overrides.get("position_embedding_type") == "rope",
    )
    expected = torch.stack(
        [reference.logits(*sample) for sample in zip(*samples(inputs), strict=True)]
    )
    logits = run_model(model, inputs)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    weighting = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weighting).sum().backward()
    (expected * weighting).sum().backward()
    for name, parameter in parameters(model):
        wanted = weights[name].grad
        if wanted is None:  # nothing to retrieve with: the retrieval weights are not in use
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        error = (parameter.grad - wanted).norm() / wanted.norm().clamp_min(1e-3)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def parameters(model):
    return list(model.named_parameters())


def samples(inputs):
    return inputs["tokens"], inputs["retrieved"], inputs["mask"]


def test_reference_without_retrieval_is_the_models_gpt_decoder(megatron):
    model = build_model()
    inputs = {**make_inputs(model.config), "retrieved": None, "mask": None}
    reference = RetroReference(model.config, model.state_dict())
    expected = torch.stack([reference.logits(tokens, None, None) for tokens in inputs["tokens"]])
    torch.testing.assert_close(run_model(model, inputs), expected, atol=1e-4, rtol=0)
