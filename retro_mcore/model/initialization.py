"""Initial weights, learning rates and the output's scale under DeepNorm and muP.

DeepNorm: Wang et al. 2022, figure 2 and its table. muP: Yang et al. 2022, "Tensor Programs V",
tables 3 and 8, for Adam. Both concern the weights of the hidden layers, whose two sides grow with
the model; embeddings, norms, biases and the output layer keep their ordinary initial values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from retro_mcore.model.config import RetroConfig

#: Set on the parameters whose learning rate muP divides; see `learning_rate_scale`.
SCALED_LEARNING_RATE = "mup_scaled_learning_rate"

_OUTPUT_PROJECTIONS = ("linear_proj", "linear_fc2")


def initialize_hidden_weights(model: MegatronModule) -> None:
    """Give the hidden layers' weights the standard deviations of DeepNorm or muP, and mark those
    whose learning rate muP scales. Once, after construction: they are normal by then, with the
    configuration's `init_method_std`."""
    if not (model.config.retro_deepnorm or model.config.retro_mup_base_hidden_size):
        return
    for layers in (model.decoder, model.neighbor_encoder):
        if layers is None:
            continue
        for name, weight in _hidden_weights(layers):
            if layers.config.retro_mup_base_hidden_size is not None:
                setattr(weight, SCALED_LEARNING_RATE, True)
            for part, deviation in _deviations(name, weight, layers.config, model.config):
                with torch.no_grad():
                    part.mul_(deviation / layers.config.init_method_std)


def learning_rate_scale(config: Any) -> float:
    """Factor on the learning rate of the parameters marked `SCALED_LEARNING_RATE`, under Adam.

    It is 1 without muP.
    """
    return 1.0 / config.mup_width if isinstance(config, RetroConfig) else 1.0


def scale_output_layer(model: Any) -> None:
    """Divide what enters the output layer by muP's width (table 8: also right for tied weights)."""
    width = model.config.mup_width

    def scale(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0] / width, *args[1:]), kwargs
        return args, {**kwargs, "input_": kwargs["input_"] / width}

    if width != 1.0:
        model.output_layer.register_forward_pre_hook(scale, with_kwargs=True)


def _hidden_weights(layers: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in layers.named_parameters():
        is_linear = "linear_" in name or "input_projection" in name
        if is_linear and name.endswith(".weight") and weight.dim() == 2:
            yield name.removesuffix(".weight"), weight


def _deviations(
    name: str, weight: Tensor, config: RetroConfig, decoder: RetroConfig
) -> Iterator[tuple[Tensor, float]]:
    """The parts of a weight, each with its initial standard deviation."""
    if config.retro_deepnorm:
        yield from _deepnorm_deviations(name, weight, config)
        return
    deviation = config.init_method_std / config.mup_width**0.5
    if name.endswith(_OUTPUT_PROJECTIONS):  # as megatron's, in the encoder too
        deviation /= (2.0 * decoder.num_layers) ** 0.5
    yield weight, deviation


def _deepnorm_deviations(
    name: str, weight: Tensor, config: RetroConfig
) -> Iterator[tuple[Tensor, float]]:
    """Xavier's, times beta for values, output projections and the MLP."""
    fan_in = weight.size(1) * _ranks_over(weight, 1, config)
    channels, heads = config.kv_channels, config.num_attention_heads
    grouped = channels * config.num_query_groups

    def deviation(fan_out: int, gain: float) -> float:
        return gain * (2.0 / (fan_in + fan_out)) ** 0.5

    beta = config.deepnorm_beta
    if name.endswith("linear_q"):
        yield weight, deviation(channels * heads, 1.0)
    elif name.endswith(("linear_qkv", "linear_kv")):
        # Rows: per group its queries (if any), a key, a value.
        per_group = 2 if name.endswith("_kv") else heads // config.num_query_groups + 2
        rows = weight.unflatten(0, (-1, per_group, channels))
        yield rows[:, :-2], deviation(channels * heads, 1.0)
        yield rows[:, -2], deviation(grouped, 1.0)
        yield rows[:, -1], deviation(grouped, beta)
    elif name.endswith("linear_fc1"):
        yield weight, deviation(config.ffn_hidden_size, beta)
    elif name.endswith("input_projection"):
        yield weight, deviation(config.hidden_size, 1.0)
    else:
        yield weight, deviation(config.hidden_size, beta)


def _ranks_over(weight: Tensor, dimension: int, config: RetroConfig) -> int:
    # Megatron sets these attributes on split weights only.
    split = getattr(weight, "tensor_model_parallel", False)
    if split and getattr(weight, "partition_dim", None) == dimension:
        return config.tensor_model_parallel_size
    return 1
