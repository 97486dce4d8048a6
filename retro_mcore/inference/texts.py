"""The texts that grow: what every part of generation shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from retro_mcore.retrieval.neighbors import RetrievedNeighbors

FinishReason = Literal["eod", "stop", "length", "dropped", "failed"]


class TokenLogprobs(NamedTuple):
    """How likely a token was, before temperature, top-k and top-p.

    Attributes:
        token: The token.
        logprob: Its natural log-probability.
        top: The most likely tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class GeneratedText:
    """A prompt and what has been added to it.

    A text grows, so it equals only itself, and may be a dictionary's key.

    Attributes:
        tokens: The prompt's tokens, then the new ones (without the EOD or stop token that ends the
            text, but with the tokens of a stop string).
        prompt_length: How many of them are the prompt.
        neighbors: One entry (N = 1) for each completed chunk that was given neighbors.
        finish_reason: "eod", "stop" (a stop token or string), "length" for `max_new_tokens`,
            "dropped", or "failed"; None while it grows.
        two_chunks: The prompt is the first chunk and the answer the second, whatever their lengths;
            else chunks have the model's length.
        logprobs: Log-probabilities of the new tokens, if asked for.
        prompt_logprobs: Those of the prompt's tokens from the second on, if asked for.
        stop_text: The new text before the stop string, once one has ended it.
        end_logprob: Log-probability of the EOD or stop token that has ended it, if asked for.
        error: Why it could not go on, once it has failed.
    """

    tokens: list[int]
    prompt_length: int
    neighbors: list[RetrievedNeighbors] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    two_chunks: bool = False
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    stop_text: str | None = None
    end_logprob: float | None = None
    error: Exception | None = None

    @property
    def new_tokens(self) -> list[int]:
        """The tokens that were generated."""
        return self.tokens[self.prompt_length :]

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token, of what was generated and of what ended it."""
        values = [entry.logprob for entry in self.logprobs]
        values += [] if self.end_logprob is None else [self.end_logprob]
        return sum(values) / len(values) if values else 0.0

    def chunks(self, chunk_length: int, start: int = 0, stop: int | None = None) -> list[range]:
        """The positions of the chunks that are completed by tokens from `start` to `stop`.

        Args:
            chunk_length: The model's.
            start: First token counted.
            stop: End of the tokens counted; the text's by default.
        """
        stop = len(self.tokens) if stop is None else stop
        if self.two_chunks:
            last = self.prompt_length - 1
            return [range(self.prompt_length)] if start <= last < stop else []
        return [
            range(chunk * chunk_length, (chunk + 1) * chunk_length)
            for chunk in range(start // chunk_length, stop // chunk_length)
        ]
