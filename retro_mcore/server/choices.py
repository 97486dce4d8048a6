"""Build the text of an answer token by token, with the position of each token.

Complete answers and streams are both built here, so they are identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.inference.growing_text import (
    INCOMPLETE,
    GrowingText,
    SafeStream,
    prompt_text,
    shared_length,
)
from retro_mcore.inference.texts import TokenLogprobs

#: Number of preceding tokens with which a token's alternatives are detokenized.
_CONTEXT = 8


@dataclass(frozen=True)
class PlacedToken:
    """A token in the text of a choice.

    Attributes:
        place: Index among the text's tokens, including the prompt's.
        text: Text that the token adds. A character of several tokens belongs to the last of them.
        offset: Start of that text, in characters.
        logprobs: Log-probabilities of the token; None for the first token.
    """

    place: int
    text: str
    offset: int
    logprobs: TokenLogprobs | None


class ChoiceText:
    """The text of one choice, and its tokens once their text is shown.

    Every token's text is a slice of the choice's text, and the slices join to all of it.

    Args:
        tokenizer: Converts tokens to text.
        prompt: The prompt's tokens.
        num_start_tokens: Number of tokens that the server added before the client's text; they are
            not shown.
        echo: Begin with the prompt.
        stop_strings: Strings that end the text.
        min_new_tokens: Minimum number of new tokens before stop strings apply.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        num_start_tokens: int = 0,
        echo: bool = False,
        stop_strings: Sequence[str] = (),
        min_new_tokens: int = 0,
    ) -> None:
        self._tokenizer, self._num_start_tokens = tokenizer, num_start_tokens
        self._tokens, self._prompt_length = list(prompt), len(prompt)
        self._stream = SafeStream(tokenizer, prompt, stop_strings, min_new_tokens)
        self._echo = echo
        self._prompt_text: str | None = None if echo else ""
        self._ends_inside = echo and tokenizer.detokenize(prompt).endswith(INCOMPLETE)
        self.text = ""
        # Tokens to report, in order: their ends in the answer (without the prompt), and how many
        # of them no later token can extend.
        self._ends: list[int] = []
        self._logprobs: list[TokenLogprobs | None] = []
        self._settled = self._reported = self._reported_end = 0
        self._prompt_tokens: list[PlacedToken] = []

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> str:
        """Add a token, and return the text that may be shown now."""
        self._tokens.append(token)
        grown = len(self._stream.grown_text)
        piece = self._stream.add(token)
        self._ends.append(len(self._stream.grown_text))
        self._logprobs.append(logprobs)
        if len(self._stream.grown_text) > grown:
            self._settled = len(self._ends)
        if self._prompt_text is None and self._ends_inside and not self._stream.grown_text:
            return ""  # the prompt's last character is incomplete
        return self._show(piece)

    def finish(self) -> str:
        """The remaining text, up to a stop string if there is one."""
        piece = self._stream.finish()
        if self._ends:
            self._ends[-1] = len(self._stream.grown_text)
        self._settled = len(self._ends)
        return self._show(piece)

    @property
    def begun(self) -> bool:
        """Whether the prompt, if it is shown at all, has been shown."""
        return self._prompt_text is not None

    def score_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Also report the prompt's tokens; `logprobs` starts at the second one."""
        scores: list[TokenLogprobs | None] = [None, *logprobs]
        growing = GrowingText(self._tokenizer, self._tokens[: self._num_start_tokens])
        ends = [0] * self._num_start_tokens
        for token in self._tokens[self._num_start_tokens : self._prompt_length]:
            growing.add(token)
            ends.append(len(growing.text))
        text = self._prompt()
        ends = [min(end, len(text)) for end in ends]
        ends[-1] = len(text)
        starts = [0, *ends]
        self._prompt_tokens = [
            PlacedToken(place, text[start:end], start, score)
            for place, (start, end, score) in enumerate(zip(starts, ends, scores, strict=False))
        ]

    def take_prompt_tokens(self) -> list[PlacedToken]:
        """Take the prompt's tokens; empty after the first call."""
        taken, self._prompt_tokens = self._prompt_tokens, []
        return taken

    def take_tokens(self, ended: bool = False) -> list[PlacedToken]:
        """Take new tokens whose text was shown since the last call; with `ended` all remaining."""
        offset, taken = len(self._prompt_text or ""), []
        shown = len(self.text) - offset
        was_cut = len(self._stream.grown_text) > shown
        while self._reported < self._settled:
            start, end = self._reported_end, self._ends[self._reported]
            if was_cut and start >= shown if ended else end > shown:
                break
            end = min(end, shown)
            place = self._prompt_length + self._reported
            text = self.text[offset + start : offset + end]
            taken.append(PlacedToken(place, text, offset + start, self._logprobs[self._reported]))
            self._reported, self._reported_end = self._reported + 1, end
        return taken

    def _show(self, piece: str) -> str:
        if self._prompt_text is None:
            piece = self._prompt() + self._stream.shown_text
        self.text += piece
        return piece

    def _prompt(self) -> str:
        if self._prompt_text is None:
            # Unless the prompt ends inside a character, what follows does not change it.
            num_tokens = len(self._tokens) if self._ends_inside else self._prompt_length
            text = prompt_text(self._tokenizer, self._tokens[:num_tokens], self._prompt_length)
            start = self._tokenizer.detokenize(self._tokens[: self._num_start_tokens])
            self._prompt_text = text[shared_length(start, text) :]
        return self._prompt_text

    def logprobs(self, placed: Sequence[PlacedToken]) -> dict[str, Any]:
        """Log-probabilities of consecutive tokens in OpenAI's format."""
        scores = [token.logprobs for token in placed]
        return {
            "tokens": [token.text for token in placed],
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": [
                None if score is None else self._named(token, score)
                for token, score in zip(placed, scores, strict=True)
            ],
            "text_offset": [token.offset for token in placed],
        }

    def _named(self, placed: PlacedToken, score: TokenLogprobs) -> dict[str, float]:
        """Alternatives, keyed by the text that each would add.

        The id is the key if that text has no complete character, or equals a likelier one's.
        """
        context = self._tokens[max(0, placed.place - _CONTEXT) : placed.place]
        before = self._tokenizer.detokenize(context)
        names: dict[int, str] = {}
        if placed.text and any(token == score.token for token, _ in score.top):
            names[score.token] = placed.text
        used = set(names.values())
        for token, _ in score.top:
            if token in names:
                continue
            now = self._tokenizer.detokenize([*context, token])
            name = now[shared_length(before, now) :]
            if not name or INCOMPLETE in name or name in used:
                name = f"token_id:{token}"
            names[token] = name
            used.add(name)
        return {names[token]: value for token, value in score.top}
