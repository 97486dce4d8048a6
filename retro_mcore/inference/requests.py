"""Generation requests: prompt, sampling options and stopping conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Protocol

from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.growing_text import Detokenizer
from retro_mcore.inference.sampling import LogitAdjustments, SamplingOptions
from retro_mcore.model.config import RetroConfig
from retro_mcore.retrieval.neighbors import NeighborSource, Prefetching

if TYPE_CHECKING:
    from retro_mcore.model.model import RetroModel


class Vocabulary(Protocol):
    """The part of a tokenizer that generation needs; stop strings also need a `Detokenizer`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...


@dataclass(frozen=True)
class StoppingOptions:
    """Conditions that end a text.

    Attributes:
        max_new_tokens: Maximum number of new tokens.
        min_new_tokens: Minimum number of new tokens. Until then, EOD and stop tokens are not
            sampled, and stop strings are ignored.
        stop_tokens: Tokens that end the text besides EOD; not included in it.
        stop_strings: Strings that end the text; not included in it.

    Raises:
        ConfigurationError: a value is out of range.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ConfigurationError(
                "--max-new-tokens", str(self.max_new_tokens), "Give at least 1"
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigurationError(
                "--min-new-tokens",
                f"{_short(self.min_new_tokens)} of at most {_short(self.max_new_tokens)}",
                "Give a number from 0 to --max-new-tokens",
            )
        if "" in self.stop_strings:
            raise ConfigurationError("--stop", "an empty string", "Give at least one character")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt with the options for its continuation.

    Attributes:
        tokens: The prompt, at least one token; empty in a request for `for_prompts`.
        sampling: Sampling options, with the seed of this text.
        adjustments: Penalties and biases applied to the logits before sampling.
        stopping: Conditions that end the text.
        neighbors: Source of neighbors; None disables retrieval.
        number: Number that identifies the prompt to `neighbors`.
        two_chunks: The prompt is the first chunk, the answer the second, whatever their lengths.
        top_logprobs: Record log-probabilities of each new token (0) and of the n likeliest (n).
        prompt_logprobs: Also record log-probabilities of the prompt's tokens.
        neighbor_credit: Once the text has ended, measure the credit of each neighbor for each
            token, which costs K + 1 passes over the text.

    Raises:
        ConfigurationError: a value is out of range.
    """

    tokens: Sequence[int] = ()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    adjustments: LogitAdjustments = field(default_factory=LogitAdjustments)
    stopping: StoppingOptions = field(default_factory=StoppingOptions)
    neighbors: NeighborSource | None = None
    number: int = 0
    two_chunks: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    neighbor_credit: bool = False

    def __post_init__(self) -> None:
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise ConfigurationError("--logprobs", str(self.top_logprobs), "Give 0 or more")

    def for_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        neighbors: Sequence[NeighborSource | None] | None = None,
    ) -> list[GenerationRequest]:
        """Copies of this request for several prompts, numbered from 0.

        Prompt i uses this seed + i, so its text does not depend on the other prompts.

        Args:
            prompts: Tokens of each prompt.
            neighbors: Source of neighbors for each prompt; None: this request's source for all.
        """
        sources = [self.neighbors] * len(prompts) if neighbors is None else neighbors
        return [
            replace(
                self,
                tokens=prompt,
                neighbors=source,
                number=number,
                sampling=replace(self.sampling, seed=self.sampling.seed + number),
            )
            for number, (prompt, source) in enumerate(zip(prompts, sources, strict=True))
        ]


def end_tokens(tokenizer: Vocabulary) -> tuple[int, ...]:
    """Tokens that end every text: EOD, and those that the model's checkpoint records."""
    return (tokenizer.eod, *getattr(tokenizer, "end_tokens", ()))


def num_tokens(model: RetroModel, tokenizer: Vocabulary) -> int:
    """Number of usable tokens: those of the tokenizer that have a row in the model's embedding.

    Further rows of the embedding are padding, which is excluded from the softmax.
    """
    return min(tokenizer.vocab_size, model.vocab_size)


