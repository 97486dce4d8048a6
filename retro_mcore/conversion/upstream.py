"""Weights of the retired Megatron-Core Retro, in and out.

The two differ in names only: upstream keeps the encoder inside its first Retro layer's attention,
and wraps the projections of its cross-attentions in a module of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from retro_mcore.errors import CheckpointError
from retro_mcore.model.model import RetroModel

_PROJECTION = re.compile(r"(cross_attention\.)(linear_(?:q|kv|proj)\.)")
_UPSTREAM_PROJECTION = re.compile(r"(cross_attention\.)attn\.(linear_(?:q|kv|proj)\.)")
_ENCODER_NORM = "neighbor_encoder.layers.0.pre_mlp_layernorm."


def to_upstream_name(name: str, first_retro_layer: int) -> str:
    """Our parameter name to upstream's.

    Args:
        name: As in `RetroModel.state_dict()`.
        first_retro_layer: The layer that holds upstream's encoder, 1-based.
    """
    if name.startswith(_ENCODER_NORM):
        name = name.replace("pre_mlp_layernorm.", "pre_mlp_layernorm.norm.", 1)
    name = _PROJECTION.sub(r"\1attn.\2", name)
    return name.replace("neighbor_encoder.", _upstream_encoder(first_retro_layer), 1)


def from_upstream_name(name: str, first_retro_layer: int) -> str:
    """Upstream's parameter name to ours; the inverse of `to_upstream_name`."""
    name = name.replace(_upstream_encoder(first_retro_layer), "neighbor_encoder.", 1)
    name = _UPSTREAM_PROJECTION.sub(r"\1\2", name)
    if name.startswith(_ENCODER_NORM):
        name = name.replace("pre_mlp_layernorm.norm.", "pre_mlp_layernorm.", 1)
    return name


def load_state_dict(model: RetroModel, upstream_state_dict: Mapping[str, Tensor | None]) -> None:
    """Load weights that upstream's `model.state_dict()` gave, on one tensor-parallel rank.

    Args:
        model: Built with a matching `RetroConfig.from_upstream(...)`.
        upstream_state_dict: Upstream's names and shapes. `_extra_state` entries carry no weights
            and are left out.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape; nothing is loaded.
    """
    first = model.config.retro_layer_numbers[0]
    weights = {
        from_upstream_name(name, first): tensor
        for name, tensor in upstream_state_dict.items()
        if isinstance(tensor, Tensor) and not name.endswith("_extra_state")
    }
    own = _weights(model)
    problems = [f"missing {to_upstream_name(name, first)}" for name in own.keys() - weights.keys()]
    problems += [f"unknown {to_upstream_name(name, first)}" for name in weights.keys() - own.keys()]
    problems += [
        f"{to_upstream_name(name, first)} is {tuple(weights[name].shape)}, "
        f"not {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(
            "upstream state dict",
            "; ".join(sorted(problems)),
            "Build the model with RetroConfig.from_upstream and the checkpoint's own arguments",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def export_state_dict(model: RetroModel) -> dict[str, Tensor]:
    """The model's weights under upstream's names, detached copies."""
    first = model.config.retro_layer_numbers[0]
    return {
        to_upstream_name(name, first): tensor.detach().clone()
        for name, tensor in _weights(model).items()
    }


def _weights(model: RetroModel) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _upstream_encoder(first_retro_layer: int) -> str:
    return f"decoder.layers.{first_retro_layer - 1}.cross_attention.encoder."
