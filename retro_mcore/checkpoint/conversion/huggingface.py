"""Hugging Face directories of GPTs, as weights under our names.

Nothing of transformers is used: config.json and the files of weights are all that is read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.huggingface_config import Config
from retro_mcore.checkpoint.conversion.huggingface_families import Flags
from retro_mcore.checkpoint.conversion.huggingface_files import (
    TensorFiles,
    end_tokens,
    read_json_object,
)
from retro_mcore.checkpoint.conversion.huggingface_flags import config_flags
from retro_mcore.checkpoint.conversion.huggingface_layers import (
    expert_parts,
    layer_parts,
    merge_qkv,
    missing_biases,
)
from retro_mcore.checkpoint.conversion.model_fields import END_TOKENS
from retro_mcore.checkpoint.conversion.weights import Weight
from retro_mcore.model.expert_options import expert_layers

_HEADS = ("lm_head.weight", "embed_out.weight")  # the second: GPT-NeoX's on the hub
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# Buffers that older releases saved: causal masks, and the rotary embedding's frequencies.
_GPT2_BUFFERS = (".attn.bias", ".attn.masked_bias")
_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def is_huggingface(directory: Path) -> bool:
    """Whether a directory holds a Hugging Face model."""
    return (directory / "config.json").is_file()


def read_huggingface(directory: Path) -> tuple[Flags, dict[str, Weight], list[str]]:
    """A model's flags and weights, and what its owner may want to know.

    The weights are those that transformers reads (see `huggingface_files`).

    Raises:
        CheckpointError: a family or a setting that Megatron's decoder does not have, a file that
            is missing or damaged, or a weight that is missing, unknown or of other sizes.
    """
    values = read_json_object(directory / "config.json")
    config = Config(directory, values)
    flags, weights, notes = read_model(config, TensorFiles.of_directory(directory, values))
    if tokens := end_tokens(directory, values):
        flags[END_TOKENS] = tokens
    return flags, weights, notes


def read_model(config: Config, tensors: TensorFiles) -> tuple[Flags, dict[str, Weight], list[str]]:
    """`read_huggingface` of a model whose settings and tensors come from anywhere.

    Raises:
        CheckpointError: as there.
    """
    flags = config_flags(config)
    gpt2 = config.family == "gpt2"
    weights, notes = _embeddings(config, flags, tensors)
    flags["untie_embeddings_and_output_weights"] = _OUTPUT in weights
    weights |= _gpt2_weights(flags, tensors) if gpt2 else _rotary_weights(config, flags, tensors)
    if not gpt2 and missing_biases(config, flags):
        notes = [*notes, "linear layers without biases in config.json get biases of zero"]
    buffers = _GPT2_BUFFERS if gpt2 else _BUFFERS
    tensors.check(lambda name: name.endswith(buffers))
    return flags, weights, notes


def _embeddings(
    config: Config, flags: Flags, tensors: TensorFiles
) -> tuple[dict[str, Weight], list[str]]:
    """The embedding and, if it has weights of its own, the output layer.

    Like transformers, it believes the file rather than config.json: a model that should be tied
    is not, where both are there and differ; and where one is there, it is both.
    """
    tied = config.boolean("tie_word_embeddings")
    name, head_name = config.facts.embedding, _HEADS[0]
    if config.family == "gpt_neox" and head_name not in tensors and _HEADS[1] in tensors:
        head_name = _HEADS[1]
    shape = (flags["vocab_size"], flags["hidden_size"])
    if tied and name not in tensors and head_name in tensors:
        name = head_name
    weights = {_EMBEDDING: tensors.take({name: shape})}
    if tied and (name == head_name or head_name not in tensors):
        return weights, []
    head = tensors.take({head_name: shape})
    if tied and torch.equal(tensors.load(name), tensors.load(head_name)):
        return weights, []
    note = (
        "config.json ties the output layer to the embedding, but their weights differ: both are "
        "kept, as transformers does"
    )
    return {**weights, _OUTPUT: head}, [note] if tied else []


def _gpt2_weights(flags: Flags, tensors: TensorFiles) -> dict[str, Weight]:
    heads, hidden, ffn = (
        flags[n] for n in ("num_attention_heads", "hidden_size", "ffn_hidden_size")
    )
    positions = (flags["max_position_embeddings"], hidden)
    weights = {
        "embedding.position_embeddings.weight": tensors.take({"wpe.weight": positions}),
        "decoder.final_layernorm.weight": tensors.take({"ln_f.weight": (hidden,)}),
        "decoder.final_layernorm.bias": tensors.take({"ln_f.bias": (hidden,)}),
    }
    rows = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, ffn), "mlp.c_proj": (ffn, hidden)}  # fmt: skip
    for layer in range(flags["num_layers"]):
        theirs, ours = f"h.{layer}.", f"decoder.layers.{layer}."
        for old, new in _GPT2_LAYER.items():
            matrix = rows.get(old, (hidden,))
            for kind, shape in (("weight", matrix), ("bias", matrix[-1:])):
                build = _gpt2_build(old, kind, heads)
                weight = tensors.take({f"{theirs}{old}.{kind}": shape}, build)
                weights[f"{ours}{new}.{kind}"] = weight
        if tensors.has_problems:
            break
    return weights


_GPT2_LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_attn": "self_attention.linear_qkv",
    "attn.c_proj": "self_attention.linear_proj",
    "ln_2": "pre_mlp_layernorm",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}


def _gpt2_build(name: str, kind: str, heads: int) -> Callable[[Tensor], Tensor] | None:
    """GPT-2 stores linear layers transposed, and queries, keys and values one after another."""

    def build(tensor: Tensor) -> Tensor:
        if kind == "weight":
            tensor = tensor.t().contiguous()
        if name != "attn.c_attn":
            return tensor
        query, key, value = tensor.chunk(3)
        return merge_qkv(query, key, value, heads)

    return None if name.startswith("ln_") else build


def _rotary_weights(config: Config, flags: Flags, tensors: TensorFiles) -> dict[str, Weight]:
    """The weights of every family but GPT-2."""
    kinds = ("weight", "bias") if flags["normalization"] == "LayerNorm" else ("weight",)
    hidden = flags["hidden_size"]
    weights = {}
    for kind in kinds:
        final = {f"{config.facts.final_norm}.{kind}": (hidden,)}
        weights[f"decoder.final_layernorm.{kind}"] = tensors.take(final)
    dense, zeros = layer_parts(config, flags), missing_biases(config, flags)
    experts = expert_layers(
        flags.get("num_experts"), flags.get("moe_layer_freq"), flags["num_layers"]
    )
    others = {name: part for name, part in dense.items() if not name.startswith("mlp.")}
    for layer in range(flags["num_layers"]):
        theirs, ours = f"layers.{layer}.", f"decoder.layers.{layer}."
        parts = dense
        if layer + 1 in experts:
            parts = others | expert_parts(config, flags, tensors, theirs)
        for name, (named, build) in parts.items():
            prefixed = {f"{theirs}{part}": shape for part, shape in named.items()}
            weights[f"{ours}{name}"] = tensors.take(prefixed, build)
        dtype = weights[f"{ours}self_attention.linear_proj.weight"].dtype
        weights |= {f"{ours}{name}": _zeros(shape, dtype) for name, shape in zeros.items()}
        if tensors.has_problems:
            break
    return weights


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
    return Weight(shape, dtype, partial(torch.zeros, shape, dtype=dtype))
