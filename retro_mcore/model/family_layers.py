"""Modules for the options of `FamilyOptions`: norms, residuals, multipliers, rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from retro_mcore.errors import ConfigurationError
from retro_mcore.model.family_options import family_option
from retro_mcore.model.pipeline import RetroTransformerLayer
from retro_mcore.platform.parallel_residual import ParallelResidual


class SublayerAdd(MegatronModule):
    """Add a sublayer's output to the stream: normalized, then multiplied, then with dropout.

    Args:
        config: The block's configuration; gives `residual_multiplier`.
        norm: Class of the norm; None: no norm.
    """

    def __init__(self, config: TransformerConfig, norm: type | None = None, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.multiplier = family_option(config, "residual_multiplier")
        self.norm: torch.nn.Module | None = None
        if norm is not None:
            self.norm = norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        #: What to add to, instead of the residual that the layer passes (`ParallelResidual`).
        self.stream: Tensor | None = None

    def forward(self, training: bool, fused: bool) -> Callable[[Any, Tensor, float], Tensor]:
        """A function of (output and bias, residual, dropout probability)."""
        bias_dropout_add = get_bias_dropout_add(training, fused)

        def add(output_and_bias: Any, residual: Tensor, probability: float) -> Tensor:
            output, bias = output_and_bias
            stream = residual if self.stream is None else self.stream
            # Megatron calls this with gradients on, also where the model runs without.
            with torch.set_grad_enabled(output.requires_grad or stream.requires_grad):
                if self.norm is not None or self.multiplier != 1.0:
                    output, bias = self._transformed(output, bias), None
                return bias_dropout_add((output, bias), stream, probability)

        return add

    def _transformed(self, output: Tensor, bias: Tensor | None) -> Tensor:
        output = output if bias is None else output + bias
        output = output if self.norm is None else self.norm(output)
        return output if self.multiplier == 1.0 else output * self.multiplier


class ParallelResidualLayer(ParallelResidual, RetroTransformerLayer):
    """A layer with `parallel_residual`, which may end a stage."""


class AllHeadsNorm(MegatronModule):
    """RMSNorm over all heads of queries together, on all tensor parallel ranks.

    Every rank holds the whole gain and uses its heads' part. Megatron sums the gradients of norms
    of queries and keys over these ranks (by their names), which makes them whole.

    Args:
        config: Gives `normalization`, `layernorm_zero_centered_gamma` and the sizes.
        eps: Added to the mean square.

    Raises:
        ConfigurationError: a LayerNorm, which is not implemented.
    """

    heads = "num_attention_heads"

    def __init__(self, config: TransformerConfig, eps: float, **kwargs: Any) -> None:
        super().__init__(config=config)
        if config.normalization != "RMSNorm":
            raise ConfigurationError(
                "qk_layernorm_over", f"all_heads with {config.normalization}", "Use RMSNorm"
            )
        self.eps = eps
        self.width = getattr(config, self.heads) * config.kv_channels
        self.zero_centered = config.layernorm_zero_centered_gamma
        gain = torch.full((self.width,), 0.0 if self.zero_centered else 1.0)
        self.weight = torch.nn.Parameter(gain.to(config.params_dtype))

    def forward(self, states: Tensor) -> Tensor:
        """Normalize `[S, B, heads of this rank, C]` over the last two dimensions of all ranks."""
        wide = states.flatten(2).float()
        squares = wide.square().sum(-1, keepdim=True)
        # The sum over ranks, and in the backward pass the sum of what each rank's heads make of it.
        squares = reduce_from_tensor_model_parallel_region(squares)
        squares = copy_to_tensor_model_parallel_region(squares)
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        return (normed * self._gain(wide.size(-1))).to(states.dtype).view_as(states)

    def _gain(self, width: int) -> Tensor:
        first = parallel_state.get_tensor_model_parallel_rank() * width
        gain = self.weight[first : first + width].float()
        return gain + 1.0 if self.zero_centered else gain


class AllGroupsNorm(AllHeadsNorm):
    """The same norm over all keys, of which there is one for each query group."""

    heads = "num_query_groups"


def local_rotary(config: TransformerConfig, layer_number: int, group: Any) -> Any:
    """The rotary embedding of a layer in `rotary_local_layers`; None for the others.

    Args:
        config: The decoder's configuration.
        layer_number: The layer's number, from 1.
        group: Context parallel group.
    """
    if layer_number not in (family_option(config, "rotary_local_layers") or ()):
        return None
    return RotaryEmbedding(
        config.kv_channels,
        rotary_percent=1.0,
        rotary_interleaved=config.rotary_interleaved,
        rotary_base=config.rotary_local_base,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=group,
    )


def set_frequencies(rotary: RotaryEmbedding, config: TransformerConfig) -> None:
    """Give the decoder's rotary embedding the frequencies of `rotary_frequencies`.

    Raises:
        ConfigurationError: they are not one for each rotated pair of channels.
    """
    frequencies = family_option(config, "rotary_frequencies")
    if frequencies is None:
        return
    if len(frequencies) != rotary.inv_freq.numel():
        raise ConfigurationError(
            "rotary_frequencies",
            f"{len(frequencies)} for {rotary.inv_freq.numel()} rotated pairs of channels",
            "Give one for each",
        )
    rotary.inv_freq = torch.tensor(
        frequencies, dtype=rotary.inv_freq.dtype, device=rotary.inv_freq.device
    )


def scale_embedding(embedding: LanguageModelEmbedding, config: TransformerConfig) -> None:
    """Multiply word embeddings by `embedding_multiplier`."""
    multiplier = family_option(config, "embedding_multiplier")
    if multiplier != 1.0:
        embedding.word_embeddings.register_forward_hook(_multiply_by(multiplier))


def resampled_frequencies(frequencies: Tensor, pairs: int) -> Tensor:
    """Frequencies of another number of pairs of channels, each at its share of the channels.

    Between two given ones their logarithms are interpolated, so plain frequencies stay plain.

    Args:
        frequencies: Angles per position, the largest first.
        pairs: Number of pairs wanted.
    """
    logs = frequencies.double().log()
    places = torch.arange(pairs, dtype=torch.float64, device=logs.device) * (len(logs) / pairs)
    first = places.long().clamp(max=max(len(logs) - 2, 0))
    second = (first + 1).clamp(max=len(logs) - 1)
    return torch.lerp(logs[first], logs[second], places - first).exp().to(frequencies.dtype)


def _multiply_by(multiplier: float) -> Callable[..., Tensor]:
    def multiply(_: Any, args: Any, output: Tensor) -> Tensor:
        # In the output's precision, as transformers rounds it.
        return output * torch.tensor(multiplier, dtype=output.dtype, device=output.device)

    return multiply


def scale_logits(output_layer: torch.nn.Module, config: TransformerConfig) -> None:
    """Divide an output layer's logits by `logits_scaling`, then limit them to `logit_softcap`."""
    scaling = family_option(config, "logits_scaling")
    cap = family_option(config, "logit_softcap")

    def scale(_: Any, args: Any, output: Any) -> Any:
        logits, bias = output
        logits = logits if scaling == 1.0 else logits / scaling
        return (logits if cap is None else torch.tanh(logits / cap) * cap), bias

    if scaling != 1.0 or cap is not None:
        output_layer.register_forward_hook(scale)
