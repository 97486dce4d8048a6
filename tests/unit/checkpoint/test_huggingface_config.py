"""What config.json says: transformers' own defaults, and nothing dropped that changes numbers.

Somebody who starts from a downloaded model would otherwise train another one, with a loss that
looks normal.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_mcore.checkpoint.conversion.huggingface_config import Config
from retro_mcore.checkpoint.conversion.huggingface_families import FAMILIES
from retro_mcore.checkpoint.conversion.huggingface_files import read_json_object
from retro_mcore.checkpoint.conversion.huggingface_flags import config_flags
from retro_mcore.errors import CheckpointError, RetroError
from tests.unit.checkpoint.test_huggingface import (
    FAMILIES as MODELS,
)
from tests.unit.checkpoint.test_huggingface import (
    LLAMA_CONFIG,
    VOCABULARY,
    flags_of,
    load,
    logits,
    make_model,
    tokens_of_test,
)


def flags(family: str, **values):
    return config_flags(Config("a model", {"model_type": family, **values}))


def test_a_key_that_stands_twice_is_named(tmp_path):
    """Met by who edits the file by hand, and changes the first of both."""
    (tmp_path / "config.json").write_text('{"num_layers": 2, "model_type": "a", "num_layers": 3}')
    with pytest.raises(CheckpointError, match=r"config\.json: has the key num_layers more than"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_transformers_own(family):
    import transformers

    config = transformers.AutoConfig.for_model(family)
    rope = getattr(config, "rope_parameters", None) or {}
    switched_off = {"sliding_window"} if family.startswith("qwen") else set()
    derived = {
        "head_dim",
        "num_key_value_heads",
        "layer_types",
        "no_rope_layers",
    }  # where our default is null
    rope = rope.get("full_attention", rope)
    older = {"rope_local_base_freq", "sliding_window_pattern"}  # no fields of the configuration
    for key, ours in FAMILIES[family].defaults.items():
        if key in older or key in ("rope_parameters", "rope_scaling", *switched_off):
            continue
        if ours is None and key in (*derived, "original_max_position_embeddings"):
            continue
        from_rope = key in ("rope_theta", "partial_rotary_factor")
        # A key that this version of transformers does not know is null here.
        assert ours == (rope[key] if from_rope else getattr(config, key, None)), key
    for key, computed in FAMILIES[family].fixed.items():
        assert getattr(config, key, None) in computed, key
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    assert local is None or local["rope_theta"] == FAMILIES[family].defaults.get(
        "rope_local_base_freq", FAMILIES[family].defaults["rope_theta"]
    )
    assert switched_off == set() or FAMILIES[family].defaults["sliding_window"] == 4096


@pytest.mark.parametrize("family", MODELS)
def test_absent_keys_compute_as_transformers_does(megatron, family, tmp_path):
    """With only the sizes in config.json."""
    import transformers

    make_model(
        family, tmp_path, **({"partial_rotary_factor": 0.25} if family == "stablelm" else {})
    )
    config = tmp_path / "config.json"
    sizes = {"n_embd", "n_head", "n_layer", "n_positions", "n_inner", "head_dim", "vocab_size",
             "num_key_value_heads", "model_type", "tie_word_embeddings", "use_qkv_bias",
             *LLAMA_CONFIG}  # fmt: skip
    kept = {k: v for k, v in json.loads(config.read_text()).items() if k in sizes}
    config.write_text(json.dumps(kept))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    changes = {"rotary_base": 10000}
    if family == "stablelm":
        changes |= {"norm_epsilon": 1e-5, "rotary_percent": 0.25}
    ours, _ = load(tmp_path, **{**flags_of(family), **({} if family == "gpt2" else changes)})
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    torch.testing.assert_close(logits(ours), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("llama", {"sliding_window": 4096}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"embedding_multiplier": 12.0}),
        ("llama", {"residual_multiplier": 0.22}),
        ("llama", {"logits_scaling": 8.0}),
        ("llama", {"attention_multiplier": 0.0078125}),
        ("llama", {"attn_logit_softcapping": 50.0}),
        ("llama", {"final_logit_softcapping": 30.0}),
        ("llama", {"query_pre_attn_scalar": 224}),
        ("llama", {"clip_qkv": 8.0}),
        ("llama", {"no_rope_layers": [1, 1, 0]}),
        ("llama", {"qk_norm": True}),
        ("llama", {"is_causal": False}),
        ("qwen2", {"is_causal": None}),
        ("mistral", {"use_rope": False}),
        ("llama", {"attention_type": "local"}),
        ("llama", {"num_local_experts": 8}),
        ("llama", {"layer_types": ["linear_attention"] * 32}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}),  # no factor
        ("llama", {"rope_scaling": {"rope_type": "mrope"}}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 3}}),
        ("llama", {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),  # no low_freq_factor
        ("llama", {"rope_scaling": {"type": "linear"}}),
        ("llama", {"rope_theta": None}),
        ("gemma3_text", {"rope_local_base_freq": 10000.5}),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("llama", {"quantization_config": {"quant_method": "awq"}}),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("qwen2", {"layer_types": ["chunked_attention"] * 32, "use_sliding_window": True}),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
        ("stablelm", {"use_parallel_residual": True}),
        ("stablelm", {"qk_layernorm": True}),
        ("stablelm", {"partial_rotary_factor": None}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"activation_function": "silu"}),
        ("gemma2", {"hidden_activation": "gelu"}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}),
        ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}}}),
        ("olmo2", {"clip_qkv": 8.0}),
        ("phi3", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 3}}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("granite", {"hidden_act": "gelu"}),
        ("granite", {"attention_multiplier": 0}),
        ("starcoder2", {"mlp_type": "gated"}),
        ("gpt_neox", {"hidden_act": "silu"}),
    ],
)  # fmt: skip
def test_a_setting_that_changes_numbers_is_refused_by_name(family, setting):
    with pytest.raises(CheckpointError) as caught:
        flags(family, **setting)
    (name, value), *_ = setting.items()
    kind = value.get("quant_method") if isinstance(value, dict) else None
    shown = "rotary embedding" if "rope_scaling" in setting else name
    assert (kind or shown) in str(caught.value) or "rope factor" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("llama", {"attention_bias": False, "mlp_bias": None, "logits_scaling": 1.0}),
        ("llama", {"unsloth_version": "2026.1", "_name_or_path": "x", "pretraining_tp": 2}),
        ("llama", {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6, "comment": "x"}),
        ("llama", {"rope_scaling": None, "quantization_config": None, "torch_dtype": "bfloat16"}),
        ("llama", {"hidden_act": "swish", "initializer_range": 0.01, "is_causal": True}),
        ("gpt2", {"n_ctx": 1024, "summary_type": "cls_index", "reorder_and_upcast_attn": True}),
    ],
)
def test_what_changes_nothing_is_accepted(family, setting):
    assert flags(family, **setting) == flags(family)


@pytest.mark.parametrize(
    ("family", "setting", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 100}, 100),
        ("qwen2", {}, None),
        ("qwen2", {"sliding_window": 8}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, 8),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 32}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8,
                   "layer_types": ["full_attention"] * 32}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8,
                   "layer_types": ["full_attention", "sliding_attention"] * 16}, 8),
    ],
)  # fmt: skip
def test_the_window_is_the_one_that_some_layer_has(family, setting, window):
    assert flags(family, **setting)["sliding_window"] == window


def test_linear_scaling_of_positions_is_honoured(megatron, tmp_path):
    theirs = make_model(
        "llama", tmp_path, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}
    )
    ours, _ = load(tmp_path, **flags_of("llama"), rotary_seq_len_interpolation_factor=4.0)
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    torch.testing.assert_close(logits(ours), wanted, atol=2e-5, rtol=1e-5)


def test_the_older_name_of_rope_parameters_counts_where_both_are_given():
    """As in transformers 5, which takes `rope_scaling` whole."""
    both = {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"},
        "rope_theta": 5e5,
    }
    found = flags("llama", **both)
    assert found["rotary_base"] == 500_000
    assert found["rotary_seq_len_interpolation_factor"] == 2.0


@pytest.mark.parametrize("kind", [None, "llama3"])
def test_a_broken_base_is_kept_in_the_frequencies(kind):
    """Megatron's base is a whole number; StarCoder2-3B's is not."""
    rope = None
    if kind is not None:
        rope = {"rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # fmt: skip
    base = 999999.4420358813
    found = flags("starcoder2" if kind is None else "llama", rope_theta=base, rope_scaling=rope)
    assert found["rotary_base"] == 999999
    assert not found["use_rope_scaling"]
    channels = found["kv_channels"]
    wanted = base ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    measured = torch.tensor(found["rotary_frequencies"], dtype=torch.float64)
    unscaled = slice(None) if kind is None else slice(channels // 8)
    torch.testing.assert_close(measured[unscaled], wanted[unscaled], rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu2"])
def test_activations_of_gpt2(megatron, tmp_path, activation):
    theirs = make_model("gpt2", tmp_path, activation_function=activation)
    kind = {"openai_gelu": activation.startswith("gelu_"), "squared_relu": activation == "relu2"}
    ours, _ = load(tmp_path, **{**flags_of("gpt2"), **kind})
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    torch.testing.assert_close(logits(ours), wanted, atol=2e-5, rtol=1e-5)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_an_odd_config_ends_in_flags_or_in_one_line(tiny_model, data):
    """Whatever stands in config.json: values of any kind under any known key, or no object."""
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint

    family = data.draw(st.sampled_from([*FAMILIES, "", None, "gemma3"]))
    known = [*FAMILIES[family if family in FAMILIES else "llama"].defaults, "quantization_config",
             "layer_types", "transformers_weights", "tie_word_embeddings"]  # fmt: skip
    odd = data.draw(st.dictionaries(st.sampled_from(known), _VALUES, max_size=4))
    sizes = {**LLAMA_CONFIG, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    whole = {"model_type": family, **sizes, **odd}
    value = data.draw(st.sampled_from([whole, whole, whole, [], odd, "x", None]))
    (tiny_model / "config.json").write_text(json.dumps(value))
    message = ""
    try:
        open_checkpoint(tiny_model)
    except RetroError as error:
        message = str(error)
    assert "\n" not in message


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_model("llama", path)
    return path
