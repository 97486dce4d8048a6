"""New tokens as new text, piece by piece: for streams, and for strings that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.inference.texts import GeneratedText

#: What a tokenizer puts in the place of bytes that are no character, or not yet.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
#: Tokens before a new one that it is detokenized with.
_CONTEXT = 8
#: Most tokens of a character: the bytes of UTF-8.
_LONGEST_CHARACTER = 4


class GrowingText:
    """The text of what is added to a prompt.

    A token costs the detokenization of the few tokens around it. A character whose bytes are spread
    over several tokens waits for its last one; one that the prompt begins belongs to what is added.

    Args:
        tokenizer: Turns tokens into text.
        prompt: The prompt's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # Some tokens before the new ones: their text depends on what they follow.
        self._tokens = _context(tokenizer, prompt)
        self._start, self._shown = 0, len(self._tokens)
        self.text = ""

    def add(self, token: int) -> str:
        """Text that a token adds; empty if it ends inside a character."""
        self._tokens.append(token)
        before, piece = self._piece()
        return "" if piece.endswith(INCOMPLETE) or not piece else self._show(before, piece)

    def finish(self) -> str:
        """Text that is still waiting."""
        return self._show(*self._piece())

    def _piece(self) -> tuple[str, str]:
        before = self._tokenizer.detokenize(self._tokens[self._start : self._shown])
        now = self._tokenizer.detokenize(self._tokens[self._start :])
        # Not by the length of what was before: the mark at its end may have become a character.
        return before, now[shared_length(before, now) :]

    def _show(self, before: str, piece: str) -> str:
        if not before.endswith(INCOMPLETE):  # else the next window would begin inside a character
            self._start = self._shown
        self._shown = len(self._tokens)
        self.text += piece
        return piece


def _context(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, from the beginning of a character on.

    Byte tokens of Llama-like tokenizers are no text at all if the first one is amid a character.
    """
    for extra in range(_LONGEST_CHARACTER):
        window = list(prompt[-_CONTEXT - extra :])
        beginnings = (window[:count] for count in range(1, _LONGEST_CHARACTER + 1))
        if len(window) < _CONTEXT + extra or any(
            not tokenizer.detokenize(tokens).startswith(INCOMPLETE) for tokens in beginnings
        ):
            return window
    return list(prompt[-_CONTEXT:])


def prompt_text(tokenizer: Tokenizer, tokens: Sequence[int], prompt_length: int) -> str:
    """The prompt, without the character that its end begins if what follows completes it."""
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
    """How many characters two texts begin with together."""
    if second.startswith(first):
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))  # noqa: B905


def find_stop(text: str, stop_strings: Sequence[str], searched: int = 0) -> int | None:
    """Where the first of the stop strings begins; None: nowhere.

    Args:
        text: The text.
        stop_strings: The strings.
        searched: Characters that have been searched. Strings that end within them do not count.
    """
    places = [text.find(stop, max(0, searched - len(stop) + 1)) for stop in stop_strings]
    return min((place for place in places if place >= 0), default=None)


def held_back(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max(map(len, stop_strings), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0


class SafeStream:
    """The new text of a prompt for whoever reads along: never a stop string, nor a part of one.

    Args:
        tokenizer: Turns tokens into text.
        prompt: The prompt's tokens.
        stop_strings: Strings that end the text.
        min_new_tokens: Number of new tokens before which they do not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop_strings: Sequence[str] = (),
        min_new_tokens: int = 0,
    ) -> None:
        self._growing, self._stop_strings = GrowingText(tokenizer, prompt), stop_strings
        self._missing_tokens = min_new_tokens
        self._shown = self._searched = 0

    @property
    def grown_text(self) -> str:
        """The text so far, shown or held back."""
        return self._growing.text

    @property
    def shown_text(self) -> str:
        """All that may be shown so far."""
        return self._growing.text[: self._shown]

    def add(self, token: int) -> str:
        """Text that may be shown now."""
        self._growing.add(token)
        self._missing_tokens -= 1
        text = self._growing.text
        if self._missing_tokens > 0:
            self._searched = len(text)
        return self._show(len(text) - held_back(text, self._stop_strings))

    def finish(self) -> str:
        """The rest; up to the stop string, if there is one."""
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


def new_text(tokenizer: Tokenizer, text: GeneratedText) -> str:
    """The generated text, up to its stop string if there is one."""
    if text.stop_text is not None:
        return text.stop_text
    stream = SafeStream(tokenizer, text.tokens[: text.prompt_length])
    return "".join(map(stream.add, text.new_tokens)) + stream.finish()
