"""--load-gpt from Hugging Face directories, against transformers' own forward pass."""

from __future__ import annotations

import json

import pytest
import torch

from retro_mcore.errors import CheckpointError
from tests.unit.training.small import CHUNK_LENGTH, NO_DROPOUT, SEQUENCE_LENGTH, small_options

VOCABULARY = 101  # no multiple of anything

#: Configuration of a tiny model, and the flags that it needs.
FAMILIES = {
    "gpt2": (
        {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 48, "n_inner": 96},
        {
            "ffn_hidden_size": 96,
            "openai_gelu": True,
            "max_position_embeddings": 48,
            "position_embedding_type": "learned_absolute",
        },
    ),
    "llama": (
        {"num_key_value_heads": 2, "rope_theta": 5000.0, "rms_norm_eps": 1e-6},
        {"norm_epsilon": 1e-6, "rotary_base": 5000, "untie_embeddings_and_output_weights": True},
    ),
    "mistral": (
        {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 64},
        {
            "kv_channels": 16,
            "norm_epsilon": 1e-6,
            "num_query_groups": 1,
            "untie_embeddings_and_output_weights": True,
        },
    ),
    "qwen2": (
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"norm_epsilon": 1e-6, "add_qkv_bias": True},
    ),
    "qwen3": (
        {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
        {
            "norm_epsilon": 1e-6,
            "qk_layernorm": True,
            "untie_embeddings_and_output_weights": True,
        },
    ),
    "stablelm": (
        {"num_key_value_heads": 4, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
        {
            "num_query_groups": 4,
            "normalization": "LayerNorm",
            "rotary_percent": 0.25,
            "add_qkv_bias": True,
            "untie_embeddings_and_output_weights": True,
        },
    ),
}
LLAMA_CONFIG = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LLAMA_FLAGS = {
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "position_embedding_type": "rope",
}


def make_model(family: str, path, **overrides):
    """A tiny model of transformers with weights large enough to matter, saved in `path`."""
    import transformers

    fields = {**FAMILIES[family][0], **overrides, "vocab_size": VOCABULARY}
    if family != "gpt2":
        fields = {**LLAMA_CONFIG, **fields}
    config = transformers.AutoConfig.for_model(family, **fields)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.dim() > 1 else 0.1))
    model.save_pretrained(path, max_shard_size=overrides.pop("shard", "5GB"))
    return model


def flags_of(family: str) -> dict:
    base = {} if family == "gpt2" else LLAMA_FLAGS
    return {**base, **FAMILIES[family][1], "num_layers": 3, "retro_decoder_layers": [2, 3]}


def arguments(**flags):
    """A model's arguments as the trainer resolves them, for the tokenizer of VOCABULARY."""
    from dataclasses import fields

    from retro_mcore.model.options import ModelArguments, ModelOptions

    options = small_options(**{**NO_DROPOUT, **flags})
    return ModelArguments(
        **{field.name: getattr(options, field.name) for field in fields(ModelOptions)},
        seq_length=SEQUENCE_LENGTH,
        retro_chunk_length=CHUNK_LENGTH,
        vocab_size=VOCABULARY,
        padded_vocab_size=128,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_fingerprint="",
    )


def load(path, **flags):
    """A fresh Retro model that took the decoder, and the report."""
    from retro_mcore.checkpoint.conversion.gpt import load_gpt
    from retro_mcore.training.options.pretrain import ParallelOptions
    from retro_mcore.training.setup.build import build_model
    from retro_mcore.training.setup.retrofit import resolved_flags

    model_arguments = arguments(**flags)
    model = build_model(model_arguments, ParallelOptions(device="cpu")).eval()
    report = load_gpt([model], str(path), resolved_flags(model_arguments), VOCABULARY)
    return model, report


def logits(model) -> torch.Tensor:
    tokens = tokens_of_test()
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)[..., :VOCABULARY]


