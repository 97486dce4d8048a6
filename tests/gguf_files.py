"""GGUF files as llama.cpp's conversion writes them, small, from models of transformers."""

from __future__ import annotations

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def tensors_of(model) -> dict[str, np.ndarray]:
    """A model's tensors under llama.cpp's names, in its order of rows."""
    config, found = model.config, {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = parameter.float().numpy()
        if config.model_type == "llama" and ".q_proj." in name:
            array = permuted(array, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj." in name:
            array = permuted(array, config.num_key_value_heads)
        found[gguf_name(name)] = array
    return found


def metadata_of(model) -> dict:
    """A model's metadata, without the architecture's prefix."""
    config = model.config
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width or config.hidden_size // heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": width or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }


def write_gguf(path, tensors, metadata, family="llama", general=None, tokenizer=None, types=None):
    """Write a file.

    Args:
        path: The file.
        tensors: By llama.cpp's names, in float32; or raw blocks, with their type in `types`.
        metadata: Of the architecture, without its prefix; None leaves a key out.
        family: Architecture.
        general: More metadata, with full keys.
        tokenizer: Metadata of the tokenizer, with full keys.
        types: Quantization of each tensor (default: F32).
    """
    writer = gguf.GGUFWriter(path, family)
    rest = {f"{family}.{key}": value for key, value in metadata.items() if value is not None}
    for key, value in {**rest, **(general or {}), **(tokenizer or {})}.items():
        _add(writer, key, value)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType[(types or {}).get(name, "F32")]
        raw = array if array.dtype == np.uint8 else gguf.quants.quantize(array, kind)
        plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        writer.add_tensor(name, raw, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
