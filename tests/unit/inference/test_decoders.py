"""Decoding with a cache gives the logits of the whole texts' forward pass, at every position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.neighbors import CompletedChunk, GivenNeighbors
from tests.unit.inference.small import CHUNK_LENGTH as M
from tests.unit.inference.small import ChunkFunction, prompts, small_model

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}

VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "grouped queries": {"num_query_groups": 2},
    "one query group": {"num_query_groups": 1, "rotary_percent": 0.5},
    "swiglu and rmsnorm": {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "share_embeddings_and_output_weights": False,
    },
    "one neighbor, one encoder layer": {"retro_num_neighbors": 1, "retro_encoder_num_layers": 1},
    "three neighbors": {"retro_num_neighbors": 3},
    "rotary cross-attention": {"retro_cross_attention_positions": "rotary"},
    "keys of their own": {"retro_cross_attention_keys": "own"},
    "keys of the token before": {"retro_cross_attention_keys": "previous"},
    "narrow encoder": {"retro_encoder_hidden_size": 16, "retro_encoder_num_attention_heads": 2},
    "retro layers 1 to 3": {"retro_decoder_layers": [1, 2, 3]},
    "deepnorm": {"retro_deepnorm": True},
    "mup": {"retro_mup_base_hidden_size": 16},
    "half a gate": {"retro_attention_gate": 0.5},
    "like Gemma": {
        "sublayer_norms": "both",
        "qk_layernorm": True,
        "softmax_scale": 0.3,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "embedding_multiplier": 2.0,
        "rotary_local_base": 100,
        "rotary_local_layers": [1, 3],
        "window_size": (4, 0),
        "window_attn_skip_freq": 2,
        "num_query_groups": 2,
    },
    "like OLMo, Granite and SmolLM": {
        "normalization": "RMSNorm",
        "sublayer_norms": "post",
        "qk_layernorm": True,
        "qk_layernorm_over": "all_heads",
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
        "no_rope_layers": [2],
        "rotary_frequencies": [1.0, 0.3, 0.1, 0.02],
        "rotary_attention_factor": 1.3,
    },
    "experts": {
        "num_moe_experts": 4,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 16,
        "moe_shared_expert_gate": True,
        "add_bias_linear": False,
    },
    "parallel residual": {"parallel_residual": True, "rotary_percent": 0.5},
    "a window in every layer": {"window_size": (M, 0)},
    "scaled by layer": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
}


def decoders(model, max_batch_size=8):
    from retro_mcore.inference.decoders import CachedDecoder, FullRecomputation

    return CachedDecoder(model, 0, max_batch_size), FullRecomputation(model, 0)


def text_of(tokens, **kwargs):
    from retro_mcore.inference.texts import GeneratedText

    return GeneratedText(list(tokens), len(tokens), **kwargs)


def give_neighbors(text, source, model, row=0):
    """Neighbors for the chunks that have none yet, as generation does."""
    places = text.chunks(model.config.retro_chunk_length)[len(text.neighbors) :]
    for number, place in enumerate(places, len(text.neighbors)):
        chunk = CompletedChunk(row, number, [text.tokens[position] for position in place])
        text.neighbors.append(source.neighbors_of([chunk]))


@torch.no_grad()
def follow(model, texts, continuations, sources):
    """Feed the continuations token by token; both decoders' logits must agree at each."""
    cached, whole = decoders(model)
    for step in range(max(map(len, continuations)) + 1):
        growing = [i for i in range(len(texts)) if step <= len(continuations[i])]
        for i in growing:
            if step:
                texts[i].tokens.append(continuations[i][step - 1])
            if sources[i] is not None:
                give_neighbors(texts[i], sources[i], model, row=i)
        now = [texts[i] for i in growing]
        torch.testing.assert_close(cached.next_logits(now), whole.next_logits(now), **TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_equals_full_recomputation(megatron, variant):
    model = small_model(**VARIANTS[variant])
    source = ChunkFunction(num_neighbors=model.config.retro_num_neighbors)
    # Prompts without a chunk, that end with one, and in the middle; they stop at different times.
    texts = [text_of(tokens) for tokens in prompts(1, M - 1, M, 2 * M, 3 * M + 5)]
    continuations = prompts(3 * M + 1, 2 * M, 1, 3 * M, 10)
    follow(model, texts, continuations, [source] * len(texts))


def test_texts_have_their_own_positions_where_the_rotary_embedding_is_fused(megatron, monkeypatch):
    """Transformer Engine's kernel, for which PyTorch stands here, takes the same for all texts."""
    from megatron.core.models.common.embeddings import rope_utils

    def fused(states, angles, interleaved=False):
        assert angles.shape[1:3] == (1, 1)  # as the kernel checks
        return rope_utils._apply_rotary_pos_emb_bshd(states, angles, interleaved)

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused)
    model = small_model(apply_rope_fusion=True, retro_cross_attention_positions="rotary")
    texts = [text_of(tokens) for tokens in prompts(M, 2 * M + 3)]
    follow(model, texts, prompts(M, M + 1), [ChunkFunction()] * 2)


