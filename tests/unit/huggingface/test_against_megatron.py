"""Transformers' model computes what ours computes on Megatron, with every option.

In float64: there only a mistake makes a difference, whatever the processor's kernels.
"""

from __future__ import annotations

import pytest
import torch

from retro_mcore.checkpoint.conversion.model_fields import MODEL_FIELDS
from tests.unit.huggingface.models import (
    inputs_of,
    mostly_slow,
    our_logits,
    pair,
    their_logits,
)

ROPE = {"position_embedding_type": "rope"}
GATED = {"swiglu": True, "disable_bias_linear": True, "normalization": "RMSNorm", **ROPE}

#: For every option that changes the numbers a value that is not the default, with others that it
#: needs. Together they also cross norms, positions, MLPs and heads.
CASES = {
    "num_layers": {"num_layers": 6, "retro_decoder_layers": None},
    "hidden_size": {"hidden_size": 48},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_query_groups": {"num_query_groups": 2, **GATED},
    "ffn_hidden_size": {"ffn_hidden_size": 40},
    "kv_channels": {"kv_channels": 16, **ROPE},
    "normalization": {"normalization": "RMSNorm", "qk_layernorm": True},
    "norm_epsilon": {"norm_epsilon": 0.1},
    "apply_layernorm_1p": {"apply_layernorm_1p": True},
    "swiglu": {"swiglu": True, "ffn_hidden_size": 64},
    "openai_gelu": {"openai_gelu": True},
    "squared_relu": {"squared_relu": True, "disable_bias_linear": True},
    "position_embedding_type": ROPE,
    "rotary_percent": {"rotary_percent": 0.5, **ROPE},
    "rotary_base": {"rotary_base": 500, **ROPE},
    "use_rope_scaling": {"use_rope_scaling": True, "kv_channels": 32, **ROPE},
    "rope_scaling_factor": {"use_rope_scaling": True, "rope_scaling_factor": 2.0, "kv_channels": 32,
                            **ROPE},
    "max_position_embeddings": {"max_position_embeddings": 40},
    "sliding_window": {"sliding_window": 7},
    "window_attn_skip_freq": {"sliding_window": 7, "window_attn_skip_freq": [0, 1, 1, 0]},
    "rotary_interleaved": {"rotary_interleaved": True, **ROPE},
    "rotary_seq_len_interpolation_factor": {"rotary_seq_len_interpolation_factor": 3.0, **ROPE},
    "untie_embeddings_and_output_weights": {"untie_embeddings_and_output_weights": True},
    "disable_bias_linear": {"disable_bias_linear": True},
    "add_qkv_bias": {"add_qkv_bias": True, **GATED},
    "qk_layernorm": {"qk_layernorm": True, **GATED},
    "padded_vocab_size": {"padded_vocab_size": 128},
    "no_retrieval": {"no_retrieval": True, "retro_decoder_layers": None},
    "retro_origin": {"retro_origin": "mcore-0.15", **ROPE},
    "retro_chunk_length": {"retro_chunk_length": 5},
    "retro_attention_gate": {"retro_attention_gate": 0.3},
    "retro_num_neighbors": {"retro_num_neighbors": 3},
    "retro_num_retrieved_chunks": {"retro_num_retrieved_chunks": 1},
    "retro_encoder_num_layers": {"retro_encoder_num_layers": 3},
    "retro_encoder_hidden_size": {"retro_encoder_hidden_size": 16, "use_rope_scaling": True,
                                  **ROPE},
    "retro_encoder_num_attention_heads": {"retro_encoder_num_attention_heads": 2,
                                          "num_query_groups": 2},
    "retro_encoder_ffn_hidden_size": {"retro_encoder_ffn_hidden_size": 24},
    "retro_encoder_input": {"retro_encoder_input": "raw"},
    "retro_cross_attention_keys": {"retro_cross_attention_keys": "own"},
    "retro_encoder_rotary_scaling": {
        "retro_encoder_rotary_scaling": True, "retro_encoder_hidden_size": 16,
        "use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2.0, "kv_channels": 32,
        **ROPE},
    "retro_cross_attention_positions": {"retro_cross_attention_positions": "rotary",
                                        "rotary_interleaved": True, **ROPE},
    "retro_decoder_layers": {"retro_decoder_layers": [1]},
    "retro_deepnorm": {"retro_deepnorm": True, **ROPE},
    "retro_mup_base_hidden_size": {"retro_mup_base_hidden_size": 16,
                                   "retro_encoder_hidden_size": 16},
    "retro_mup_base_kv_channels": {"retro_mup_base_hidden_size": 16,
                                   "retro_mup_base_kv_channels": 2},
}  # fmt: skip
BARE = {"disable_bias_linear": True, "normalization": "RMSNorm"}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 24, **GATED}
SHARED = {"moe_shared_expert_intermediate_size": 40, **EXPERTS}
#: The same for options of families and of experts. `TOGETHER` has most of them in the default run.
FAMILY_CASES = {
    "geglu": {"geglu": True, **BARE},
    "sublayer_norms": {"sublayer_norms": "both"},
    "qk_layernorm_over": {"qk_layernorm": True, "qk_layernorm_over": "all_heads", **BARE},
    "parallel_residual": {"parallel_residual": True},
    "embedding_multiplier": {"embedding_multiplier": 3.0},
    "residual_multiplier": {"residual_multiplier": 0.3},
    "logits_scaling": {"logits_scaling": 2.0},
    "softmax_scale": {"softmax_scale": 0.7},
    "attention_softcap": {"attention_softcap": 1.0, "num_query_groups": 2, "sliding_window": 7},
    "logit_softcap": {"logit_softcap": 2.0},
    "no_rope_layers": {"no_rope_layers": [1, 4], **ROPE},
    "rotary_frequencies": {"rotary_frequencies": [1.0, 0.3, 0.05, 0.01], **ROPE},
    "rotary_attention_factor": {"rotary_attention_factor": 1.3, "rotary_percent": 0.5,
                                "rotary_frequencies": [1.0, 0.1], **ROPE},
    "rotary_local_base": {"rotary_local_base": 100, "rotary_local_layers": [2], **ROPE},
    "rotary_local_layers": {"rotary_local_base": 100, "rotary_local_layers": [1, 3],
                            "rotary_percent": 0.5, **ROPE},
    "num_experts": {"num_experts": 4, **BARE},
    "moe_layer_freq": {"moe_layer_freq": [0, 1, 1, 0], **EXPERTS},
    "moe_ffn_hidden_size": {**EXPERTS, "moe_ffn_hidden_size": 16},
    "moe_shared_expert_intermediate_size": SHARED,
    "moe_shared_expert_gate": {"moe_shared_expert_gate": True, **SHARED},
    "moe_router_topk": {"moe_router_topk": 3, **EXPERTS},
    "moe_router_pre_softmax": {"moe_router_pre_softmax": True, "moe_router_topk": 1, **EXPERTS},
    "moe_router_score_function": {"moe_router_score_function": "sigmoid", **EXPERTS},
    "moe_router_topk_scaling_factor": {"moe_router_topk_scaling_factor": 2.0, **EXPERTS},
    "moe_router_num_groups": {"moe_router_num_groups": 2, "moe_router_group_topk": 1, **EXPERTS},
    "moe_router_group_topk": {**EXPERTS, "num_experts": 8, "moe_router_num_groups": 4,
                              "moe_router_group_topk": 2, "moe_router_topk": 4},
    # Nothing shows in float64: `test_moe_router_dtype`.
    "moe_router_dtype": {"moe_router_dtype": "fp32", **EXPERTS},
}  # fmt: skip
CASES |= FAMILY_CASES
TOGETHER = {
    "gemma": {"geglu": True, "sublayer_norms": "both", "qk_layernorm": True, "num_query_groups": 2,
              "apply_layernorm_1p": True, "embedding_multiplier": 3.0, "attention_softcap": 1.0,
              "logit_softcap": 2.0, "softmax_scale": 0.5, "sliding_window": 7,
              "window_attn_skip_freq": [0, 1, 1, 0], "rotary_local_base": 100,
              "rotary_local_layers": [2, 3], "use_rope_scaling": True, "kv_channels": 32, **BARE,
              **ROPE},
    "olmo2": {**GATED, "sublayer_norms": "post", "qk_layernorm": True, "num_query_groups": 2,
              "qk_layernorm_over": "all_heads"},
    "gpt_neox": {"parallel_residual": True, "rotary_percent": 0.5, **ROPE},
    "granite, yarn": {**GATED, "embedding_multiplier": 3.0, "residual_multiplier": 0.3,
                      "logits_scaling": 2.0, "softmax_scale": 0.2, "rotary_percent": 0.5,
                      "rotary_frequencies": [1.0, 0.1], "rotary_attention_factor": 1.3,
                      "no_rope_layers": [4]},
    "qwen2_moe": {**SHARED, "add_qkv_bias": True, "moe_shared_expert_gate": True,
                  "moe_layer_freq": [2], "moe_router_pre_softmax": True},
    "groups of experts": {**FAMILY_CASES["moe_router_group_topk"],
                          "moe_router_score_function": "sigmoid",
                          "moe_router_topk_scaling_factor": 2.0},
}  # fmt: skip
#: Options without an influence on a trained model's results, and what they are for.
NO_NUMBERS = {
    "group_query_attention": "says that num_query_groups is given",
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "retro_encoder_hidden_dropout",
         "retro_encoder_attention_dropout", "retro_encoder_cross_attention_dropout"),
        "training: test_model.py",
    ),
    **dict.fromkeys(
        ("init_method_std", "init_method_xavier_uniform", "embedding_init_method_std"),
        "initial weights",
    ),
    **dict.fromkeys(("seq_length", "tokenizer_type", "tokenizer_fingerprint"), "records"),
    **dict.fromkeys(
        ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
        "losses of our trainer; left out with a warning: test_model.py",
    ),
    "make_vocab_size_divisible_by": "gives padded_vocab_size",
    "vocab_size": "masks the padding's logits: test_model.py",
}  # fmt: skip


