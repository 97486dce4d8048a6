"""Our weights under the names of `RetroForCausalLM`, and back.

It keeps queries, keys and values apart, and the two halves of a gated MLP; we and Megatron join
them. Everything else differs in names only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.huggingface import merge_qkv
from retro_mcore.checkpoint.conversion.model_fields import Flags
from retro_mcore.checkpoint.conversion.weights import Weight, Weights
from retro_mcore.model.expert_options import expert_layers

_OUTSIDE = {
    "embedding.word_embeddings.": "model.embed_tokens.",
    "embedding.position_embeddings.": "model.embed_positions.",
    "decoder.final_layernorm.": "model.norm.",
    "output_layer.": "lm_head.",
    "neighbor_encoder.input_projection.": "model.encoder.input_projection.",
}
_BLOCKS = {"decoder": "model.layers.", "neighbor_encoder": "model.encoder.layers."}
_LAYER = re.compile(r"^(decoder|neighbor_encoder)\.layers\.(\d+)\.(.*)[._](weight|bias)$")
_EXPERTS = re.compile(r"mlp\.(?:experts\.local_experts\.(\d+)|shared_experts)\.(linear_fc[12])")
_PLAIN = {
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "cross_attention.linear_q": "cross_attn.q_proj",
    "cross_attention.linear_proj": "cross_attn.o_proj",
    "mlp.router": "mlp.router",
    "mlp.shared_experts.gate": "mlp.shared_expert_gate",
}
_NORMS = {
    "input_layernorm": "self_attn_norm",
    "pre_cross_attn_layernorm": "cross_attn_norm",
    "pre_mlp_layernorm": "mlp_norm",
}
_POST_NORMS = {
    "self_attn_bda.norm": "self_attn_post_norm",
    "mlp_bda.norm": "mlp_post_norm",
}
_DEEPNORMS = {
    "self_attn_bda.norm": "self_attn_norm",
    "cross_attn_bda.norm": "cross_attn_norm",
    "mlp_bda.norm": "mlp_norm",
}


class Parts(NamedTuple):
    """The tensors that one of our weights is there.

    Attributes:
        names: Their names.
        cut: From ours to theirs.
        join: From theirs to ours.
    """

    names: tuple[str, ...]
    cut: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[..., Tensor]


def parts_of(name: str, flags: Flags) -> Parts:
    """The tensors of a weight of ours.

    Args:
        name: Our name, as an unsharded model with local layers has it.
        flags: The model's options.
    """
    for ours, theirs in _OUTSIDE.items():
        if name.startswith(ours):
            return _whole(theirs + name[len(ours) :])
    match = _LAYER.match(name)
    assert match is not None, name
    block, number, module, kind = match.groups()
    prefix = f"{_BLOCKS[block]}{number}."
    after = _DEEPNORMS if flags.get("retro_deepnorm") else _POST_NORMS
    plain = {**_PLAIN, **_NORMS, **after}
    if module in plain:
        return _whole(f"{prefix}{plain[module]}.{kind}")
    groups = query_groups(block, flags)
    if module == "self_attention.linear_qkv":
        names = tuple(f"{prefix}self_attn.{part}_proj.{kind}" for part in "qkv")
        heads = attention_heads(block, flags) // groups
        return Parts(names, partial(cut_qkv, groups=groups, heads=heads),
                     partial(merge_qkv, groups=groups))  # fmt: skip
    if module == "cross_attention.linear_kv":
        names = tuple(f"{prefix}cross_attn.{part}_proj.{kind}" for part in "kv")
        return Parts(names, partial(_cut_kv, groups=groups), partial(_merge_kv, groups=groups))
    return _mlp_parts(prefix, module, kind, flags)


def _mlp_parts(prefix: str, module: str, kind: str, flags: Flags) -> Parts:
    """The tensors of an MLP's weight, or of an expert's."""
    inside, linear = "mlp.", module.removeprefix("mlp.")
    if match := _EXPERTS.fullmatch(module):
        number, linear = match.groups()
        inside = "mlp.shared_expert." if number is None else f"mlp.experts.{number}."
    if linear == "linear_fc2":
        return _whole(f"{prefix}{inside}down_proj.{kind}")
    assert linear == "linear_fc1", module
    if not is_gated(flags):
        return _whole(f"{prefix}{inside}up_proj.{kind}")
    names = tuple(f"{prefix}{inside}{part}_proj.{kind}" for part in ("gate", "up"))
    return Parts(names, partial(Tensor.chunk, chunks=2), lambda *parts: torch.cat(parts))


def is_gated(flags: Flags) -> bool:
    """Whether the MLP is gated."""
    return bool(flags["swiglu"] or flags.get("geglu"))


def attention_heads(block: str, flags: Flags) -> int:
    """Attention heads of the decoder or the neighbor encoder."""
    own = flags.get("retro_encoder_num_attention_heads") if block != "decoder" else None
    return int(own or flags["num_attention_heads"])


def query_groups(block: str, flags: Flags) -> int:
    """Key and value heads of the decoder or the neighbor encoder."""
    own = flags.get("retro_encoder_num_attention_heads") if block != "decoder" else None
    return int(own or flags.get("num_query_groups") or flags["num_attention_heads"])


def _whole(name: str) -> Parts:
    return Parts((name,), lambda tensor: (tensor,), lambda tensor: tensor)


def cut_qkv(merged: Tensor, groups: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `merge_qkv`; `heads` are those of a group."""
    rows = merged.unflatten(0, (groups, heads + 2, -1))
    query, key, value = rows[:, :heads], rows[:, heads], rows[:, heads + 1]
    return query.flatten(0, 2), key.flatten(0, 1), value.flatten(0, 1)


