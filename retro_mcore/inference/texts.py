"""Growing texts, the data shared by all parts of generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from retro_mcore.retrieval.neighbors import RetrievedNeighbors

FinishReason = Literal["eod", "stop", "length", "dropped", "failed"]


class TokenLogprobs(NamedTuple):
    """Log-probabilities of a token, before temperature, top-k and top-p.

    Attributes:
        token: The token.
        logprob: Natural log-probability of the token.
        top: The most likely tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class GeneratedText:
    """A prompt and its generated continuation.

    Compared and hashed by identity, since it changes as it grows.

    Attributes:
        tokens: The prompt's tokens, then the new ones (without the EOD or stop token that ends the
            text, but with the tokens of a stop string).
        prompt_length: Number of prompt tokens.
        neighbors: One entry (N = 1) for each completed chunk with neighbors.
        finish_reason: "eod", "stop" (a stop token or string), "length" for `max_new_tokens`,
            "dropped", or "failed"; None while the text grows.
        two_chunks: The prompt is the first chunk and the answer the second, whatever their lengths.
            Otherwise chunks have the model's length.
        logprobs: Log-probabilities of the new tokens, if requested.
        prompt_logprobs: Log-probabilities of the prompt's tokens from the second on, if requested.
        stop_text: The new text before the stop string, if one has ended the text.
        end_logprob: Log-probability of the EOD or stop token that ended the text, if requested.
        neighbor_credit: f32 [tokens, K], if requested: nats by which each neighbor lowers the loss
            of each token, once the text has ended. None if it was written without neighbors.
        error: The error, if the text has failed.
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
    neighbor_credit: np.ndarray | None = None
    error: Exception | None = None

    @property
    def new_tokens(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_length :]

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per token, including the token that ended the text."""
        values = [entry.logprob for entry in self.logprobs]
        values += [] if self.end_logprob is None else [self.end_logprob]
        return sum(values) / len(values) if values else 0.0

    def chunks(self, chunk_length: int, start: int = 0, stop: int | None = None) -> list[range]:
        """Positions of the chunks completed by tokens from `start` to `stop`.

        Args:
            chunk_length: The model's chunk length.
            start: First token to consider.
            stop: End of the tokens to consider; by default the end of the text.
        """
        stop = len(self.tokens) if stop is None else stop
        if self.two_chunks:
            last = self.prompt_length - 1
            return [range(self.prompt_length)] if start <= last < stop else []
        return [
            range(chunk * chunk_length, (chunk + 1) * chunk_length)
            for chunk in range(start // chunk_length, stop // chunk_length)
        ]

    def chunk_read_for(self, place: int, chunk_length: int) -> int | None:
        """Number of the chunk whose neighbors the model read to predict the token at `place`.

        None if it read none.
        """
        chunk = place // chunk_length - 1
        if self.two_chunks:
            chunk = 0 if place >= self.prompt_length else -1
        return chunk if 0 <= chunk < len(self.neighbors) else None
