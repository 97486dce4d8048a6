"""Seeded sampling of tokens from logits: greedy, temperature, top-k and top-p (nucleus)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.inference.texts import TokenLogprobs


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options, with Megatron's names.

    Attributes:
        temperature: Divisor of the logits; 0 takes the most likely token (greedy).
        top_k: Keep only the k most likely tokens; 0 keeps all.
        top_p: After top-k, keep only the smallest set of tokens whose probabilities sum to at least
            p (Holtzman et al. 2020); 1 keeps all, 0 only the most likely token.
        seed: Seed; prompt i of a batch has its own generator, seeded with `seed + i`.

    Raises:
        ConfigurationError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigurationError("--temperature", str(self.temperature), "Give 0 or more")
        if self.top_k < 0:
            raise ConfigurationError("--top-k", str(self.top_k), "Give 0 (all tokens) or more")
        if not 0 <= self.top_p <= 1:
            raise ConfigurationError("--top-p", str(self.top_p), "Give a number from 0 to 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigurationError("--seed", str(self.seed), "Give a number from 0 to 2^64 - 1")

    def generators(self, num_prompts: int) -> list[torch.Generator]:
        """One random generator per prompt, so a prompt's text does not depend on the others."""
        return [
            torch.Generator().manual_seed((self.seed + row) % 2**64) for row in range(num_prompts)
        ]


@dataclass(frozen=True)
class LogitAdjustments:
    """Penalties and biases on the logits before a token is chosen, as OpenAI defines them.

    Attributes:
        frequency_penalty: Subtracted from a token's logit for each occurrence in the new text.
        presence_penalty: Subtracted once from the logit of a token that occurs in the new text.
        logit_bias: Bias added to the logit, by token.

    Raises:
        ConfigurationError: a value is not a number.
    """

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        penalties = {name: getattr(self, f"{name}_penalty") for name in ("frequency", "presence")}
        for name, value in penalties.items():
            if not math.isfinite(value):
                raise ConfigurationError(f"{name}_penalty", str(value), "Give a number")
        for token, value in self.logit_bias.items():
            if not math.isfinite(value):
                raise ConfigurationError("logit_bias", f"{value} for token {token}", "Give numbers")

    def apply(self, logits_V: torch.Tensor, new_tokens: Sequence[int]) -> torch.Tensor:
        """The adjusted logits, fp64 on the CPU; the unmodified input if nothing changes."""
        penalized = self.frequency_penalty or self.presence_penalty
        counts = Counter(new_tokens) if penalized else {}
        if not self.logit_bias and not counts:
            return logits_V
        adjusted_V = logits_V.detach().to("cpu", torch.float64, copy=True)
        if self.logit_bias:
            tokens, values = self._bias
            adjusted_V[tokens] += values
        if counts:
            penalties = [
                count * self.frequency_penalty + self.presence_penalty for count in counts.values()
            ]
            adjusted_V[list(counts)] -= torch.tensor(penalties, dtype=torch.float64)
        return adjusted_V

    @cached_property
    def _bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their biases as tensors; cached, since there may be many."""
        values = torch.tensor(list(self.logit_bias.values()), dtype=torch.float64)
        return torch.tensor(list(self.logit_bias)), values


def next_token_probabilities(logits_BV: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """The sampling distribution `[B, V]`, in fp64 on the CPU to be equal on every device."""
    logits_BV = logits_BV.detach().to("cpu", torch.float64)
    if options.temperature == 0:
        return torch.nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).double()
    # The largest becomes 0, which no temperature changes; the others may become -inf.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / options.temperature
    if 0 < options.top_k < logits_BV.shape[-1]:
        kept_BK = logits_BV.topk(options.top_k, dim=-1)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(
            -1, kept_BK.indices, kept_BK.values
        )
    probabilities_BV = logits_BV.softmax(-1)
    return _nucleus(probabilities_BV, options.top_p) if options.top_p < 1 else probabilities_BV


def _nucleus(probabilities_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    # A token is kept while the tokens before it sum to less than top_p; the first always is.
    reached_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
    reached_BV[..., 0] = False
    kept_BV = torch.zeros_like(sorted_BV).scatter(
        -1, order_BV, sorted_BV.masked_fill(reached_BV, 0)
    )
    return kept_BV / kept_BV.sum(-1, keepdim=True)


def require_numbers(logits_V: torch.Tensor) -> None:
    """Reject logits from which no token can be chosen.

    Raises:
        CheckpointError: a logit is NaN, or the largest is infinite.
    """
    if not torch.isfinite(logits_V.max()):
        raise CheckpointError(
            "the model",
            "its logits are not numbers",
            "Its weights are damaged, or overflow their precision",
        )


def token_logprobs(
    logits_SV: torch.Tensor, tokens: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """Log-probabilities of `tokens`, one per row of the logits, and of the most likely tokens.

    Raises:
        CheckpointError: the logits are not numbers.
    """
    if not tokens:
        return []
    require_numbers(logits_SV)
    logprobs_SV = logits_SV.detach().float().log_softmax(-1)
    chosen = torch.tensor(tokens, device=logprobs_SV.device)[:, None]
    values = logprobs_SV.gather(1, chosen)[:, 0].tolist()
    top = logprobs_SV.topk(min(num_top, logprobs_SV.size(1)), dim=-1)
    rows = zip(tokens, values, top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprobs(int(token), value, list(zip(ids, likely, strict=True)))
        for token, value, ids, likely in rows
    ]


def sample(
    logits_BV: torch.Tensor, options: SamplingOptions, generators: list[torch.Generator]
) -> list[int]:
    """Sample one token per row of `logits_BV` with that row's generator."""
    if options.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    probabilities_BV = next_token_probabilities(logits_BV, options)
    return [
        int(torch.multinomial(row_V, 1, generator=generator))
        for row_V, generator in zip(probabilities_BV, generators, strict=True)
    ]
