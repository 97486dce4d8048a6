"""Weights of the retired Megatron-Core Retro, in and out of a model.

The two differ in names only: upstream keeps the encoder inside its first Retro layer's attention,
and wraps the projections of its cross-attentions in a module of their own. For checkpoints on disk
see `retro_mcore.checkpoint.conversion.formats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from retro_mcore.checkpoint.conversion.model_weights import gather_weights, put_weights
from retro_mcore.checkpoint.conversion.names import from_upstream_name, local_name, to_upstream_name
from retro_mcore.checkpoint.conversion.weights import Weight
from retro_mcore.model.model import RetroModel

__all__ = ["export_state_dict", "from_upstream_name", "load_state_dict", "to_upstream_name"]


def load_state_dict(
    model: RetroModel | Sequence[RetroModel],
    upstream_state_dict: Mapping[str, Tensor | None],
    vocab_size: int | None = None,
) -> None:
    """Load the weights that `model.state_dict()` gave upstream, in one process.

    A model that is spread over tensor or pipeline parallel ranks takes its parts; all ranks call
    this together, with the whole state dict.

    Args:
        model: Built with a matching `RetroConfig.from_upstream(...)`; several stages with the
            interleaved schedule.
        upstream_state_dict: Upstream's names and shapes, of local or Transformer Engine layers.
            `_extra_state` entries carry no weights and are left out.
        vocab_size: The tokenizer's, if the two pad their vocabulary differently.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape; nothing is loaded.
    """
    models = _stages(model)
    first = models[0].config.retro_layer_numbers[0]
    weights = {
        local_name(from_upstream_name(name, first)): Weight.of(tensor)
        for name, tensor in upstream_state_dict.items()
        if isinstance(tensor, Tensor) and not name.endswith("_extra_state")
    }
    put_weights(
        models,
        weights,
        vocab_size,
        source="upstream state dict",
        hint="Build the model with RetroConfig.from_upstream and the checkpoint's own arguments",
        named=lambda name: to_upstream_name(name, first),
    )


def export_state_dict(model: RetroModel | Sequence[RetroModel]) -> dict[str, Tensor]:
    """The whole model's weights under upstream's names: detached copies, on the CPU.

    All ranks of a model that is spread over several call this together; each gets all weights.
    """
    models = _stages(model)
    first = models[0].config.retro_layer_numbers[0]
    whole = gather_weights(models)
    return {to_upstream_name(name, first): tensor for name, tensor in whole.items()}


def _stages(model: RetroModel | Sequence[RetroModel]) -> list[RetroModel]:
    return [model] if isinstance(model, RetroModel) else list(model)
