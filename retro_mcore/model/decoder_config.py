"""Configuration of the decoder without retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from retro_mcore.errors import ConfigurationError, raise_problems
from retro_mcore.model.family_options import FamilyOptions, problems_of_family


@dataclass
class DecoderConfig(FamilyOptions, TransformerConfig):
    """Megatron's TransformerConfig with the options in which families differ.

    Raises:
        ConfigurationError: a value cannot work; the message names the field.
    """

    def __post_init__(self) -> None:
        """Validate, after Megatron's own checks."""
        super().__post_init__()
        raise_problems(
            [
                *problems_of_family(self, self.num_layers),
                *_problems_of_window(self),
                *_problems_of_offloading(self),
            ]
        )
        if self.num_moe_experts is not None and self.add_bias_linear:
            raise ConfigurationError(
                "add_bias_linear",
                "True, in a model with experts, which do not train with biases",
                "Set it to False",
            )
        if self.num_moe_experts is not None and self.parallel_residual:
            raise ConfigurationError(
                "parallel_residual", "True, in a model with experts", "Choose one of them"
            )


def _problems_of_window(config: TransformerConfig) -> Iterator[ConfigurationError]:
    size, layers = config.window_size, config.window_attn_skip_freq
    if size is not None and (len(size) != 2 or size[0] < -1 or size[1] != 0):
        yield ConfigurationError(
            "window_size", f"{size}", "Give (tokens before a position, 0): the decoder is causal"
        )
    if layers is None:
        return
    if size is None:
        yield ConfigurationError(
            "window_attn_skip_freq", f"{layers} without a window", "Give the window's size too"
        )
    if isinstance(layers, int):
        fits, expected = layers > 1, "an interval from 2: every so many layers have no window"
    else:
        fits = len(layers) == config.num_layers and set(layers) <= {0, 1} and 1 in layers
        expected = f"{config.num_layers} of 0 and 1, one for each layer, and 1 for a window"
    if not fits:
        yield ConfigurationError("window_attn_skip_freq", f"{layers}", f"Give {expected}")


def _problems_of_offloading(config: TransformerConfig) -> Iterator[ConfigurationError]:
    layers = config.cpu_offloading_num_layers
    if not 0 <= layers < config.num_layers:
        yield ConfigurationError(
            "cpu_offloading_num_layers",
            f"{layers} of {config.num_layers} layers",
            "The last layer's activations are needed at once: choose fewer layers",
        )
    if layers and config.pipeline_model_parallel_size > 1:
        yield ConfigurationError(
            "cpu_offloading_num_layers",
            f"{layers} with pipeline_model_parallel_size {config.pipeline_model_parallel_size}",
            "Choose one of them",
        )
    if layers and config.recompute_granularity:
        yield ConfigurationError(
            "cpu_offloading_num_layers",
            f"{layers} with recompute_granularity {config.recompute_granularity}",
            "Choose one of them",
        )