def tokens_of_test() -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(VOCABULARY, (2, SEQUENCE_LENGTH), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_retrieval_off_equals_transformers(megatron, family, tmp_path):
    theirs = make_model(family, tmp_path)
    ours, report = load(tmp_path, **flags_of(family))
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(logits(ours), wanted, atol=2e-5, rtol=1e-5)
    assert report.fresh  # of retrieval alone
    assert all("neighbor_encoder" in n or "cross_att" in n for n in report.fresh)
    taken = {name for name, _ in ours.named_parameters()} - set(report.fresh)
    assert report.taken == len(taken)


def test_sharded_files(megatron, tmp_path):
    theirs = make_model("llama", tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours, _ = load(tmp_path, **flags_of("llama"))
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    torch.testing.assert_close(logits(ours), wanted, atol=2e-5, rtol=1e-5)


def test_llama_3_rope(megatron, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    theirs = make_model("llama", tmp_path, rope_parameters=scaling, head_dim=32)
    flags = {**flags_of("llama"), "rotary_base": 500000, "kv_channels": 32}
    ours, _ = load(tmp_path, **flags, use_rope_scaling=True, rope_scaling_factor=16.0)
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    torch.testing.assert_close(logits(ours), wanted, atol=2e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="--use-rope-scaling is False, expected True"):
        load(tmp_path, **flags)


def test_padding_of_the_vocabulary_costs_next_to_nothing(megatron, tmp_path):
    make_model("gpt2", tmp_path)
    ours, _ = load(tmp_path, **flags_of("gpt2"))
    tokens = tokens_of_test()
    with torch.no_grad():
        padded = ours(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)
    more = padded.logsumexp(-1) - padded[..., :VOCABULARY].logsumexp(-1)
    assert 0 < more.max() <= torch.tensor(1 + 27 / VOCABULARY).log()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_layers": 4}, "--num-layers is 4, expected 3"),
        ({"ffn_hidden_size": 64}, "--ffn-hidden-size is 64, expected 48"),
        ({"num_query_groups": 4}, "--num-query-groups is 4, expected 2"),
        ({"rotary_base": 10000}, "--rotary-base is 10000, expected 5000"),
        ({"norm_epsilon": 1e-5}, "--norm-epsilon is 1e-05, expected 1e-06"),
        ({"disable_bias_linear": False}, "--disable-bias-linear is False, expected True"),
        ({"untie_embeddings_and_output_weights": False}, "is False, expected True"),
    ],
)
def test_another_architecture_is_refused_by_flag(megatron, tmp_path, flags, message):
    make_model("llama", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, **{**flags_of("llama"), **flags})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mpt"}, "model_type 'mpt'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary embedding 'yarn'"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(megatron, tmp_path, change, message):
    make_model("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, **flags_of("llama"))


def test_missing_and_unknown_tensors_are_refused(megatron, tmp_path):
    from safetensors.torch import load_file, save_file

    make_model("llama", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "model.extra.weight": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"unknown tensors extra\.weight"):
        load(tmp_path, **flags_of("llama"))
    tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"no tensor layers\.1\.self_attn\.k_proj\.weight"):
        load(tmp_path, **flags_of("llama"))


def test_a_vocabulary_of_another_tokenizer_is_refused(megatron, tmp_path):
    from retro_mcore.checkpoint.conversion.gpt import load_gpt
    from retro_mcore.training.setup.retrofit import resolved_flags

    make_model("llama", tmp_path)
    model, _ = load(tmp_path, **flags_of("llama"))
    flags = resolved_flags(arguments(**flags_of("llama")))
    with pytest.raises(CheckpointError, match=f"vocabulary of {VOCABULARY}"):
        load_gpt([model], str(tmp_path), flags, VOCABULARY + 1)


def test_rows_that_no_token_has_are_told(megatron, tmp_path, monkeypatch):
    """DeepSeek-LLM-7B has 102,400 rows for 100,015 tokens."""
    from retro_mcore.checkpoint.conversion import gpt
    from retro_mcore.training.setup.retrofit import resolved_flags

    make_model("llama", tmp_path)
    model, _ = load(tmp_path, **flags_of("llama"))
    flags = resolved_flags(arguments(**flags_of("llama")))
    assert "warning" not in str(gpt.load_gpt([model], str(tmp_path), flags, VOCABULARY - 5))
    monkeypatch.setattr(gpt, "_LARGEST_PADDING", 4)
    loaded = str(gpt.load_gpt([model], str(tmp_path), flags, VOCABULARY - 5))
    assert f"warning: 5 of its {VOCABULARY} embedding rows" in loaded


def test_special_tokens_that_nothing_writes_need_no_rows(megatron, tmp_path):
    """Gemma 3's tokenizer has an image token more than its checkpoint rows."""
    from retro_mcore.checkpoint.conversion.gpt import load_gpt
    from retro_mcore.training.setup.plan import make_plan
    from retro_mcore.training.setup.retrofit import resolved_flags
    from tests.unit.training.small import small_project

    make_model("llama", tmp_path)
    options = small_options(**NO_DROPOUT, **flags_of("llama"), load_gpt=str(tmp_path))
    with pytest.raises(CheckpointError, match=f"token ids up to {VOCABULARY}"):
        make_plan(options, small_project(), VOCABULARY + 1)
    plan = make_plan(options, small_project(), VOCABULARY + 1, VOCABULARY)
    assert plan.arguments.vocab_size == VOCABULARY + 1
    model, _ = load(tmp_path, **flags_of("llama"))
    load_gpt([model], str(tmp_path), resolved_flags(plan.arguments), plan.used_vocab_size)