def assert_same(ours, theirs, length, without=True):
    inputs = inputs_of(ours, length) if hasattr(ours.config, "retro_chunk_length") else {}
    inputs = inputs or {"input_ids": torch.randint(90, (2, length))}
    off = [{"input_ids": inputs["input_ids"]}] if without else []
    for given in (inputs, *off):
        wanted, found = our_logits(ours, given), their_logits(theirs, given)
        torch.testing.assert_close(found, wanted, atol=_tolerance(theirs.config), rtol=0)


def _tolerance(config):
    """Norms over all heads, experts' weights and limited scores: one or both models use float32."""
    single = config.qk_layernorm_over != "head" or config.num_experts or config.attention_softcap
    return 1e-4 if single else 1e-10


def test_every_option_is_covered():
    assert CASES.keys().isdisjoint(NO_NUMBERS)
    assert CASES.keys() | NO_NUMBERS.keys() == MODEL_FIELDS.keys()


def test_an_option_that_it_does_not_have_is_refused_by_name(monkeypatch):
    from retro_mcore.checkpoint.conversion import retro_config
    from retro_mcore.errors import ConfigurationError

    known = {name: name for name in retro_config.names_there() if name != "geglu"}
    monkeypatch.setattr(retro_config, "names_there", lambda: known)
    flags = {"untie_embeddings_and_output_weights": True, "geglu": True}
    with pytest.raises(ConfigurationError, match="cannot represent geglu True"):
        retro_config.retro_config(flags)


