"""GGUF files of the Llama family, as weights under our names.

Metadata and tensors get Hugging Face's names, and are then read as a Hugging Face directory is.
Quantized tensors are dequantized by the `gguf` package, one at a time, when they are wanted.
Metadata of the architecture that our decoder does not have is refused by name.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.gguf_rope import rope_parameters
from retro_mcore.checkpoint.conversion.huggingface import read_model
from retro_mcore.checkpoint.conversion.huggingface_config import Config
from retro_mcore.checkpoint.conversion.huggingface_families import Flags
from retro_mcore.checkpoint.conversion.huggingface_files import Stored, TensorFiles, refuse
from retro_mcore.checkpoint.conversion.model_fields import END_TOKENS
from retro_mcore.checkpoint.conversion.weights import Weight
from retro_mcore.errors import MissingDependencyError
from retro_mcore.gguf_file import READABLE_TYPES, GgufFile, GgufTensor, read_gguf_header

_FAMILIES = ("llama", "qwen2", "qwen3")

# Keys below the architecture's name, by those of config.json.
_NEEDED = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_READ = {*_NEEDED.values(), "attention.head_count_kv", "attention.key_length",
         "attention.value_length", "vocab_size", "rope.dimension_count", "rope.freq_base",
         "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length", "rope.scaling.finetuned"}  # fmt: skip
# Factors that are 1, or 0 where they are not used.
_FACTORS = ("logit_scale", "residual_scale", "embedding_scale", "rope.scaling.attn_factor")
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_REMARKS = ("tensor_data_layout",)

_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_ROWS_AT_ONCE = 4096  # dequantized in one step, to bound the memory
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def read_gguf(path: Path) -> tuple[Flags, dict[str, Weight], list[str]]:
    """A model's flags and weights, and notes for the user; see `read_huggingface`.

    Raises:
        CheckpointError: another architecture, a setting that our decoder does not have, an
            unsupported quantization, a damaged file, or a weight that is missing, unknown or of
            another size.
        MissingDependencyError: the file is quantized, and the `gguf` package is not installed.
    """
    file = read_gguf_header(path)
    values = _config_values(file)
    _check_types(file)
    stored = _stored(file, values)
    flags, weights, notes = read_model(Config(path, values), TensorFiles(path, stored))
    ends, left_out = end_tokens(file, flags["vocab_size"])
    if ends:
        flags[END_TOKENS] = ends
    return flags, weights, [*notes, *left_out, *_notes(file)]


def end_tokens(file: GgufFile, vocab_size: int) -> tuple[list[int], list[str]]:
    """Tokens that end a generated text: the file's end of text, of a turn and of a message.

    llama.cpp also looks for well-known names among the tokens; only declared ones are taken here.
    Ends of turns and messages beyond the vocabulary cannot be generated, and are left out.

    Returns:
        The tokens, and notes on those left out.

    Raises:
        CheckpointError: one is no token, or the end of text is beyond the vocabulary.
    """
    found, notes = [], []
    for name in _ENDS:
        key = f"tokenizer.ggml.{name}"
        token = file.metadata.get(key)
        if token is None:
            continue
        if type(token) is int and 0 <= token < vocab_size:
            found.append(token)
        elif type(token) is int and name != "eos_token_id":
            notes.append(f"{key} {token} left out: the embedding has {vocab_size} rows")
        else:
            raise refuse(file.path, f"{key} {token!r}", f"a token below {vocab_size}")
    return list(dict.fromkeys(found)), notes


def _config_values(file: GgufFile) -> dict[str, Any]:
    """The model's config.json."""
    family, kind = (file.metadata.get(f"general.{key}") for key in ("architecture", "type"))
    if family not in _FAMILIES:
        raise refuse(file.path, f"architecture {family!r}", f"one of {', '.join(_FAMILIES)}")
    if kind not in (None, "model"):
        raise refuse(file.path, f"general.type {kind!r}", "a whole model")
    prefix = f"{family}."
    keys = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    _check_keys(file.path, keys, prefix)
    heads = keys["attention.head_count"]
    values: dict[str, Any] = {name: keys[key] for name, key in _NEEDED.items()}
    # None is refused where the width of a head is no whole number.
    usual = _quotient(keys["embedding_length"], heads)
    head_dim = keys.get("attention.key_length", usual)
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise refuse(
            file.path, f"{prefix}attention.value_length {keys['attention.value_length']}",
            f"{head_dim}, as attention.key_length",
        )  # fmt: skip
    factors = _load(file, file.tensors[_ROPE_FACTORS]) if _ROPE_FACTORS in file.tensors else None
    return {
        **values,
        "model_type": family,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": _vocabulary(file, keys),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": family == "llama" and "blk.0.attn_q.bias" in file.tensors,
        **rope_parameters(file.path, keys, head_dim, factors),
    }