def _cut_kv(merged: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    rows = merged.unflatten(0, (groups, 2, -1))
    return rows[:, 0].flatten(0, 1), rows[:, 1].flatten(0, 1)


def _merge_kv(key: Tensor, value: Tensor, groups: int) -> Tensor:
    pair = (key.unflatten(0, (groups, -1)), value.unflatten(0, (groups, -1)))
    return torch.stack(pair, 1).flatten(0, 2)


def to_retro_huggingface(weights: Weights, flags: Flags) -> dict[str, Weight]:
    """Our weights as `RetroForCausalLM` names them, still unread."""
    named: dict[str, Weight] = {}
    for name, weight in weights.items():
        named.update(cut_weight(weight, parts_of(name, flags)))
    return named


def cut_weight(weight: Weight, parts: Parts) -> Iterator[tuple[str, Weight]]:
    """The parts of a weight, by name; read one after another, they read it once."""
    meta = parts.cut(torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
    read = _ReadOnce(weight, len(parts.names))
    for place, (name, shape) in enumerate(zip(parts.names, meta, strict=True)):
        yield name, Weight(tuple(shape.shape), weight.dtype, partial(_part, read, parts, place))


class _ReadOnce:
    """A weight that is kept from its first reading to its last."""

    def __init__(self, weight: Weight, readings: int) -> None:
        self._weight, self._readings = weight, readings
        self._left = 0
        self._tensor: Tensor | None = None

    def load(self) -> Tensor:
        if self._tensor is None:
            self._tensor, self._left = self._weight.load(), self._readings
        tensor, self._left = self._tensor, self._left - 1
        if self._left == 0:
            self._tensor = None
        return tensor


def _part(read: _ReadOnce, parts: Parts, place: int) -> Tensor:
    return parts.cut(read.load())[place].contiguous()


def parameter_names(flags: Flags) -> Iterator[str]:
    """The names of all our weights of a model.

    Args:
        flags: Its options, with `retro_final_layernorm` if an origin decides it.
    """
    yield "embedding.word_embeddings.weight"
    if flags["position_embedding_type"] == "learned_absolute":
        yield "embedding.position_embeddings.weight"
    retro = cross_layers(flags)
    routed = expert_layers(
        flags.get("num_experts"), flags.get("moe_layer_freq"), flags["num_layers"]
    )
    for layer in range(flags["num_layers"]):
        prefix, experts = f"decoder.layers.{layer}.", layer + 1 in routed
        yield from _layer_names(prefix, flags, layer + 1 in retro, experts)
    if flags.get("retro_final_layernorm", True):
        yield from _norm_names("decoder.final_layernorm", flags)
    if flags["untie_embeddings_and_output_weights"]:
        yield "output_layer.weight"
    if not retro:
        return
    width = flags.get("retro_encoder_hidden_size")
    if width and width != flags["hidden_size"]:
        yield "neighbor_encoder.input_projection.weight"
    plain = {**flags, "sublayer_norms": "pre"}
    for layer in range(flags["retro_encoder_num_layers"]):
        yield from _layer_names(f"neighbor_encoder.layers.{layer}.", plain, layer == 0)


def cross_layers(flags: Mapping) -> list[int]:
    """The decoder layers with cross-attention, counted from 1."""
    if flags["no_retrieval"]:
        return []
    layers: int = flags["num_layers"]
    usual = range(6 if layers <= 15 else 9, layers + 1, 3)
    return list(flags.get("retro_decoder_layers") or usual)


def _layer_names(prefix: str, flags: Flags, crosses: bool, experts: bool = False) -> Iterator[str]:
    for norm in _norms(flags, crosses):
        yield from _norm_names(prefix + norm, flags)
    if flags["qk_layernorm"]:
        for part in "qk":
            yield from _norm_names(f"{prefix}self_attention.{part}_layernorm", flags)
    linear = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    linear += [f"cross_attention.linear_{part}" for part in ("q", "kv", "proj")] if crosses else []
    linear += [] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    for name in linear:
        yield f"{prefix}{name}.weight"
        biased = not flags["disable_bias_linear"]
        if biased or (name.endswith("linear_qkv") and flags["add_qkv_bias"]):
            yield f"{prefix}{name}.bias"
    if experts:
        yield from _expert_names(f"{prefix}mlp.", flags)


def _norms(flags: Flags, crosses: bool) -> Iterator[str]:
    if flags.get("retro_deepnorm"):
        attention, cross, mlp = _DEEPNORMS
        yield from (attention, cross, mlp) if crosses else (attention, mlp)
        return
    place = flags.get("sublayer_norms") or "pre"
    attention, cross, mlp = _NORMS
    yield from (attention, mlp) if place != "post" else ()
    yield from (cross,) if crosses else ()
    yield from _POST_NORMS if place != "pre" else ()


def _expert_names(prefix: str, flags: Flags) -> Iterator[str]:
    """Weights of a layer with experts, which have no biases."""
    yield f"{prefix}router.weight"
    modules = [f"experts.local_experts.{number}" for number in range(flags["num_experts"])]
    if flags.get("moe_shared_expert_intermediate_size"):
        modules.append("shared_experts")
    for module in modules:
        yield from (f"{prefix}{module}.linear_fc{number}.weight" for number in (1, 2))
    if len(modules) > flags["num_experts"] and flags.get("moe_shared_expert_gate"):
        yield f"{prefix}shared_experts.gate_weight"


def _norm_names(name: str, flags: Flags) -> Iterator[str]:
    yield f"{name}.weight"
    if flags["normalization"] == "LayerNorm":
        yield f"{name}.bias"