@pytest.mark.parametrize("option", mostly_slow(CASES, *(CASES.keys() - FAMILY_CASES.keys())))
def test_logits(megatron, option):
    ours, theirs = pair(**CASES[option])
    assert_same(ours, theirs, 27, without=False)


def test_keys_of_the_token_before(megatron):
    """`CASES` has keys of their own; all others have both kinds."""
    ours, theirs = pair(retro_cross_attention_keys="previous")
    assert_same(ours, theirs, 27, without=False)


def test_moe_router_dtype(megatron):
    """A router in float32 within models in bfloat16."""
    ours, theirs = (model.bfloat16() for model in pair(**FAMILY_CASES["moe_router_dtype"]))
    states, router = torch.randn(64, 1, 32).bfloat16(), theirs.model.layers[0].mlp.router
    with torch.no_grad():
        wanted = ours.decoder.layers[0].mlp.router(states)[0]
        found = dense(*router(states[:, 0]), experts=4)
        router.dtype = None
        rounded = dense(*router(states[:, 0]), experts=4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (found - rounded).abs().max() > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"moe_router_score_function": "sigmoid", "moe_router_num_groups": 4,
         "moe_router_group_topk": 2, "moe_router_topk": 4},
        {"moe_router_pre_softmax": True},
        {},
    ],
)  # fmt: skip
def test_routing_in_bfloat16(megatron, options):
    """Megatron's routing from 0.18 on: it computes in float32, also from bfloat16 logits.

    0.16 and 0.17 round the scores before the choice, so here they are given float32.
    """
    from megatron.core import __version__ as release
    from megatron.core.transformer.moe import moe_utils

    from retro_mcore.huggingface import RetroConfig
    from retro_mcore.huggingface.mlp_retro import RetroRouter

    rounds = tuple(map(int, release.split(".")[:2])) < (0, 18)
    given = {"num_experts": 8, "moe_router_topk_scaling_factor": 2.5, **options}
    config = RetroConfig(hidden_size=8, num_attention_heads=1, disable_bias_linear=True, **given)
    router = RetroRouter(config, 8).bfloat16()
    torch.nn.init.eye_(router.weight)
    # Distinct, and so close that rounded scores would tie.
    logits = 2 + torch.stack([torch.randperm(64)[:8] for _ in range(64)]).bfloat16() / 32
    wanted, chosen = moe_utils.topk_routing_with_score_function(
        logits.float() if rounds else logits, config.moe_router_topk,
        use_pre_softmax=config.moe_router_pre_softmax, num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk, score_function=config.moe_router_score_function,
        scaling_factor=2.5,
    )  # fmt: skip
    with torch.no_grad():
        found = dense(*router(logits), experts=8)
    assert torch.equal(found > 0, chosen)
    assert torch.equal(found, wanted.bfloat16())


