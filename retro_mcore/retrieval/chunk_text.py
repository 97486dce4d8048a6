"""Chunks as text, for embedding and counting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Literal

import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer

#: What becomes of the ends of documents inside a chunk: line breaks, or whatever the tokenizer
#: writes for them, which is what Megatron's Retro embeds (nothing, with a SentencePiece model).
DocumentEnds = Literal["line break", "detokenized"]


def chunk_texts(
    tokenizer: Tokenizer,
    chunks: Sequence[np.ndarray],
    document_ends: DocumentEnds = "line break",
) -> list[str]:
    """Text of each chunk. BOS at a document's beginning is no text."""
    eod = tokenizer.eod
    rows = [chunk.tolist() for chunk in chunks]
    if tokenizer.adds_bos:
        rows = [_without_bos(row, tokenizer) if tokenizer.bos in row else row for row in rows]
    if document_ends == "detokenized":
        return tokenizer.detokenize_batch(rows)
    pieces: list[list[int]] = []
    counts: list[int] = []
    for tokens in rows:
        parts = _split(tokens, eod) if eod in tokens else [tokens] if tokens else []
        counts.append(len(parts))
        pieces.extend(parts)
    texts = tokenizer.detokenize_batch(pieces)
    if len(texts) == len(counts) and min(counts, default=1) == 1:
        return texts
    following = iter(texts)
    return ["\n".join(next(following) for _ in range(count)) for count in counts]


def _without_bos(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens without the BOS of the documents that begin among them."""
    before = [tokenizer.eod, *tokens]
    return [
        token
        for previous, token in pairwise(before)
        if token != tokenizer.bos or previous != tokenizer.eod
    ]


def _split(tokens: list[int], eod: int) -> list[list[int]]:
    """The runs of tokens between ends of documents, empty ones left out."""
    return [list(run) for is_end, run in groupby(tokens, eod.__eq__) if not is_end]
