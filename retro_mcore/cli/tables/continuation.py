"""Texts as `generate` prints them, with log-probabilities and neighbors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.inference.growing_text import SafeStream
from retro_mcore.retrieval.retriever import Retriever

if TYPE_CHECKING:
    from retro_mcore.inference.texts import GeneratedText
    from retro_mcore.session import GenerationModel
    from retro_mcore.session.continuation import Continuation


class StreamPrinter:
    """Prints a text as it grows, from the prompt on.

    Args:
        tokenizer: The project's.
        prompt: The text that grows.
        stop: Strings that end it.
        min_new_tokens: Number of tokens before which it does not end.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, stop: Sequence[str], min_new_tokens: int
    ) -> None:
        self._stream = SafeStream(tokenizer, tokenizer.tokenize(prompt), stop, min_new_tokens)
        print(prompt, end="", flush=True)

    def add(self, prompt: int, token: int) -> None:
        """Print what `token` adds; a character of several tokens waits for its last one."""
        print(self._stream.add(token), end="", flush=True)

    def finish(self) -> None:
        """Print what still waits, and end the line."""
        print(self._stream.finish())


def print_continuation(
    result: Continuation,
    loaded: GenerationModel,
    printer: StreamPrinter | None,
    logprobs: bool,
    neighbors: bool,
) -> None:
    """Print a text and what is asked about it.

    Args:
        result: The text.
        loaded: The model that wrote it.
        printer: What has streamed it; None if nothing has.
        logprobs: Print the log-probabilities of its new tokens.
        neighbors: Print the neighbors that were retrieved for it.
    """
    if printer is None:
        print(result.prompt + result.text)
    else:
        printer.finish()
    if logprobs:
        print()
        for line in _logprob_lines(loaded.tokenizer, result.generated):
            print(line)
    if neighbors and loaded.retriever is not None:
        print()
        for line in _neighbor_lines(loaded.retriever, result.generated):
            print(line)
    print(flush=True)


def _logprob_lines(tokenizer: Tokenizer, text: GeneratedText) -> Iterator[str]:
    for entry in text.logprobs:
        top = "  ".join(
            f"{tokenizer.detokenize([token])!r} {value:.3f}" for token, value in entry.top
        )
        yield f"{entry.logprob:9.4f}  {tokenizer.detokenize([entry.token])!r}  {top}".rstrip()


def _neighbor_lines(retriever: Retriever, text: GeneratedText) -> Iterator[str]:
    """Each chunk and what was retrieved for it."""
    if any(retrieved.ids is None for retrieved in text.neighbors):
        yield "The neighbors were given."
        return
    if not text.neighbors:
        yield f"No neighbors: the text has no complete chunk of {retriever.chunk_length} tokens."
    for place, retrieved in enumerate(text.neighbors):
        where = text.chunks(retriever.chunk_length)[place]
        chunk = text.tokens[where.start : where.stop]
        yield f"Chunk {place}: {_excerpt(retriever.tokenizer.detokenize(chunk))}"
        for neighbor in retriever.describe(retrieved)[0]:
            yield (
                f"  distance {neighbor.distance:.3f}, {neighbor.source}: {_excerpt(neighbor.text)}"
            )


def _excerpt(text: str, length: int = 160) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else words[: length - 1] + "…"