def dense(weights, chosen, experts):
    """`[T, k]` as `[T, experts]`, with zeros for the others."""
    return weights.new_zeros(len(weights), experts).scatter(1, chosen, weights)


@pytest.mark.parametrize("family", TOGETHER)
def test_logits_of_families(megatron, family):
    ours, theirs = pair(**TOGETHER[family])
    assert_same(ours, theirs, 27)


@pytest.mark.parametrize("origin", ["mcore-0.15", "mcore-0.5", "legacy"])
@pytest.mark.parametrize("positions", mostly_slow(["rope", "learned_absolute"], "rope"))
def test_origins(megatron, origin, positions):
    ours, theirs = pair(retro_origin=origin, position_embedding_type=positions)
    for length in (32, 27, 8, 5):
        assert_same(ours, theirs, length)


def test_the_origins_are_ours(megatron):
    from retro_mcore.huggingface.configuration_retro import ORIGINS
    from retro_mcore.model.config import values_of_origin
    from retro_mcore.model.options import ORIGINS as KNOWN

    assert {name for name in ORIGINS if name} == set(KNOWN)
    for origin in KNOWN:
        assert ORIGINS[origin] == values_of_origin(origin)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {**GATED, "num_query_groups": 2}, TOGETHER["gemma"], TOGETHER["granite, yarn"]]
)
def test_gradients(megatron, options):
    """Of every parameter, for the loss over the tokens that count."""
    from retro_mcore.checkpoint.conversion.retro_names import to_retro_huggingface
    from retro_mcore.checkpoint.conversion.weights import Weight

    ours, theirs = pair(**options)
    inputs = inputs_of(ours)
    labels = torch.randint(90, (2, 32))
    counts = torch.rand(2, 32) < 0.7
    tokens, retrieved = inputs["input_ids"], inputs["retrieved_input_ids"]
    mask = (retrieved < 0).flatten(0, 2)
    losses = ours(
        tokens, torch.arange(32).expand_as(tokens), None,
        context_input_ids=retrieved.flatten(0, 2).clamp(min=0), context_mask=mask, labels=labels,
    )  # fmt: skip
    wanted = losses[counts].mean()
    wanted.backward()
    theirs.train()
    shifted = labels.masked_fill(~counts, -100)
    loss = theirs(**inputs, shift_labels=shifted).loss
    loss.backward()
    torch.testing.assert_close(loss.double(), wanted.double(), atol=1e-6, rtol=0)  # one is fp32
    gradients = {n: Weight.of(p.grad) for n, p in ours.named_parameters() if p.grad is not None}
    named = to_retro_huggingface(gradients, vars(theirs.config) | {"swiglu": theirs.config.swiglu})
    found = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert named.keys() == found.keys()
    for name, weight in named.items():
        torch.testing.assert_close(found[name], weight.load(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_cross_attention_sees_distances_alone(megatron, interleaved):
    """Both rotate: a score stays if query and key move on together."""
    options = {"retro_cross_attention_positions": "rotary", "rotary_interleaved": interleaved}
    ours, theirs = pair(**options, **ROPE)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    layers = ours.decoder.layers[1].cross_attention, theirs.model.layers[1].cross_attn

    def scores(first, second):
        place = torch.tensor
        rotated = (
            layers[0].rotate(query, first) * layers[0].rotate(key, second),
            layers[1]._rotate(query, place([first])) * layers[1]._rotate(key, place([second])),
        )
        return torch.stack([each.sum() for each in rotated])

    torch.testing.assert_close(scores(3, 1), scores(40, 38), atol=1e-4, rtol=0)  # fp32 angles
    assert (scores(3, 1) - scores(3, 2)).abs().min() > 1e-3
