"""Every family through `--load-gpt DIR` alone, against transformers' own forward pass."""

from __future__ import annotations

import json

import pytest
import torch

from retro_mcore.checkpoint.conversion.huggingface_config import Config
from retro_mcore.checkpoint.conversion.huggingface_families import FAMILIES
from retro_mcore.checkpoint.conversion.huggingface_flags import config_flags
from retro_mcore.errors import CheckpointError, ConfigurationError, RetroError
from tests.unit.checkpoint.families import (
    CASES,
    GROUPS,
    SIZES,
    load_alone,
    ours,
    randomize,
    save_family,
    save_model,
    theirs,
)
from tests.unit.huggingface.models import mostly_slow

#: Rounding of fp32 over three layers, whose logits have a standard deviation of about 1.
ROUNDING = {"atol": 5e-5, "rtol": 1e-5}


#: One for each module and kind of rotary embedding; the others combine the same.
IN_DEFAULT = (
    *("Llama, biases of attention", "Llama 3.1, other lengths", "Llama, yarn with mscale"),
    *("Gemma 2", "Gemma 3", "OLMo 3", "Phi-4 mini, partial longrope", "SmolLM3", "Granite"),
    *("StarCoder2", "GPT-NeoX", "Mixtral", "Qwen 2 MoE"),
)


@pytest.mark.parametrize("name", mostly_slow(CASES, *IN_DEFAULT))
def test_logits_are_transformers_own(megatron, tmp_path, name):
    model = save_model(name, tmp_path)
    loaded, report = load_alone(tmp_path)
    torch.testing.assert_close(ours(loaded), theirs(model), **ROUNDING)
    assert ("biases of zero" in str(report)) == ("biases of attention" in name or "and b" in name)


def test_every_family_has_a_case():
    assert {family for family, _ in CASES.values()} | {"gpt2"} == set(FAMILIES)


