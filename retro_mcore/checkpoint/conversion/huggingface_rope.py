"""Rotary embeddings of Hugging Face models, as transformers computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retro_mcore.checkpoint.conversion.huggingface_config import Config, shown
from retro_mcore.checkpoint.conversion.huggingface_families import Flags

# What Megatron's --use-rope-scaling has built in.
_LLAMA3_ROPE = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
_NESTED = ("full_attention", "sliding_attention")
_KNOWN = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor",
    "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor",
    "max_position_embeddings", "finetuned",
}  # fmt: skip


def rope_flags(config: Config, channels: int) -> Flags:
    """The flags of the rotary embedding.

    As in transformers 5, `rope_scaling` (its older name) counts before `rope_parameters`, and what
    these do not say is taken from the keys beside them.

    Args:
        config: The settings.
        channels: Width of a head.

    Raises:
        CheckpointError: a rotary embedding that our decoder does not compute.
    """
    if config.family in ("gemma3_text", "olmo3"):
        return _two_ropes(config, channels)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(key.endswith("_attention") for key in rope):
        raise config.refusal(f"rope_parameters {shown(rope)}", "those of one rotary embedding")
    return _one_rope(config, rope, config.get("rope_theta"), channels)


def _two_ropes(config: Config, channels: int) -> Flags:
    """A family whose layers with a sliding window have a rotary embedding of their own."""
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    plain = isinstance(parameters, dict) and isinstance(scaling, dict)
    if not plain or not parameters.keys() <= set(_NESTED):
        raise config.refusal(
            f"rope_parameters {shown(parameters)}", f"those of {' and '.join(_NESTED)}"
        )
    nested = [parameters.get(name) or {} for name in _NESTED]
    if not all(isinstance(each, dict) for each in nested):
        raise config.refusal(f"rope_parameters {shown(parameters)}", "two objects")
    full, local = {**nested[0], **scaling}, nested[1]
    flags = _one_rope(config, full, config.get("rope_theta"), channels)
    default = config.get("rope_local_base_freq") or config.default("rope_theta")
    own = _one_rope(config, local, default, channels)
    kind = local.get("rope_type", local.get("type", "default"))
    if kind != "default":  # their frequencies are those of rotary_local_base
        found = f"rope_parameters of sliding_attention: rotary embedding {kind!r}"
        raise config.refusal(found, "default")
    if own["rotary_frequencies"] is not None:
        found = f"rope_local_base_freq {default}"
        if "rope_theta" in local:
            found = f"rope_parameters of sliding_attention: rope_theta {local['rope_theta']}"
        raise config.refusal(found, "a whole number")
    return {**flags, "rotary_local_base": own["rotary_base"]}


_PLAIN: Flags = {
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
    "rotary_frequencies": None,
    "rotary_attention_factor": 1.0,
}


def _one_rope(config: Config, rope: Mapping[str, Any], base: Any, channels: int) -> Flags:
    unknown = {key for key, value in rope.items() if key not in _KNOWN and value is not None}
    if unknown:
        found = ", ".join(f"{shown(key)[1:-1]} {shown(rope[key])}" for key in sorted(unknown)[:4])
        raise config.refusal(f"rope_parameters with {found}", "a rotary embedding without them")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if config.family == "phi3" and kind in ("su", "yarn"):  # its older names
        kind = "longrope"
    base = config.checked_number("rope_theta", rope.get("rope_theta", base), 1, 2**53)
    percent = _rotary_percent(config, rope)
    flags: Flags = {"rotary_percent": percent, "rotary_base": round(base), **_PLAIN}
    compute = _KINDS.get(kind) if isinstance(kind, str) else None
    if compute is None:
        raise config.refusal(f"rotary embedding {kind!r}", " or ".join(_KINDS))
    periods = _periods(base, int(channels * percent))
    if base != int(base):  # Megatron's base is a whole number
        flags["rotary_frequencies"] = (1.0 / periods).tolist()
    return {**flags, **compute(config, rope, periods, base)}


def _rotary_percent(config: Config, rope: Mapping[str, Any]) -> float:
    found = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if not config.facts.partial_rotary:
        if found not in (None, 1):
            raise config.refusal(f"partial_rotary_factor {shown(found)}", "1")
        return 1.0
    percent = config.checked_number("partial_rotary_factor", found, 0, 1 + 1e-9)
    if percent == 0:
        raise config.refusal("partial_rotary_factor 0", "a share above 0")
    return float(percent)


def _periods(base: float, channels: int) -> Tensor:
    """Positions per unit of angle, without scaling."""
    return base ** (torch.arange(0, channels, 2, dtype=torch.int64).float() / max(1, channels))


def _factor(config: Config, rope: Mapping[str, Any], name: str = "factor") -> float:
    return float(config.checked_number(f"rope {name}", rope.get(name), 1e-9))


def _original(config: Config, rope: Mapping[str, Any]) -> int:
    """Length of the texts before the rotary embedding was stretched."""
    original = config.get("original_max_position_embeddings")
    if original is None:
        original = rope.get("original_max_position_embeddings")
    if original is None:
        original = config.get("max_position_embeddings")
    return int(config.checked_number("original_max_position_embeddings", original, 1))


def _default(config: Config, rope: Mapping[str, Any], periods: Tensor, base: float) -> Flags:
    return {}


def _linear(config: Config, rope: Mapping[str, Any], periods: Tensor, base: float) -> Flags:
    factor = config.checked_number("rope factor", rope.get("factor"), 1)
    return {"rotary_seq_len_interpolation_factor": float(factor)}


def _dynamic(config: Config, rope: Mapping[str, Any], periods: Tensor, base: float) -> Flags:
    """Changes nothing up to the trained length; longer texts are refused."""
    _factor(config, rope)
    return {"max_position_embeddings": config.integer("max_position_embeddings")}


def _llama3(config: Config, rope: Mapping[str, Any], periods: Tensor, base: float) -> Flags:
    missing = [name for name in ("low_freq_factor", "high_freq_factor") if rope.get(name) is None]
    if missing:
        raise config.refusal(f"rotary embedding 'llama3' without {missing[0]}", "a number")
    factor = config.checked_number("rope factor", rope.get("factor"), 1)
    rope = {**rope, "original_max_position_embeddings": _original(config, rope)}
    built_in = all(rope[name] == value for name, value in _LLAMA3_ROPE.items())
    if built_in and base == int(base):
        return {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}
    low, high = (_factor(config, rope, f"{name}_freq_factor") for name in ("low", "high"))
    if low >= high:
        raise config.refusal(f"low_freq_factor {low}", f"less than high_freq_factor {high}")
    length = rope["original_max_position_embeddings"]
    plain = 1.0 / periods
    wavelengths = 2 * math.pi / plain
    stretched = torch.where(wavelengths > length / low, plain / factor, plain)
    smooth = (length / wavelengths - low) / (high - low)
    smoothed = (1 - smooth) * stretched / factor + smooth * stretched
    between = ~(wavelengths < length / high) * ~(wavelengths > length / low)
    return {"rotary_frequencies": torch.where(between, smoothed, stretched).tolist()}


def _yarn(config: Config, rope: Mapping[str, Any], periods: Tensor, base: float) -> Flags:
    if "factor" not in rope:
        raise config.refusal("rotary embedding 'yarn' without factor", "a number")
    original = _original(config, rope)
    factor = config.integer("max_position_embeddings") / original
    if rope["factor"] is not None:
        factor = _factor(config, rope)
    given = {
        name: None if not rope.get(name) else _factor(config, rope, name)
        for name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    }
    low, high = _yarn_range(
        (given["beta_fast"] or 32, given["beta_slow"] or 1),
        2 * len(periods),
        base,
        original,
        rope.get("truncate", True),
    )
    ramp = (torch.arange(len(periods), dtype=torch.float32) - low) / (high - low)
    share = 1 - ramp.clamp(0, 1)
    stretched, plain = 1.0 / (factor * periods), 1.0 / periods
    attention = rope.get("attention_factor")
    if attention is None:
        attention = _mscale(factor, 1.0)
        if given["mscale"] and given["mscale_all_dim"]:
            attention = _mscale(factor, given["mscale"]) / _mscale(factor, given["mscale_all_dim"])
    attention = config.checked_number("rope attention_factor", attention, 1e-9)
    return {
        "rotary_frequencies": (stretched * (1 - share) + plain * share).tolist(),
        "rotary_attention_factor": float(attention),
    }


def _yarn_range(
    betas: tuple[float, float], channels: int, base: float, original: int, truncate: Any
) -> tuple[float, float]:
    """The pairs of channels between which the stretching sets in."""

    def pair(rotations: float) -> float:
        ratio = math.log(original / (rotations * 2 * math.pi))
        return channels * ratio / (2 * math.log(base))

    low, high = (pair(beta) for beta in betas)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    return low, high + 0.001 if low == high else high


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(config: Config, rope: Mapping[str, Any], periods: Tensor, base: float) -> Flags:
    """The factors of short texts; longer ones are refused."""
    short: Any = rope.get("short_factor")
    numbers = isinstance(short, list) and all(isinstance(each, (int, float)) for each in short)
    if not numbers or len(short) != len(periods) or min(short, default=1) <= 0:
        raise config.refusal(
            f"rotary embedding 'longrope' of short_factor {shown(short)}",
            f"{len(periods)} positive numbers",
        )
    original = _original(config, rope)
    attention = rope.get("attention_factor")
    if attention is None:
        factor = config.integer("max_position_embeddings") / original
        if rope.get("factor") is not None:
            factor = _factor(config, rope)
        attention = 1.0
        if factor > 1 and original > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
    attention = config.checked_number("rope attention_factor", attention, 1e-9)
    divisors = torch.tensor(short, dtype=torch.float32)
    return {
        "rotary_frequencies": (1.0 / (divisors * periods)).tolist(),
        "rotary_attention_factor": float(attention),
        "max_position_embeddings": original,
    }


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
