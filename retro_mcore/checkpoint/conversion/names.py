"""Name tables: from the names of other checkpoints to ours, and back.

Ours are those of an unsharded RetroModel or DecoderModel with local layers. Others' differ in where
Transformer Engine keeps norms, in where the retired Retro keeps its encoder, and, before
Megatron-Core, in everything.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_PROJECTION = re.compile(r"(cross_attention\.)(linear_(?:q|kv|proj)\.)")
_UPSTREAM_PROJECTION = re.compile(r"(cross_attention\.)attn\.(linear_(?:q|kv|proj)\.)")
_ENCODER_NORM = "neighbor_encoder.layers.0.pre_mlp_layernorm."
_FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}

#: Experts in a checkpoint of Megatron's, along the first dimension of one tensor.
STACKED_EXPERTS = ".mlp.experts.experts."
_LOCAL_EXPERTS = ".mlp.experts.local_experts."
_EXPERT = re.compile(r"^(.*\.mlp\.experts\.)local_experts\.(\d+)\.(.*)$")


def expert_name(stacked: str, expert: int) -> str:
    """Our name of one expert's weight, from that of all of them.

    >>> expert_name("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", 3)
    'decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight'
    """
    return stacked.replace(STACKED_EXPERTS, f"{_LOCAL_EXPERTS}{expert}.")


def split_expert_name(name: str) -> tuple[str, int] | None:
    """The inverse of `expert_name`; None for other weights."""
    match = _EXPERT.match(name)
    return match and (f"{match[1]}experts.{match[3]}", int(match[2]))


def shift_expert(name: str, first: int) -> str:
    """Our name of an expert's weight, from that on a rank whose first expert is `first`."""
    match = _EXPERT.match(name)
    if match is None or not first:
        return name
    return f"{match[1]}local_experts.{int(match[2]) + first}.{match[3]}"


def local_name(name: str) -> str:
    """Transformer Engine's name of a norm that is fused into a linear layer, as a local layer's.

    >>> local_name("decoder.layers.0.mlp.linear_fc1.layer_norm_weight")
    'decoder.layers.0.pre_mlp_layernorm.weight'
    """
    for fused, local in _FUSED.items():
        name = name.replace(fused, local)
    return name


def fused_name(name: str) -> str:
    """A local layer's norm as Transformer Engine, and every torch_dist checkpoint, names it."""
    for fused, local in _FUSED.items():
        name = re.sub(rf"(layers\.(?:\d+\.)?){re.escape(local)}", rf"\g<1>{fused}", name)
    return name


def upstream_encoder(first_retro_layer: int) -> str:
    """Prefix of the retired Retro's encoder, inside the attention of its first Retro layer."""
    return f"decoder.layers.{first_retro_layer - 1}.cross_attention.encoder."


def to_upstream_name(name: str, first_retro_layer: int) -> str:
    """Our parameter name to the retired Retro's.

    Args:
        name: As in `RetroModel.state_dict()`.
        first_retro_layer: The layer that holds upstream's encoder, 1-based.
    """
    if local_name(name).startswith(_ENCODER_NORM):  # never fused there
        name = local_name(name).replace("pre_mlp_layernorm.", "pre_mlp_layernorm.norm.", 1)
    name = _PROJECTION.sub(r"\1attn.\2", name)
    return name.replace("neighbor_encoder.", upstream_encoder(first_retro_layer), 1)


def from_upstream_name(name: str, first_retro_layer: int) -> str:
    """The retired Retro's parameter name to ours; the inverse of `to_upstream_name`."""
    name = name.replace(upstream_encoder(first_retro_layer), "neighbor_encoder.", 1)
    name = _UPSTREAM_PROJECTION.sub(r"\1\2", name)
    if name.startswith(_ENCODER_NORM):
        name = name.replace("pre_mlp_layernorm.norm.", "pre_mlp_layernorm.", 1)
    return name