def check_request(
    request: GenerationRequest, model: RetroModel, tokenizer: Vocabulary, max_length: int
) -> None:
    """Reject a request that cannot be generated, before it can affect the rest of a batch.

    Args:
        request: The request.
        model: The model, or this rank's part of it.
        tokenizer: The project's tokenizer.
        max_length: Maximum tokens of a text.

    Raises:
        ConfigurationError: the request is invalid. Names the flag, the field or the prompt.
    """
    _check_prompt(request, num_tokens(model, tokenizer))
    _check_length(request, max_length)
    _check_endings(request, model, tokenizer)
    _check_neighbors(request, model)
    for token in request.adjustments.logit_bias:
        if not 0 <= token < num_tokens(model, tokenizer):
            raise ConfigurationError(
                "logit_bias",
                f"token {_short(token)}",
                f"The vocabulary has {num_tokens(model, tokenizer)} tokens, from 0",
            )


def require_new_tokens(request: GenerationRequest) -> None:
    """Reject a request for no new tokens, unless the prompt is to be scored.

    Raises:
        ConfigurationError: no tokens are requested. Names the flag.
    """
    if request.stopping.max_new_tokens < 1 and not request.prompt_logprobs:
        raise ConfigurationError(
            "--max-new-tokens", str(request.stopping.max_new_tokens), "Give at least 1"
        )


def _check_prompt(request: GenerationRequest, vocabulary: int) -> None:
    prompt, subject = request.tokens, f"prompt {request.number}"
    if not len(prompt):
        raise ConfigurationError(subject, "no tokens", "Give some text to continue")
    if any(isinstance(token, bool) or not isinstance(token, Integral) for token in prompt):
        raise ConfigurationError(subject, "values that are not token ids", "Give whole numbers")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise ConfigurationError(
            subject,
            f"token ids from {_short(min(prompt))} to {_short(max(prompt))}",
            f"The vocabulary has {vocabulary} tokens; use the project's tokenizer",
        )


def _check_length(request: GenerationRequest, max_length: int) -> None:
    length, max_new_tokens = len(request.tokens), request.stopping.max_new_tokens
    if length + max_new_tokens > max_length:
        raise ConfigurationError(
            "--max-new-tokens",
            f"{_short(max_new_tokens)} after the {length} tokens of prompt {request.number} are "
            f"more than the model's window of {max_length}",
            "Shorten the prompt or ask for fewer tokens",
        )


def _check_endings(request: GenerationRequest, model: RetroModel, tokenizer: Vocabulary) -> None:
    stopping, rows = request.stopping, model.vocab_size
    for token in stopping.stop_tokens:
        if not 0 <= token < rows:
            raise ConfigurationError(
                "--stop-token-ids", _short(token), f"Give ids from 0 to {rows - 1}"
            )
    endings = {*end_tokens(tokenizer), *stopping.stop_tokens}
    if stopping.min_new_tokens and endings.issuperset(range(num_tokens(model, tokenizer))):
        raise ConfigurationError(
            "--stop-token-ids",
            f"every token, with --min-new-tokens {stopping.min_new_tokens}",
            "Leave some that may be sampled",
        )
    if stopping.stop_strings and not isinstance(tokenizer, Detokenizer):
        raise ConfigurationError(
            "--stop", "strings, but the tokenizer cannot detokenize", "Use stop tokens"
        )


def _check_neighbors(request: GenerationRequest, model: RetroModel) -> None:
    if request.neighbors is not None and not isinstance(model.config, RetroConfig):
        raise ConfigurationError(
            "--retro-neighbors", "the model was trained without retrieval", "Use none"
        )
    lead = request.neighbors.lead if isinstance(request.neighbors, Prefetching) else 0
    if lead and lead >= model.config.retro_chunk_length:
        raise ConfigurationError(
            "--retrieval-lead",
            f"{lead} of the {model.config.retro_chunk_length} tokens of a chunk",
            "Give fewer, so that the search has a query",
        )


def _short(number: int) -> str:
    """A number for a message, abbreviated if huge."""
    if abs(number) < 10**20:
        return str(number)
    return f"a number of {int(number).bit_length()} bits"
