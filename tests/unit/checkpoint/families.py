"""Tiny models of every family, with random weights, and the same through `--load-gpt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 101  # no multiple of anything
LAYERS = 3
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
}
GROUPS = {"num_key_value_heads": 2}
_ORIGINAL = {"original_max_position_embeddings": 24}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0],
             "long_factor": [9.0, 9.0, 9.0, 9.0]}  # fmt: skip
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SLIDING = "sliding_attention"
_LOCAL = {_SLIDING: {"rope_type": "default", "rope_theta": 100.0}}


def _llama(**rope: Any) -> tuple[str, dict[str, Any]]:
    return "llama", {**GROUPS, "rope_parameters": {"rope_theta": 5e3, **rope}}


#: By name: the family, and the settings beside SIZES. Every kind of difference between families.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": _llama(rope_type="default"),
    "Llama, tied": ("llama", {**GROUPS, "tie_word_embeddings": True}),
    "Llama, biases of attention": ("llama", {**GROUPS, "attention_bias": True}),
    "Llama, all biases": ("llama", {**GROUPS, "attention_bias": True, "mlp_bias": True}),
    "Llama, linear": _llama(rope_type="linear", factor=4.0),
    "Llama, dynamic": _llama(rope_type="dynamic", factor=4.0),
    "Llama 3.1": _llama(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=8192),
    "Llama 3.1, other lengths": _llama(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                       high_freq_factor=3.0, **_ORIGINAL),
    "Llama, yarn": _llama(rope_type="yarn", factor=4.0, **_ORIGINAL),
    "Llama, yarn with mscale": _llama(rope_type="yarn", factor=4.0, mscale=0.7, beta_fast=20.0,
                                      mscale_all_dim=1.2, truncate=False, **_ORIGINAL),
    "Llama, longrope": ("llama", {**GROUPS, "rope_parameters": {**_LONGROPE, "factor": 4.0,
                                  "original_max_position_embeddings": 200}}),
    "Mistral": ("mistral", {**GROUPS, "head_dim": 16, "sliding_window": None}),
    "Mistral, window": ("mistral", {"num_key_value_heads": 1, "sliding_window": 24}),
    "Qwen 2.5": ("qwen2", {**GROUPS, "tie_word_embeddings": True}),
    "Qwen 2, window in the last layers": ("qwen2", {**GROUPS, "use_sliding_window": True,
                                          "sliding_window": 24, "max_window_layers": 1}),
    "Qwen 3": ("qwen3", {**GROUPS, "head_dim": 16, "rope_theta": 1e6}),
    "Qwen 3, yarn and biases": ("qwen3", {**GROUPS, "head_dim": 8, "attention_bias": True,
                                "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6,
                                                    "factor": 4.0, **_ORIGINAL}}),
    "StableLM": ("stablelm", {"num_key_value_heads": 4, "use_qkv_bias": True}),
    "Gemma": ("gemma", {**GROUPS, "head_dim": 16}),
    "Gemma 2": ("gemma2", {**GROUPS, "head_dim": 16, "query_pre_attn_scalar": 24,
                           "sliding_window": 24, "attn_logit_softcapping": 2.0,
                           "final_logit_softcapping": 3.0}),
    "Gemma 3": ("gemma3_text", {**GROUPS, "head_dim": 16, "query_pre_attn_scalar": 24,
                "sliding_window": 24, "layer_types": [_SLIDING, "full_attention", _SLIDING],
                "rope_parameters": {**_LOCAL, "full_attention": {
                    "rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}}),
    "OLMo 2": ("olmo2", {**GROUPS}),
    "OLMo 3": ("olmo3", {**GROUPS, "sliding_window": 24, "layer_types": [
               _SLIDING, "full_attention", "full_attention"],
               "rope_parameters": {**_LOCAL, "full_attention": {
                   "rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, **_ORIGINAL}}}),
    "Phi-3": ("phi3", {**GROUPS, "pad_token_id": None}),
    "Phi-3, window": ("phi3", {**GROUPS, "pad_token_id": None, "sliding_window": 24}),
    "Phi-3, longrope": ("phi3", {**GROUPS, "pad_token_id": None, "rope_parameters": _LONGROPE,
                        "original_max_position_embeddings": 200}),
    "Phi-4 mini, partial longrope": ("phi3", {**GROUPS, "pad_token_id": None, "rope_parameters": {
        **_LONGROPE, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [9.0] * 3}, "original_max_position_embeddings": 200}),
    "SmolLM2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True,
                          "rope_theta": 1e5}),
    "SmolLM3": ("smollm3", {**GROUPS, "pad_token_id": None, "no_rope_layers": [1, 0, 1]}),
    "SmolLM3, window": ("smollm3", {**GROUPS, "pad_token_id": None, "no_rope_layers": [1, 0, 1],
                        "use_sliding_window": True, "sliding_window": 24}),
    "Granite": ("granite", {**GROUPS, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
                "residual_multiplier": 0.22, "attention_multiplier": 0.2,
                "tie_word_embeddings": True}),
    "StarCoder2": ("starcoder2", {**GROUPS, "sliding_window": 24}),
    "StarCoder2, a broken base": ("starcoder2", {**GROUPS, "rope_theta": 999999.4420358813}),
    "Mixtral": ("mixtral", {**GROUPS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mixtral, tied, window": ("mixtral", {**GROUPS, "num_local_experts": 5, "head_dim": 16,
                              "num_experts_per_tok": 3, "sliding_window": 128,
                              "tie_word_embeddings": True}),
    "Qwen 2 MoE": ("qwen2_moe", {**GROUPS, **_EXPERTS, "shared_expert_intermediate_size": 40,
                   "norm_topk_prob": False, "mlp_only_layers": [0]}),
    "Qwen 2 MoE, no biases": ("qwen2_moe", {**GROUPS, **_EXPERTS, "qkv_bias": False,
                              "shared_expert_intermediate_size": 24, "norm_topk_prob": True}),
    "Qwen 3 MoE": ("qwen3_moe", {**GROUPS, **_EXPERTS, "head_dim": 16, "norm_topk_prob": True,
                   "decoder_sparse_step": 2}),
    "Qwen 3 MoE, tied": ("qwen3_moe", {**GROUPS, **_EXPERTS, "head_dim": 8,
                         "num_experts_per_tok": 1, "norm_topk_prob": False,
                         "tie_word_embeddings": True}),
    "OLMoE": ("olmoe", {**GROUPS, "num_experts": 4, "num_experts_per_tok": 2}),
    "OLMoE, normed": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 3,
                                "norm_topk_prob": True}),
    "GPT-NeoX": ("gpt_neox", {"rotary_pct": 0.25}),
    "GPT-NeoX, in sequence": ("gpt_neox", {"use_parallel_residual": False, "hidden_act":
                                           "gelu_new", "rotary_pct": 0.5}),
}  # fmt: skip


def save_model(name: str, path: Path, dtype: torch.dtype = torch.float32, **save: Any) -> Any:
    """A tiny model of transformers, every weight of it random and large enough to matter."""
    family, changes = CASES[name]
    return save_family(family, {**SIZES, **changes}, path, dtype, **save)


def save_family(
    family: str, settings: dict[str, Any], path: Path, dtype: torch.dtype, **save: Any
) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(family, **settings)
    # Limits of attention's scores are not computed by its default attention.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(model)
    model = model.to(dtype).eval()
    model.save_pretrained(path, **save)
    return model


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.dim() > 1 else 0.3))


def load_alone(path: Path, **flags: Any) -> tuple[Any, Any]:
    """What `--load-gpt DIR` makes without another flag of the model; and the report."""
    from retro_mcore.training.options.from_checkpoint import model_options_of_gpt
    from tests.unit.checkpoint.test_huggingface import load

    return load(path, retro_decoder_layers=[2, 3], **{**model_options_of_gpt(str(path)), **flags})


def tokens(length: int = 120) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(VOCABULARY, (2, length), generator=generator)


def theirs(model: Any, length: int = 120) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(length)).logits


def ours(model: Any, length: int = 120) -> torch.Tensor:
    ids = tokens(length)
    with torch.no_grad():
        return model(ids, torch.arange(length).expand_as(ids), None)[..., :VOCABULARY]