def _check_keys(path: Path, keys: Mapping[str, Any], prefix: str) -> None:
    missing = [prefix + key for key in _NEEDED.values() if key not in keys]
    if missing:
        raise refuse(path, f"no {', '.join(missing)} in its metadata", "the whole metadata")
    unknown = [
        repr(f"{prefix}{key} {str(value)[:40]}")[1:-1]
        for key, value in keys.items()
        if key not in _READ and not _changes_nothing(key, value)
    ]
    if unknown:
        raise refuse(
            path,
            f"settings that our decoder does not have: {', '.join(unknown[:8])}",
            "a model without them",
        )


def _changes_nothing(key: str, value: Any) -> bool:
    if key == "attention.causal":
        return value is True
    if key in _FACTORS and value == 1:
        return True
    return key in _REMARKS or value in (0, "", [])


def _quotient(hidden: Any, heads: Any) -> int | None:
    plain = isinstance(hidden, int) and isinstance(heads, int) and heads
    return hidden // heads if plain and hidden % heads == 0 else None


def _vocabulary(file: GgufFile, keys: Mapping[str, Any]) -> Any:
    """Rows of the embedding: as the metadata says, else one for each token, else as they are."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding is not None else 0
    return keys.get("vocab_size", len(tokens) if isinstance(tokens, list) else rows)


def _check_types(file: GgufFile) -> None:
    """Refuse quantizations that are not known, and the first versions of the known ones."""
    unknown = [f"{t.name!r} ({t.type})" for t in file.tensors.values() if t.num_bytes is None]
    if unknown:
        more = f" and {len(unknown) - 2} more" if len(unknown) > 2 else ""
        raise refuse(
            file.path,
            f"tensors of types that are not read: {', '.join(unknown[:2])}{more}",
            f"types {', '.join(READABLE_TYPES)}",
        )
    version = file.metadata.get("general.quantization_version")
    if _is_quantized(file) and version not in (None, 2):
        raise refuse(file.path, f"general.quantization_version {version}", "2")


def _is_quantized(file: GgufFile) -> bool:
    return any(tensor.type.startswith("Q") for tensor in file.tensors.values())


def _stored(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors by Hugging Face's names; unknown ones keep theirs, and are refused later."""
    if _is_quantized(file):
        _gguf()
    found: dict[str, Stored] = {}
    for tensor in file.tensors.values():
        if tensor.name == _ROPE_FACTORS and values["model_type"] == "llama":
            continue  # it is in the rotary embedding's settings
        heads = 0
        if values["model_type"] == "llama":
            heads = _interleaved_heads(tensor.name, values)
        name = _name(tensor.name)
        dtype = _dtype(tensor)
        load = partial(_load_halved, file, tensor, heads) if heads else partial(_load, file, tensor)
        found[name] = Stored(tensor.name, tensor.shape, dtype, load)
    return found


def _name(theirs: str) -> str:
    match = _TENSOR.fullmatch(theirs)
    if match is None or match[2] not in _NAMES:
        return theirs
    layer = f"layers.{int(match[1])}." if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def _interleaved_heads(name: str, values: Mapping[str, Any]) -> int:
    """Heads of queries or keys, whose rows llama.cpp reorders; 0 for other tensors."""
    match = _TENSOR.fullmatch(name)
    part = match[2] if match else ""
    key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
    return values[key] if key else 0


def _dtype(tensor: GgufTensor) -> torch.dtype:
    kept = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
    return kept.get(tensor.type, torch.float32)


def _load(file: GgufFile, tensor: GgufTensor) -> Tensor:
    data = file.read_bytes(tensor)
    if tensor.type == "BF16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    if tensor.type in _PLAIN:
        return torch.from_numpy(data.view(_PLAIN[tensor.type]))
    return _dequantize(data, tensor)


def _dequantize(data: np.ndarray, tensor: GgufTensor) -> Tensor:
    gguf = _gguf()
    rows = data.reshape(-1, data.shape[-1])
    made = np.empty((len(rows), tensor.shape[-1]), np.float32)
    kind = gguf.GGMLQuantizationType[tensor.type]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        made[part] = gguf.quants.dequantize(rows[part], kind)
    return torch.from_numpy(made).reshape(tensor.shape)


def _load_halved(file: GgufFile, tensor: GgufTensor, heads: int) -> Tensor:
    """Queries or keys with the two rows of each rotated pair in the halves of a head.

    For the architecture llama, llama.cpp rotates neighboring rows, so its files have the pairs
    side by side.
    """
    read = _load(file, tensor)
    rest = read.shape[1:]
    return read.reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(read.shape)


def _gguf() -> Any:
    try:
        importlib.import_module("gguf.quants")
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingDependencyError(
            "gguf", "not installed, and a quantized GGUF file needs it", "pip install gguf"
        ) from error


def _notes(file: GgufFile) -> list[str]:
    kinds = Counter(t.type for t in file.tensors.values() if t.type.startswith("Q"))
    if not kinds:
        return []
    counts = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
    return [f"dequantized, so it computes with the quantization's rounding ({counts} tensors)"]
