"""Train only part of the model: only retrieval, or everything except retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retro_mcore.errors import ConfigurationError
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.training.setup.plan import TrainingPlan

# Trained with --freeze-decoder: the encoder, cross-attention and the norm before it.
_RETRIEVAL_PARTS = (
    "neighbor_encoder.",
    ".cross_attention.",
    ".pre_cross_attn_layernorm.",
    ".cross_attn_bda.",  # DeepNorm's norm
)


def freeze_decoder(models: Sequence[DecoderModel], plan: TrainingPlan) -> None:
    """Freeze everything except the neighbor encoder, the cross-attentions and their norms.

    Raises:
        ConfigurationError: the model has no retrieval.
    """
    if plan.arguments.no_retrieval:
        raise ConfigurationError(
            "--freeze-decoder", "given together with --no-retrieval", "Choose one"
        )
    pipeline = plan.options.pipeline_model_parallel_size > 1
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in f".{name}" for part in _RETRIEVAL_PARTS))
        if pipeline:
            _keep_something_to_train(model)
        # Backward passes of stages and recomputed layers begin and end with hidden states. These
        # must require gradients although no weight before them does.
        if model.pre_process and (pipeline or plan.options.recompute_granularity == "full"):
            model.embedding.register_forward_hook(_ask_for_gradients)


def freeze_retrieval(models: Sequence[DecoderModel]) -> None:
    """Freeze the neighbor encoder, the cross-attentions and their norms."""
    for model in models:
        for name, parameter in model.named_parameters():
            if any(part in f".{name}" for part in _RETRIEVAL_PARTS):
                parameter.requires_grad_(False)


def _keep_something_to_train(model: DecoderModel) -> None:
    """Keep one norm of every layer in the optimizer, with zero gradients so that it does not
    change.

    Megatron's optimizers and their checkpoints need a trainable parameter on every stage.
    """
    for layer in model.decoder.layers:
        vectors = (parameter for parameter in layer.parameters() if parameter.dim() == 1)
        norm = next(parameter for parameter in vectors if not parameter.requires_grad)
        norm.requires_grad_(True)
        norm.register_hook(torch.zeros_like)


def _ask_for_gradients(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()
