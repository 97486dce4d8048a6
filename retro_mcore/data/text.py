"""Chunks as text, for embedding and counting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro_mcore.data.tokenizers import Tokenizer


def chunk_texts(tokenizer: Tokenizer, chunks: Sequence[np.ndarray]) -> list[str]:
    """Text of each chunk; ends of documents inside a chunk become line breaks."""
    eod = tokenizer.eod
    pieces: list[list[int]] = []
    counts: list[int] = []
    for chunk in chunks:
        ends = np.flatnonzero(chunk == eod)
        parts = [part[part != eod] for part in np.split(chunk, ends)] if len(ends) else [chunk]
        parts = [part for part in parts if len(part)]
        counts.append(len(parts))
        pieces.extend(part.tolist() for part in parts)
    texts = iter(tokenizer.detokenize_batch(pieces))
    return ["\n".join(next(texts) for _ in range(count)) for count in counts]
