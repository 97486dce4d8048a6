"""SDPAttention against softmax(q k^T) v written out, also where it computes in two halves."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from retro_mcore.errors import ConfigurationError
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


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [1, 3, 8, 11, 31, 32, 40])
def test_windows_over_the_pieces_of_context_parallel_ranks(megatron, window, documents):
    """Pieces of 8 tokens: windows within one, over several, and over the whole sequence."""
    from retro_mcore.platform.context_parallel import ContextPart
    from retro_mcore.platform.gathered_attention import GatheredAttention

    length = 32
    query, key, value = inputs = tensors(length, groups=2)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance < 0) | (distance >= window)
    apart = None
    if documents:
        document = torch.arange(length).ge(13)
        apart = (distance < 0) | (document[:, None] != document)
        mask = mask | apart
    expected = written_out(*inputs, mask, CHANNELS**-0.5)
    whole = build(window_size=(window - 1, 0))
    torch.testing.assert_close(whole(*inputs, apart), expected, rtol=1e-9, atol=1e-11)
    for rank in range(2):
        attention = copy.copy(whole)
        attention.__class__ = GatheredAttention
        attention._part = part = ContextPart(rank, 2)
        attention._gather = lambda *_: (key, value)  # what the ranks' keys are gathered to
        own = part.take(query, 0)
        found = attention(own, None, None, None if apart is None else part.take(apart, 0))
        torch.testing.assert_close(found, part.take(expected, 0), rtol=1e-9, atol=1e-11)


def test_windows_in_transformer_engine_are_refused_under_context_parallelism(megatron):
    from retro_mcore import RetroConfig
    from retro_mcore.model.specs import _core_attention

    engine = SimpleNamespace(core_attention=lambda: torch.nn.Identity)
    config = RetroConfig(**SMALL, window_size=(3, 0), context_parallel_size=2)
    with pytest.raises(ConfigurationError, match=r"window_size .*--transformer-impl local"):
        _core_attention(config, engine, own_attention=False)


def test_another_exchange_than_gathering_is_refused_with_the_one_to_choose(megatron):
    from retro_mcore import RetroConfig
    from retro_mcore.platform.gathered_attention import GatheredAttention

    config = RetroConfig(**SMALL, context_parallel_size=2)
    with pytest.raises(
        ConfigurationError, match=r"p2p .*default.*\. Add --cp-comm-type all_gather"
    ):
        GatheredAttention(config, 1, None, "self", pg_collection=None, cp_comm_type="p2p")


@pytest.mark.parametrize("scaled", [True, False])
def test_scaling_by_layer_computes_what_megatrons_attention_computes(megatron, scaled):
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    scaling = {"apply_query_key_layer_scaling": scaled, "attention_softmax_in_fp32": scaled}
    ours = build(kv_channels=CHANNELS, **scaling)
    theirs = DotProductAttention(ours.config, 3, AttnMaskType.causal, "self").eval()
    inputs = [states.detach().float() for states in tensors(8, groups=4)]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    found = type(ours)(ours.config, 3, AttnMaskType.causal)(*inputs, None)
    # In float32 another order of operations; without this the difference is 0.8.
    torch.testing.assert_close(found, theirs(*inputs, mask, AttnMaskType.causal), atol=1e-5, rtol=0)


def test_masks_are_refused_by_an_attention_that_reads_none(megatron):
    """As Transformer Engine's causal attention: documents would attend to one another."""
    from tests.unit.model.builders import build_model

    model = build_model()
    for layer in model.decoder.layers:
        layer.self_attention.core_attention = torch.nn.Identity()
    tokens = torch.zeros(1, 8, dtype=torch.long)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    with pytest.raises(ConfigurationError, match="attention_mask: given to Transformer Engine's"):
        model(tokens, tokens, mask)


def test_packed_sequences_are_the_model_s(megatron):
    with pytest.raises(ConfigurationError, match=r"packed_seq_params: .* model's forward pass"):
        build()(*tensors(4, groups=4), None, packed_seq_params=object())
