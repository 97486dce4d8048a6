"""SDPAttention against softmax(q k^T) v written out, also where it computes in two halves."""

from __future__ import annotations

import pytest
import torch

from tests.unit.model.builders import SMALL

CHANNELS = 16


def written_out(query, key, value, mask, scale):
    """Attention of `[S, B, heads, C]` with the whole score matrix; mask True = masked out."""
    repeats = query.size(2) // key.size(2)
    key, value = (states.repeat_interleave(repeats, dim=2) for states in (key, value))
    scores = torch.einsum("qbhc,kbhc->bhqk", query, key) * scale
    weights = scores.masked_fill(mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,kbhc->qbhc", weights, value).flatten(2)


def tensors(length, groups, keys=None):
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, 2, 4, CHANNELS), *2 * [(keys or length, 2, groups, CHANNELS)]]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


def build(**overrides):
    from megatron.core.transformer.enums import AttnMaskType

    from retro_mcore import RetroConfig
    from retro_mcore.platform.attention import SDPAttention

    config = RetroConfig(**{**SMALL, "attention_dropout": 0.0, **overrides})
    return SDPAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal)


def with_gradients(output, inputs):
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


@pytest.mark.parametrize("length", [1, 5, 383, 384, 385, 512, 576, 577, 769])
@pytest.mark.parametrize("groups", [4, 2])
def test_causal_attention(megatron, length, groups):
    inputs = tensors(length, groups)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = with_gradients(written_out(*inputs, later, CHANNELS**-0.5), inputs)
    found = with_gradients(build()(*inputs, None), inputs)
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


def test_halves_serve_inference_then_training(megatron):
    # The mask that halves share must not be an inference tensor, which autograd refuses.
    inputs = tensors(448, groups=4)
    attention = build()
    with torch.inference_mode():
        attended = attention(*[states.detach() for states in inputs], None)
    found = attention(*inputs, None)
    found.sum().backward()
    torch.testing.assert_close(found, attended)


def test_halves_drop_out(megatron):
    inputs = tensors(512, groups=4)
    torch.manual_seed(0)
    attention = build(attention_dropout=0.5)
    assert not torch.allclose(attention(*inputs, None), attention.eval()(*inputs, None))


def test_more_keys_than_queries_are_not_halved(megatron):
    from megatron.core.transformer.enums import AttnMaskType

    inputs = tensors(512, groups=4, keys=600)
    everything = torch.zeros(512, 600, dtype=torch.bool)
    expected = written_out(*inputs, everything, CHANNELS**-0.5)
    found = build()(*inputs, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