def reload(path):
    """A directory's model, in transformers."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["Gemma 2", "OLMo 3", "Phi-3, longrope", "Granite", "GPT-NeoX", "Qwen 3 MoE"], "OLMo 3"
    ),
)
def test_bf16_in_shards_and_through_our_own_format(megatron, tmp_path, name):
    from tests.unit.checkpoint.test_convert_checkpoint import convert

    save_model(name, tmp_path / "hf", torch.bfloat16, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    loaded, _ = load_alone(tmp_path / "hf")
    torch.testing.assert_close(ours(loaded), theirs(reload(tmp_path / "hf")), **ROUNDING)
    convert(tmp_path / "hf", tmp_path / "ours")
    again, _ = load_alone(tmp_path / "ours", max_position_embeddings=None)
    assert torch.equal(ours(again), ours(loaded))


def hub(family: str, path, model_changes: dict, older: dict, dropped: tuple[str, ...] = ()):
    """A model whose config.json is written as its first releases on the hub are."""
    model = save_family(family, {**SIZES, **model_changes}, path, torch.float32)
    file = path / "config.json"
    settings = {**json.loads(file.read_text()), **older}
    kept = {key: value for key, value in settings.items() if key not in dropped}
    file.write_text(json.dumps(kept))
    return model


OLDER = {
    "gemma3_text": (
        {**GROUPS, "head_dim": 16},
        {"rope_theta": 1e6, "rope_local_base_freq": 100.0, "sliding_window_pattern": 2,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        ("rope_parameters", "layer_types", "_sliding_window_pattern"),
    ),
    "gpt_neox": ({}, {"rotary_pct": 0.5, "rotary_emb_base": 500}, ("rope_parameters",)),
    "phi3": (
        {**GROUPS, "pad_token_id": None, "sliding_window": 200},
        {"rope_theta": 5e3, "full_attn_mod": 1, "interpolate_factor": 1,
         "original_max_position_embeddings": 200, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 2.0, 2.0, 4.0], "long_factor": [8.0] * 4}},
        ("rope_parameters",),
    ),
    "smollm3": (
        {**GROUPS, "pad_token_id": None},
        {"rope_theta": 5e3, "no_rope_layer_interval": 2, "max_window_layers": 28},
        ("rope_parameters", "no_rope_layers", "layer_types"),
    ),
    "gemma": ({**GROUPS, "head_dim": 16}, {"hidden_act": "gelu", "hidden_activation": None}, ()),
    "llama": (GROUPS, {"is_llama_config": True, "rope_interleaved": False}, ()),
    "gemma2": ({**GROUPS, "head_dim": 16}, {"hidden_act": "gelu_pytorch_tanh"}, ()),
    "starcoder2": (GROUPS, {
        "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True, "mlp_type": "default", "norm_type": "layer_norm",
        "layer_norm_epsilon": 1e-5}, ()),
    "olmo3": ({**GROUPS, "sliding_window": 200}, {"rope_theta": 300.0, "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 24}},
        ("rope_parameters",)),
}  # fmt: skip


@pytest.mark.parametrize("family", mostly_slow(OLDER, "gemma3_text", "gpt_neox"))
def test_older_forms_of_config_json(megatron, tmp_path, family):
    from safetensors.torch import load_file, save_file

    hub(family, tmp_path, *OLDER[family])
    if family == "gpt_neox":  # the output layer's other name, and a buffer of Pythia's files
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.ones(1)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, _ = load_alone(tmp_path)
    torch.testing.assert_close(ours(loaded), theirs(reload(tmp_path)), **ROUNDING)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("OLMo 2", {"sublayer_norms": "pre"}, "--sublayer-norms is pre, expected post"),
        ("OLMo 2", {"qk_layernorm_over": "head"}, "--qk-layernorm-over is head, expected all_h"),
        ("GPT-NeoX", {"parallel_residual": False}, "--parallel-residual is False, expected True"),
        ("Granite", {"logits_scaling": 1.0}, "--logits-scaling is 1.0, expected 6.0"),
        ("SmolLM3", {"no_rope_layers": None}, "--no-rope-layers is None, expected"),
        ("Gemma", {"geglu": False, "swiglu": True}, "--geglu is False, expected True"),
        ("Llama, yarn", {"rotary_frequencies": None, "rotary_attention_factor": 1.0},
         "--rotary-frequencies is None, expected"),
    ],
)  # fmt: skip
def test_a_flag_that_contradicts_the_family_is_refused(megatron, tmp_path, name, flags, message):
    save_model(name, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_alone(tmp_path, **flags)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_texts_that_would_be_rotated_otherwise_are_refused(megatron, tmp_path, kind):
    """Samples of 32 tokens, of a model whose angles change after 24."""
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 5e3}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope["original_max_position_embeddings"] = 24
    length = 24 if kind == "dynamic" else 96
    settings = {**SIZES, **GROUPS, "rope_parameters": rope, "max_position_embeddings": length}
    save_family("llama", settings, tmp_path, torch.float32)
    with pytest.raises(RetroError, match="24"):
        load_alone(tmp_path)
    with pytest.raises(RetroError, match="more than 24 tokens"):
        load_alone(tmp_path, max_position_embeddings=32)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "phimoe", "deepseek_v3"])
def test_other_mixtures_of_experts_are_refused_as_such(family):
    import transformers

    settings = transformers.AutoConfig.for_model(family).to_dict()
    with pytest.raises(CheckpointError, match=f"{family}.*a mixture of experts"):
        Config("a model", settings)


@pytest.mark.parametrize("name", mostly_slow(["Mixtral", "Qwen 2 MoE"], "Qwen 2 MoE"))
def test_experts_that_are_stored_as_one_tensor(megatron, tmp_path, name):
    """As transformers 5 holds them in memory; `save_pretrained` writes them one by one."""
    from safetensors.torch import save_file

    model = save_model(name, tmp_path)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, _ = load_alone(tmp_path)
    torch.testing.assert_close(ours(loaded), theirs(model), **ROUNDING)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok 1"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 of 8"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window true"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias true"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ],
)
def test_settings_of_experts_that_are_not_computed_are_refused(family, settings, message):
    import transformers

    values = {**transformers.AutoConfig.for_model(family).to_dict(), **settings}
    with pytest.raises(CheckpointError, match=message):
        config_flags(Config("a model", values))


def test_layers_without_experts_are_those_that_transformers_makes_dense():
    settings = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2}
    flags = config_flags(Config("a model", {**settings, "mlp_only_layers": [3]}))
    assert flags["moe_layer_freq"] == [0, 1, 0, 0, 0, 1]
    dense = config_flags(Config("a model", {**settings, "num_experts": 0}))
    assert "num_experts" not in dense


def test_a_model_of_text_and_images_is_refused_as_such():
    import transformers

    settings = transformers.AutoConfig.for_model("gemma3").to_dict()
    with pytest.raises(CheckpointError, match="model of text and images"):
        Config("a model", settings)


_SIZE_KEYS = {"hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "head_dim",
              "num_key_value_heads", "intermediate_size", "model_type", "architectures", "dtype",
              "n_embd", "n_head", "n_layer", "n_inner", "transformers_version"}  # fmt: skip


def other_values(value):
    """Values of the same kind; of a key that is null, some that could be meant."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 3] if isinstance(value, int) else [value * 1.5 if value else 0.25]
    if isinstance(value, str):
        return ["gelu", "silu", "gelu_pytorch_tanh", "relu"]
    return [True, 7, 0.5] if value is None else []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_attribute_is_ignored(megatron, tmp_path, family):
    """Each attribute of a configuration set to another value: the same logits, or a refusal."""
    import transformers

    changes = next((c for f, c in CASES.values() if f == family), {})
    sizes = {**SIZES, **changes}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 256, "vocab_size": 101}
    config = transformers.AutoConfig.for_model(family, **sizes)
    accepted = 0
    for key, value in config.to_dict().items():
        if key in _SIZE_KEYS or key.startswith("_"):
            continue
        for other in other_values(value):
            model = None if other == value else built(family, sizes, key, other, tmp_path)
            if model is None:
                continue
            try:
                loaded, _ = load_alone(tmp_path)
            except RetroError:
                continue
            torch.testing.assert_close(ours(loaded, 40), theirs(model, 40), **ROUNDING)
            accepted += 1
    assert accepted > 5