def test_neighbors_matter_at_every_position_that_sees_them(megatron):
    model = small_model()
    cached, _ = decoders(model)
    source = ChunkFunction()
    (tokens,) = prompts(3 * M)
    with_neighbors, without = text_of(tokens[: M - 1]), text_of(tokens[: M - 1])
    with torch.no_grad():
        for position in range(M - 1, 3 * M):
            logits = cached.next_logits([with_neighbors, without])
            same = torch.allclose(logits[0], logits[1], atol=1e-4)
            assert same == (position < M)
            for text in (with_neighbors, without):
                text.tokens.append(tokens[position])
            give_neighbors(with_neighbors, source, model)


def test_texts_with_and_without_retrieval_share_a_batch(megatron):
    model = small_model()
    (tokens,) = prompts(M)
    given = ChunkFunction().neighbors_of([CompletedChunk(0, 0, tokens)])
    shape = (model.config.retro_num_neighbors, model.config.retro_retrieved_length)
    some = GivenNeighbors({0: given}, *shape, pad_id=0)  # later chunks have none: all masked
    texts = [text_of(tokens), text_of(tokens), text_of(tokens)]
    follow(model, texts, prompts(20, 20, 20), [some, None, ChunkFunction()])


def test_texts_join_and_leave_a_running_batch(megatron):
    model, source = small_model(), ChunkFunction()
    cached, whole = decoders(model, max_batch_size=3)
    texts = [text_of(tokens) for tokens in prompts(5, M, 2 * M + 1, 9, 3)]
    tokens = iter(prompts(200)[0])
    with torch.no_grad():
        for present in ([0, 1, 2], [0, 1, 2], [0, 2], [3, 2, 0], [3, 2, 0], [3], [3, 4], [4, 3]):
            now = [texts[i] for i in present]
            for text in now:
                give_neighbors(text, source, model)
            torch.testing.assert_close(cached.next_logits(now), whole.next_logits(now), **TOLERANCE)
            for text in now:
                text.tokens.append(next(tokens))


@pytest.mark.parametrize("origin", ["mcore-0.15", "mcore-0.5", "legacy"])
def test_a_right_aligned_models_texts_have_the_grid_of_its_training(megatron, origin):
    # Whole chunks: there its grid is the left-aligned one, and so prefixes keep their logits.
    model = small_model(origin=origin)
    assert model.config.retro_chunk_alignment == "right"
    texts = [text_of(tokens) for tokens in prompts(3, M, 2 * M + 3)]
    follow(model, texts, prompts(20, 12, 9), [ChunkFunction()] * 3)


