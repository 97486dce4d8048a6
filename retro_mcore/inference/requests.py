"""What is asked of generation: what to continue, how to draw, when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.neighbors import NeighborSource, Prefetching
from retro_mcore.inference.sampling import SamplingOptions

if TYPE_CHECKING:
    from retro_mcore.model.model import RetroModel


class Vocabulary(Protocol):
    """What generation must know of a tokenizer; stop strings also need its `detokenize`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...


@dataclass(frozen=True)
class StoppingOptions:
    """When a text ends.

    Attributes:
        max_new_tokens: Where it stops that does not end by itself.
        min_new_tokens: Until it has so many, it does not end: EOD and stop tokens are not drawn,
            and stop strings are not looked for.
        stop_tokens: Tokens that end it, besides EOD; they do not belong to it.
        stop_strings: Strings that end it; they and what follows do not belong to its text.

    Raises:
        ConfigurationError: a value out of range.
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
                f"{self.min_new_tokens} of at most {self.max_new_tokens}",
                "Give a number from 0 to --max-new-tokens",
            )
        if "" in self.stop_strings:
            raise ConfigurationError("--stop", "an empty string", "Give at least one character")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to continue, and how.

    Attributes:
        tokens: The prompt, at least one token.
        sampling: How tokens are drawn; its seed is this text's own.
        stopping: When the text ends.
        neighbors: Where neighbors come from; None: retrieval off.
        number: The name by which `neighbors` knows the prompt.
        two_chunks: The prompt is the first chunk, the answer the second, whatever their lengths.
        top_logprobs: Keep log-probabilities: of each new token (0), and of the n likeliest (n).
        prompt_logprobs: Keep those of the prompt's tokens too.
    """

    tokens: Sequence[int]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stopping: StoppingOptions = field(default_factory=StoppingOptions)
    neighbors: NeighborSource | None = None
    number: int = 0
    two_chunks: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False


def check_request(
    request: GenerationRequest, model: RetroModel, tokenizer: Vocabulary, max_length: int
) -> None:
    """Refuse what cannot be generated.

    Raises:
        ConfigurationError: naming the flag or the prompt.
    """
    prompt, subject = request.tokens, f"prompt {request.number}"
    if not prompt:
        raise ConfigurationError(subject, "no tokens", "Give some text to continue")
    if min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
        raise ConfigurationError(
            subject,
            f"token ids from {min(prompt)} to {max(prompt)}",
            f"The vocabulary has {tokenizer.vocab_size} tokens; use the project's tokenizer",
        )
    max_new_tokens = request.stopping.max_new_tokens
    if len(prompt) + max_new_tokens > max_length:
        raise ConfigurationError(
            "--max-new-tokens",
            f"{max_new_tokens} after the {len(prompt)} tokens of {subject} are more than the "
            f"model's window of {max_length}",
            "Shorten the prompt or ask for fewer tokens",
        )
    if request.neighbors is not None and not hasattr(model, "neighbor_encoder"):
        raise ConfigurationError(
            "--retro-neighbors", "the model was trained without retrieval", "Use none"
        )
    lead = request.neighbors.lead if isinstance(request.neighbors, Prefetching) else 0
    if lead and lead >= model.config.retro_chunk_length:
        raise ConfigurationError(
            "--retrieval-lead",
            f"{lead} of the {model.config.retro_chunk_length} tokens of a chunk",
            "Leave the search some tokens",
        )
    if request.stopping.stop_strings and not hasattr(tokenizer, "detokenize"):
        raise ConfigurationError(
            "--stop", "strings, but the tokenizer cannot detokenize", "Use stop tokens"
        )
