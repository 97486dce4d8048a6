"""Text of tokens, split where the tokens' marks change."""

from __future__ import annotations

from typing import Any

import numpy as np

from retro_mcore.data.tokenizers.base import Tokenizer

#: A stretch of text, and the mark of its tokens.
Piece = tuple[str, Any]


def split_text(tokenizer: Tokenizer, tokens: np.ndarray, marks: np.ndarray) -> list[Piece]:
    """Text of `tokens` [n], split where `marks` [n] changes.

    The pieces join to the text of all tokens. They are not decoded separately, since some
    tokenizers drop a leading space. Instead, each cut is placed at the length of the text before
    it.
    """
    ids = [int(token) for token in tokens]
    if not ids:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(ids)]
    *heads, whole = tokenizer.detokenize_batch([ids[:cut] for cut in cuts[1:]])
    # A cut inside a character of several tokens moves to the next complete character.
    bounds = [0, *(_common_length(head, whole) for head in heads), len(whole)]
    return [
        (whole[start:end], marks[cut].item())
        for start, end, cut in zip(bounds, bounds[1:], cuts, strict=False)
        if start < end
    ]


def _common_length(head: str, whole: str) -> int:
    """Length of the longest common prefix, in characters."""
    pairs = zip(head, whole, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(head), len(whole)))
