"""Generation settings of the lm-evaluation-harness's tasks (`generation_kwargs`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.sampling import SamplingOptions

#: Names of the maximum answer length. The first one given counts, as in the harness.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {*_LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p", "seed"}
#: Unsupported settings, with values that have no effect and are accepted.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "min_p": (0,),
    "typical_p": (1,),
    "use_cache": (True, False),
    "early_stopping": (True, False),
}


@dataclass(frozen=True)
class GenerationSettings:
    """Generation settings; requests with equal settings may share a batch.

    Attributes:
        stop: Texts that end an answer; none is empty.
        max_new_tokens: Maximum tokens of an answer; 0: every answer is empty.
        sampling: Sampling options; request i uses seed + i.
    """

    stop: tuple[str, ...]
    max_new_tokens: int
    sampling: SamplingOptions


def read_settings(
    settings: Mapping[str, Any], max_new_tokens: int, seed: int, notes: Counter[str]
) -> GenerationSettings:
    """Parse a request's settings.

    Args:
        settings: Settings of the task; null means not given.
        max_new_tokens: Default maximum tokens of an answer.
        seed: Default seed.
        notes: Counter of contradictory settings.

    Raises:
        ConfigurationError: a value is invalid, or a setting is not supported. Names it.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name not in _KNOWN and value not in _WITHOUT_EFFECT.get(name, ()):
            raise ConfigurationError(
                f"generation_kwargs {name}", repr(value), f"Use {', '.join(sorted(_KNOWN))}"
            )
    lengths = [given[name] for name in _LENGTHS if name in given]
    return GenerationSettings(
        _stop_texts(given.get("until", ())),
        int(_number("max_gen_toks", lengths[0], whole=True)) if lengths else max_new_tokens,
        _sampling(given, seed, notes),
    )


def _stop_texts(until: Any) -> tuple[str, ...]:
    listed = [until] if isinstance(until, str) else until
    if not isinstance(listed, (list, tuple)):
        raise ConfigurationError("generation_kwargs until", repr(until), "Give a list of texts")
    for text in listed:
        if not isinstance(text, (str, type(None))):
            raise ConfigurationError("generation_kwargs until", repr(until), "Give a list of texts")
    # An empty stop text would end every answer before it begins.
    return tuple(text for text in listed if text)


def _sampling(given: Mapping[str, Any], seed: int, notes: Counter[str]) -> SamplingOptions:
    """Greedy, unless a request sets `do_sample` or a temperature."""
    do_sample = given.get("do_sample")
    if do_sample not in (None, True, False):
        raise ConfigurationError("generation_kwargs do_sample", repr(do_sample), "Give a boolean")
    seed = int(_number("seed", given["seed"], whole=True)) if "seed" in given else seed
    temperature = _number("temperature", given.get("temperature", 1.0 if do_sample else 0.0))
    if do_sample is False and temperature:
        notes["do_sample: false, but a temperature: answered greedily"] += 1
        temperature = 0.0
    if do_sample and not temperature:
        notes["do_sample: true, but temperature 0: answered greedily"] += 1
    if not temperature:
        return SamplingOptions(temperature=0.0, seed=seed)
    top_p = _number("top_p", given.get("top_p", 1.0))
    if top_p > 1:
        raise ConfigurationError("generation_kwargs top_p", str(top_p), "Give a number from 0 to 1")
    top_k = int(_number("top_k", given.get("top_k", 0), whole=True))
    if not top_p:  # only the most likely token, as in transformers
        return SamplingOptions(temperature=0.0, seed=seed)
    return SamplingOptions(temperature, top_k, top_p, seed)


def _number(name: str, value: Any, whole: bool = False) -> float:
    """A non-negative number, also if given as text on a command line."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf") or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise ConfigurationError(f"generation_kwargs {name}", repr(value), f"Give {kind} from 0 on")
    return number
