"""Options in which families of GPTs differ, beyond those that Megatron-Core's layers have.

Each is computed by our own layers (`family_layers`), so no other implementation can take a model
that needs it. Their defaults are the plain decoder. This module imports neither torch nor megatron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from retro_mcore.errors import ConfigurationError
from retro_mcore.model.option_traits import at_least, between, ours


def _is_off(value: Any, flags: Mapping[str, Any]) -> bool:
    return not value


def _is_one(value: Any, flags: Mapping[str, Any]) -> bool:
    return value is None or value == 1


def _is_plain_norm(value: Any, flags: Mapping[str, Any]) -> bool:
    return value in (None, "pre", "head")


def _of_family(neutral: Any, absent: Any, sets: str | None = "config") -> dict[str, Any]:
    return ours(neutral, sets=sets, gpt="same", absent=absent)


_POSITIVE = between(1e-9, math.inf)


@dataclass(kw_only=True)
class FamilyOptions:
    """What sets a family's decoder apart. The neighbor encoder has none of it."""

    sublayer_norms: Literal["pre", "post", "both"] = field(
        default="pre", metadata=_of_family(_is_plain_norm, "pre")
    )
    """Place of the norms of attention and MLP: before (pre), on the output before it is added
    (post, as OLMo 2), or both (Gemma 2)."""
    qk_layernorm_over: Literal["head", "all_heads"] = field(
        default="head", metadata=_of_family(_is_plain_norm, "head")
    )
    """What --qk-layernorm normalizes: each head, or all heads together (OLMo 2)."""
    parallel_residual: bool = field(default=False, metadata=_of_family(_is_off, False))
    """Let the MLP read the layer's input instead of the attention's output (GPT-NeoX)."""
    embedding_multiplier: float = field(default=1.0, metadata=_POSITIVE | _of_family(_is_one, 1.0))
    """Factor on the embedded tokens (Gemma, Granite)."""
    residual_multiplier: float = field(default=1.0, metadata=_POSITIVE | _of_family(_is_one, 1.0))
    """Factor on the outputs of attention and MLP before they are added (Granite)."""
    logits_scaling: float = field(default=1.0, metadata=_POSITIVE | _of_family(_is_one, 1.0))
    """Divisor of the logits (Granite)."""
    softmax_scale: float | None = field(
        default=None, metadata=_POSITIVE | _of_family(_is_off, None)
    )
    """Scale of the attention scores. Default: 1 / the square root of a head's width."""
    attention_softcap: float | None = field(
        default=None, metadata=_POSITIVE | _of_family(_is_off, None)
    )
    """Limit c of the attention scores s: c * tanh(s / c) (Gemma 2)."""
    logit_softcap: float | None = field(
        default=None, metadata=_POSITIVE | _of_family(_is_off, None)
    )
    """The same limit of the logits (Gemma 2)."""
    no_rope_layers: list[int] | None = field(default=None, metadata=_of_family(_is_off, None))
    """Decoder layers without rotary positions, from 1 (SmolLM3)."""
    rotary_frequencies: list[float] | None = field(default=None, metadata=_of_family(_is_off, None))
    """Angles per position of each rotated pair of channels, instead of those that --rotary-base
    gives (YaRN, LongRoPE). In the neighbor encoder as --use-rope-scaling."""
    rotary_attention_factor: float = field(
        default=1.0, metadata=_POSITIVE | _of_family(_is_one, 1.0)
    )
    """Factor on rotated queries and keys (YaRN, LongRoPE)."""
    rotary_local_base: int | None = field(
        default=None, metadata=at_least(1) | _of_family(_is_off, None)
    )
    """Base period of the rotary embedding in --rotary-local-layers, without scaling (Gemma 3)."""
    rotary_local_layers: list[int] | None = field(default=None, metadata=_of_family(_is_off, None))
    """Decoder layers that use --rotary-local-base, from 1."""


_DEFAULTS = {each.name: each.default for each in fields(FamilyOptions)}


def family_option(config: Any, name: str) -> Any:
    """An option of a configuration; its default if that is Megatron's own."""
    return getattr(config, name, _DEFAULTS[name])


def plain_options() -> dict[str, Any]:
    """The options of a plain decoder."""
    return dict(_DEFAULTS)


def problems_of_family(options: Any, num_layers: int) -> Iterator[ConfigurationError]:
    """An error for every option that cannot work, naming the field.

    Args:
        options: An object that holds them.
        num_layers: Number of decoder layers.
    """
    for name in ("no_rope_layers", "rotary_local_layers"):
        layers = getattr(options, name)
        if layers and not set(layers) <= set(range(1, num_layers + 1)):
            yield ConfigurationError(
                name, f"{layers} in a model of {num_layers} layers", "Give numbers from 1"
            )
    if (options.rotary_local_base is None) != (not options.rotary_local_layers):
        yield ConfigurationError(
            "rotary_local_base",
            f"{options.rotary_local_base} for layers {options.rotary_local_layers}",
            "Give rotary_local_base and rotary_local_layers together",
        )
    if options.rotary_attention_factor != 1.0 and options.rotary_frequencies is None:
        yield ConfigurationError(
            "rotary_attention_factor",
            f"{options.rotary_attention_factor}",
            "Add rotary_frequencies",
        )
    if options.parallel_residual and options.sublayer_norms != "pre":
        yield ConfigurationError(
            "parallel_residual",
            f"given together with sublayer_norms {options.sublayer_norms}",
            "Choose one",
        )
    if options.qk_layernorm_over != "head" and not options.qk_layernorm:
        yield ConfigurationError(
            "qk_layernorm_over", f"{options.qk_layernorm_over}", "Add qk_layernorm"
        )
