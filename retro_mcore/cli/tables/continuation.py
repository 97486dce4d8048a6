"""Texts as `generate` prints them, with log-probabilities and neighbors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.inference.growing_text import SafeStream
from retro_mcore.retrieval.marked_text import Piece, split_text

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
        neighbors: Print its chunks with the neighbors that the model read for them.
    """
    if printer is None:
        print(result.prompt + result.text)
    else:
        printer.finish()
    if logprobs:
        print()
        for line in _logprob_lines(loaded.tokenizer, result.generated):
            print(line)
    if neighbors:
        print()
        for line in _chunk_lines(loaded, result.generated, _marks()):
            print(line)
    print(flush=True)


def _logprob_lines(tokenizer: Tokenizer, text: GeneratedText) -> Iterator[str]:
    for entry in text.logprobs:
        top = "  ".join(
            f"{tokenizer.detokenize([token])!r} {value:.3f}" for token, value in entry.top
        )
        yield f"{entry.logprob:9.4f}  {tokenizer.detokenize([entry.token])!r}  {top}".rstrip()


def _marks() -> tuple[str, str]:
    """Strings around copied text: bold and underlined on a terminal, else brackets."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return ("[[", "]]") if plain or not sys.stdout.isatty() else ("\x1b[1;4m", "\x1b[0m")


def _chunk_lines(
    loaded: GenerationModel, text: GeneratedText, marks: tuple[str, str]
) -> Iterator[str]:
    """Each chunk, the share of it that is copied, and the neighbors it was written with."""
    from retro_mcore.session.written_chunks import written_chunks

    chunk_length = loaded.arguments.retro_chunk_length
    if not text.neighbors:
        short = f"the text has no complete chunk of {chunk_length} tokens"
        yield f"No neighbors: {'nothing was retrieved' if loaded.retriever is None else short}."
        return
    for chunk in written_chunks(text, chunk_length, loaded.retriever):
        yield chunk.title.capitalize()
        pieces = split_text(loaded.tokenizer, chunk.tokens, chunk.copied_from > 0)
        yield f"  {_marked(pieces, marks)}"
        if chunk.num_generated:
            yield f"  {chunk.copied_share}"
        for neighbor in chunk.neighbors:
            own, *continuation = neighbor.pieces(loaded.tokenizer)
            yield f"  {neighbor.title}"
            yield f"    {_marked(own, marks)}"
            yield from (f"    then: {_marked(part, marks)}" for part in continuation)


def _marked(pieces: Sequence[Piece], marks: tuple[str, str]) -> str:
    """Text in one line; unmarked stretches are shortened in the middle."""
    before, after = marks
    line = "".join(f"{before}{text}{after}" if on else _shortened(text) for text, on in pieces)
    return " ".join(line.split())


def _shortened(text: str, most: int = 160) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} … {text[-half:]}"