def built(family, sizes, key, value, path):
    """The model with another value of a key; None if transformers does not compute it."""
    import transformers

    try:
        config = transformers.AutoConfig.for_model(family, **{**sizes, key: value})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        randomize(model)
        theirs(model.eval(), 40)
    except Exception:
        return None
    model.save_pretrained(path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, key: value}))
    return model


@pytest.mark.parametrize(
    "name", ["Gemma", "OLMo 2", "Granite", "SmolLM3", "GPT-NeoX", "Llama, yarn"]
)
def test_what_others_do_not_compute_is_not_written_for_them(tmp_path, name):
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint
    from retro_mcore.checkpoint.conversion.targets import check_origin

    save_model(name, tmp_path)
    flags = open_checkpoint(tmp_path).flags
    for target in ("megatron", "instructretro"):
        with pytest.raises(ConfigurationError):
            check_origin(target, flags)


@pytest.mark.slow
def test_the_table_of_differences(megatron, tmp_path):
    """As docs/benchmarks.md has it: every family, read and written, within fp32's rounding."""
    from benchmarks import families

    families.compare(families.Options(output=str(tmp_path / "table.md")))
    header, _, *rows = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(CASES)
    names = [name.strip() for name in header.split("|")[1:-1]]
    for row in rows:
        cells = dict(zip(names, (cell.strip() for cell in row.split("|")[1:-1]), strict=True))
        for name in names[3:]:
            # A decoder alone may be of no family; RetroForCausalLM computes every option.
            if not (name == "written back" and cells[name] == "refused"):
                assert float(cells[name]) <= 5e-5, (cells["model"], name)