# Megatron-LM before Megatron-Core, and the InstructRetro branch. A layer's norms come in the order
# of its sublayers, so the second one is the MLP's, or the cross-attention's where there is one.
_LEGACY = {
    "embedding.word_embeddings.": "embedding.word_embeddings.",
    "embedding.position_embeddings.": "embedding.position_embeddings.",
    "encoder.layers.": "decoder.layers.",
    "encoder.final_norm.": "decoder.final_layernorm.",
    "output_layer.": "output_layer.",
}
_LEGACY_LAYER = {
    "input_norm.": "input_layernorm.",
    "self_attention.query_key_value.": "self_attention.linear_qkv.",
    "self_attention.dense.": "self_attention.linear_proj.",
    "inter_attention.query.": "cross_attention.linear_q.",
    "inter_attention.key_value.": "cross_attention.linear_kv.",
    "inter_attention.dense.": "cross_attention.linear_proj.",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
}
_SECOND_NORM, _THIRD_NORM = "post_attention_norm.", "post_inter_attention_norm."
_LAYER = re.compile(r"^(decoder|neighbor_encoder)\.layers\.(\d+)\.(.*)$")


def from_legacy_name(name: str, cross_layers: Collection[str]) -> str:
    """The InstructRetro branch's (or an older GPT's) parameter name to ours.

    Args:
        name: Joined with dots below `language_model`: `encoder.layers.0.input_norm.weight`.
        cross_layers: Our prefixes (`decoder.layers.5`) of the layers that have cross-attention.
    """
    name = name.replace("layernorm.", "norm.").replace(".attention.", ".self_attention.")
    name = re.sub(r"^transformer\.", "encoder.", name)
    name = re.sub(r"^encoder\.layers\.\d+\.retriever\.", "neighbor_encoder.", name)
    for old, new in _LEGACY.items():
        if name.startswith(old):
            name = new + name[len(old) :]
    match = _LAYER.match(name)
    if match is None:
        return name
    block, number, rest = match.groups()
    prefix = f"{block}.layers.{number}"
    second = "pre_cross_attn_layernorm." if prefix in cross_layers else "pre_mlp_layernorm."
    norms = {_SECOND_NORM: second, _THIRD_NORM: "pre_mlp_layernorm."}
    for old, new in {**_LEGACY_LAYER, **norms}.items():
        if rest.startswith(old):
            return f"{prefix}.{new}{rest[len(old) :]}"
    return name


def legacy_cross_layers(names: Collection[str]) -> set[str]:
    """`cross_layers` for `from_legacy_name`, from all names of a checkpoint."""
    found = {name for name in names if "inter_attention." in name}
    ours = {re.sub(r"^(?:encoder|transformer)\.layers\.\d+\.retriever\.", "neighbor_encoder.", name)
            for name in found}  # fmt: skip
    return {
        re.sub(r"^(?:encoder|transformer)\.", "decoder.", name).split(".inter_attention.")[0]
        for name in ours
    }


def to_legacy_name(name: str, first_retro_layer: int, cross_layers: Collection[str]) -> str:
    """Our parameter name to the InstructRetro branch's; the inverse of `from_legacy_name`."""
    match = _LAYER.match(name)
    if match is None:
        for old, new in _LEGACY.items():
            if name.startswith(new):
                return old + name[len(new) :]
        return name
    block, number, rest = match.groups()
    has_cross = f"{block}.layers.{number}" in cross_layers
    mlp_norm = _THIRD_NORM if has_cross else _SECOND_NORM
    norms = {_SECOND_NORM: "pre_cross_attn_layernorm.", mlp_norm: "pre_mlp_layernorm."}
    for old, new in {**_LEGACY_LAYER, **norms}.items():
        if rest.startswith(new):
            rest = old + rest[len(new) :]
            break
    inside = f"{first_retro_layer - 1}.retriever.layers." if block == "neighbor_encoder" else ""
    return f"encoder.layers.{inside}{number}.{rest}"