@pytest.mark.parametrize("variant", ["rotary", "grouped queries", "rotary cross-attention"])
def test_two_chunks_are_the_prompt_and_the_answer(megatron, variant):
    # The retired generation's way: the chunk length is the prompt's, the window twice as long.
    model = small_model(**VARIANTS[variant])
    texts = [text_of(tokens, two_chunks=True) for tokens in prompts(5, 11, 20)]
    sources = [ChunkFunction() for _ in texts]
    with torch.no_grad():
        cached, _ = decoders(model)
        for step, answer in enumerate(zip(*prompts(4, 4, 4), strict=True)):
            for text, token, source in zip(texts, answer, sources, strict=True):
                if step:
                    text.tokens.append(token)
                give_neighbors(text, source, model)
                assert len(text.neighbors) == 1
            logits = cached.next_logits(texts)
            for row, text in enumerate(texts):
                expected = in_two_chunks(model, text)[len(text.tokens) - 1]
                torch.testing.assert_close(logits[row], expected, **TOLERANCE)


def in_two_chunks(model, text):
    """The model's own forward pass with the prompt's length as its chunk length."""
    length = text.prompt_length
    tokens = text.tokens + [0] * (2 * length - len(text.tokens))
    retrieved = torch.from_numpy(text.neighbors[0].tokens).repeat(2, 1, 1).flatten(0, 1)
    mask = torch.from_numpy(text.neighbors[0].mask).repeat(2, 1, 1).flatten(0, 1)
    configs = [model.config, model.neighbor_encoder.config]
    configured = model.config.retro_chunk_length
    for config in configs:
        config.retro_chunk_length = length
    try:
        return model(
            torch.tensor([tokens]),
            torch.arange(2 * length)[None],
            None,
            context_input_ids=retrieved,
            context_mask=mask,
        )[0]
    finally:
        for config in configs:
            config.retro_chunk_length = configured


def test_an_answer_may_be_longer_than_its_prompt(megatron):
    model = small_model()
    texts = [text_of(tokens, two_chunks=True) for tokens in prompts(3, 2 * M)]
    follow(model, texts, prompts(3 * M, 20), [ChunkFunction(), ChunkFunction()])


def test_prompt_logits_are_those_of_every_prefix(megatron):
    model, source = small_model(), ChunkFunction()
    text = text_of(prompts(3 * M + 2)[0])
    give_neighbors(text, source, model)
    with torch.no_grad():
        first, second = (decoder.prompt_logits(text) for decoder in decoders(model))
    torch.testing.assert_close(first, second, **TOLERANCE)
    assert len(first) == 3 * M + 2


def test_what_the_cache_does_not_know_is_refused_by_name(megatron):
    from retro_mcore.inference.decoders import CachedDecoder

    model = small_model()
    model.config.softmax_type = "learnable"
    with pytest.raises(ConfigurationError, match="softmax_type"):
        CachedDecoder(model, 0, 1)
    model.config.softmax_type = "vanilla"
    with pytest.raises(ConfigurationError, match="2 texts of up to 3 tokens"):
        CachedDecoder(model, 0, 1).next_logits([text_of([1, 2]), text_of([1, 2, 3])])


def test_a_gpt_without_retrieval_is_cached_too(megatron):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from retro_mcore.model.decoder_model import DecoderModel
    from retro_mcore.model.specs import get_gpt_decoder_block_spec

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        init_method_std=0.2,
    )
    model = DecoderModel(
        config,
        get_gpt_decoder_block_spec(config),
        vocab_size=96,
        max_sequence_length=64,
        position_embedding_type="rope",
    ).eval()
    texts = [text_of(tokens) for tokens in prompts(3, 17)]
    follow(model, texts, prompts(9, 12), [None, None])


def test_half_precision_follows_the_whole_texts_pass(megatron):
    model = small_model(params_dtype=torch.bfloat16, bf16=True, num_query_groups=2)
    cached, whole = decoders(model)
    text, source = text_of(prompts(M + 3)[0]), ChunkFunction()
    with torch.no_grad():
        for token in prompts(2 * M)[0]:
            give_neighbors(text, source, model)
            logits, expected = cached.next_logits([text]), whole.next_logits([text])
            torch.testing.assert_close(logits.float(), expected.float(), atol=0.3, rtol=0.1)
            text.tokens.append(token)
