"""Incremental detokenization, for streams and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol, runtime_checkable

from retro_mcore.inference.texts import GeneratedText

#: Replacement character that tokenizers write for invalid or incomplete characters.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
#: Number of preceding tokens with which a new token is detokenized.
_CONTEXT = 8
#: Maximum tokens per character: the bytes of UTF-8.
_LONGEST_CHARACTER = 4


@runtime_checkable
class Detokenizer(Protocol):
    """The part of a tokenizer that turns tokens into text."""

    def detokenize(self, ids: Sequence[int], /) -> str:
        """Text of the tokens."""
        ...


class GrowingText:
    """Text added to a prompt, token by token.

    Each token costs the detokenization of a few tokens around it. A character whose bytes span
    several tokens appears with the last one. A character that the prompt begins belongs to the
    added text.

    Args:
        tokenizer: Converts tokens to text.
        prompt: The prompt's tokens.
    """

    def __init__(self, tokenizer: Detokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A few preceding tokens, since the text of a token depends on them.
        self._tokens = _context(tokenizer, prompt)
        self._start, self._shown = 0, len(self._tokens)
        self.text = ""

    def add(self, token: int) -> str:
        """Add a token, and return its text; empty if it ends inside a character."""
        self._tokens.append(token)
        before, piece = self._piece()
        return "" if piece.endswith(INCOMPLETE) or not piece else self._show(before, piece)

    def finish(self) -> str:
        """Return the remaining text."""
        return self._show(*self._piece())

    def _piece(self) -> tuple[str, str]:
        before = self._tokenizer.detokenize(self._tokens[self._start : self._shown])
        now = self._tokenizer.detokenize(self._tokens[self._start :])
        # Not by the previous length, since a mark at its end may have become a character.
        return before, now[shared_length(before, now) :]

    def _show(self, before: str, piece: str) -> str:
        if not before.endswith(INCOMPLETE):  # else the next window would begin inside a character
            self._start = self._shown
        self._shown = len(self._tokens)
        self.text += piece
        return piece


def _context(tokenizer: Detokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, starting at a character boundary.

    Byte tokens of Llama-like tokenizers decode to no text if the first one is inside a character.
    """
    for extra in range(_LONGEST_CHARACTER):
        window = list(prompt[-_CONTEXT - extra :])
        beginnings = (window[:count] for count in range(1, _LONGEST_CHARACTER + 1))
        if len(window) < _CONTEXT + extra or any(
            not tokenizer.detokenize(tokens).startswith(INCOMPLETE) for tokens in beginnings
        ):
            return window
    return list(prompt[-_CONTEXT:])


def prompt_text(tokenizer: Detokenizer, tokens: Sequence[int], prompt_length: int) -> str:
    """Text of the prompt, without a character at its end that later tokens complete."""
    text = tokenizer.detokenize(tokens[:prompt_length])
    if not text.endswith(INCOMPLETE):
        return text
    growing = GrowingText(tokenizer, tokens[:prompt_length])
    for token in tokens[prompt_length:]:
        growing.add(token)
    growing.finish()
    whole = tokenizer.detokenize(tokens)
    return whole[: len(whole) - len(growing.text)] if whole.endswith(growing.text) else text


def shared_length(first: str, second: str) -> int:
    """Length of the common prefix of two texts, in characters."""
    if second.startswith(first):
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))  # noqa: B905


def find_stop(text: str, stop_strings: Sequence[str], searched: int = 0) -> int | None:
    """Start of the first stop string in a text; None if there is none.

    Args:
        text: The text.
        stop_strings: The stop strings.
        searched: Number of characters already searched. Strings that end within them are ignored.
    """
    places = [text.find(stop, max(0, searched - len(stop) + 1)) for stop in stop_strings]
    return min((place for place in places if place >= 0), default=None)


def held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Number of characters at the end of `text` that may begin a stop string."""
    longest = max(map(len, stop_strings), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0


class SafeStream:
    """Streams the new text of a prompt, without stop strings or parts of them.

    Args:
        tokenizer: Converts tokens to text.
        prompt: The prompt's tokens.
        stop_strings: Strings that end the text.
        min_new_tokens: Minimum number of new tokens before stop strings apply.
    """

    def __init__(
        self,
        tokenizer: Detokenizer,
        prompt: Sequence[int],
        stop_strings: Sequence[str] = (),
        min_new_tokens: int = 0,
    ) -> None:
        self._growing, self._stop_strings = GrowingText(tokenizer, prompt), stop_strings
        self._missing_tokens = min_new_tokens
        self._shown = self._searched = 0

    @property
    def grown_text(self) -> str:
        """All new text so far, shown or held back."""
        return self._growing.text

    @property
    def shown_text(self) -> str:
        """All new text that may be shown so far."""
        return self._growing.text[: self._shown]

    def add(self, token: int) -> str:
        """Add a token, and return the text that may be shown now."""
        self._growing.add(token)
        self._missing_tokens -= 1
        text = self._growing.text
        if self._missing_tokens > 0:
            self._searched = len(text)
        return self._show(len(text) - held_back(text, self._stop_strings))

    def finish(self) -> str:
        """Return the remaining text, up to the stop string if there is one."""
        self._growing.finish()
        return self._show(len(self._growing.text))

    def _show(self, end: int) -> str:
        text = self._growing.text
        place = find_stop(text, self._stop_strings, self._searched)
        if place is not None and self._missing_tokens <= 0:
            end = min(end, place)
        piece = text[self._shown : end]
        self._shown = max(end, self._shown)
        return piece


def new_text(tokenizer: Detokenizer, text: GeneratedText) -> str:
    """Generated text, up to its stop string if there is one."""
    if text.stop_text is not None:
        return text.stop_text
    stream = SafeStream(tokenizer, text.tokens[: text.prompt_length])
    return "".join(map(stream.add, text.new_tokens)) + stream.finish()
