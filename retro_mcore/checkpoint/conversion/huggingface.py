"""Hugging Face directories of GPT-2 and of the Llama family, as weights under our names.

Nothing of transformers is used: config.json and the files of weights are all that is read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.huggingface_config import Config, Flags, config_flags
from retro_mcore.checkpoint.conversion.huggingface_files import TensorFiles, read_json_object
from retro_mcore.checkpoint.conversion.weights import Weight

_HEAD = "lm_head.weight"
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# Buffers that older releases saved: causal masks, and the rotary embedding's frequencies.
_GPT2_BUFFERS = (".attn.bias", ".attn.masked_bias")
_LLAMA_BUFFERS = ("rotary_emb.inv_freq",)


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
    return read_model(config, TensorFiles.of_directory(directory, values))


def read_model(config: Config, tensors: TensorFiles) -> tuple[Flags, dict[str, Weight], list[str]]:
    """`read_huggingface` of a model whose settings and tensors come from anywhere.

    Raises:
        CheckpointError: as there.
    """
    flags = config_flags(config)
    gpt2 = config.family == "gpt2"
    weights, notes = _embeddings(config, flags, tensors)
    flags["untie_embeddings_and_output_weights"] = _OUTPUT in weights
    weights |= _gpt2_weights(flags, tensors) if gpt2 else _llama_weights(config, flags, tensors)
    buffers = _GPT2_BUFFERS if gpt2 else _LLAMA_BUFFERS
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
    name = "wte.weight" if config.family == "gpt2" else "embed_tokens.weight"
    shape = (flags["vocab_size"], flags["hidden_size"])
    if tied and name not in tensors and _HEAD in tensors:
        name = _HEAD
    weights = {_EMBEDDING: tensors.take({name: shape})}
    if tied and (name == _HEAD or _HEAD not in tensors):
        return weights, []
    head = tensors.take({_HEAD: shape})
    if tied and torch.equal(tensors.load(name), tensors.load(_HEAD)):
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


def _llama_weights(config: Config, flags: Flags, tensors: TensorFiles) -> dict[str, Weight]:
    kinds = ("weight", "bias") if flags["normalization"] == "LayerNorm" else ("weight",)
    hidden = flags["hidden_size"]
    weights = {}
    for kind in kinds:
        weights[f"decoder.final_layernorm.{kind}"] = tensors.take({f"norm.{kind}": (hidden,)})
    for layer in range(flags["num_layers"]):
        theirs, ours = f"layers.{layer}.", f"decoder.layers.{layer}."
        for name, (parts, build) in _llama_layer(config, flags, kinds).items():
            prefixed = {f"{theirs}{part}": shape for part, shape in parts.items()}
            weights[f"{ours}{name}"] = tensors.take(prefixed, build)
        if tensors.has_problems:
            break
    return weights


_Parts = tuple[dict[str, tuple[int, ...]], Callable[..., Tensor] | None]


def _llama_layer(config: Config, flags: Flags, kinds: tuple[str, ...]) -> dict[str, _Parts]:
    """Our weights of a layer: the tensors that make one, with their sizes, and how."""
    hidden, ffn, width = (flags[n] for n in ("hidden_size", "ffn_hidden_size", "kv_channels"))
    queries, keys = flags["num_attention_heads"] * width, flags["num_query_groups"] * width
    rows = {"q": queries, "k": keys, "v": keys}
    merge = partial(merge_qkv, groups=flags["num_query_groups"])
    layer: dict[str, _Parts] = {
        "self_attention.linear_qkv.weight": (
            {f"self_attn.{p}_proj.weight": (n, hidden) for p, n in rows.items()}, merge
        ),
        "self_attention.linear_proj.weight": ({"self_attn.o_proj.weight": (hidden, queries)}, None),
        "mlp.linear_fc1.weight": (
            {f"mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}, _stack
        ),
        "mlp.linear_fc2.weight": ({"mlp.down_proj.weight": (hidden, ffn)}, None),
    }  # fmt: skip
    if config.family == "qwen2" or (config.family == "stablelm" and config.boolean("use_qkv_bias")):
        biases: dict[str, tuple[int, ...]] = {
            f"self_attn.{p}_proj.bias": (n,) for p, n in rows.items()
        }
        layer["self_attention.linear_qkv.bias"] = (biases, merge)
    for kind in kinds:
        layer[f"input_layernorm.{kind}"] = ({f"input_layernorm.{kind}": (hidden,)}, None)
        theirs = f"post_attention_layernorm.{kind}"
        layer[f"pre_mlp_layernorm.{kind}"] = ({theirs: (hidden,)}, None)
    if config.family == "qwen3":
        for part in "qk":
            norm: _Parts = ({f"self_attn.{part}_norm.weight": (width,)}, None)
            layer[f"self_attention.{part}_layernorm.weight"] = norm
    return layer


def merge_qkv(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """Rows of queries, keys and values as Megatron orders them: group by group, in each its
    queries, its key, its value.

    Args:
        query: `[attention heads * C, ...]`, C the width of a head.
        key: `[groups * C, ...]`.
        value: As `key`.
        groups: Query groups.
    """
    rest = query.shape[1:]
    parts = [part.reshape(groups, -1, *rest) for part in (query, key, value)]
    return torch.cat(parts, 1).reshape(-1, *rest)


def _stack(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
