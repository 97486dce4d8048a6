"""Chunks as text, for embedding and counting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Literal

import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer

#: Text for document ends inside a chunk: a line break, or whatever the tokenizer decodes EOD to, as
#: in Megatron's Retro (nothing, with a SentencePiece model).
DocumentEnds = Literal["line break", "detokenized"]


def chunk_texts(
    tokenizer: Tokenizer,
    chunks: Sequence[np.ndarray],
    document_ends: DocumentEnds = "line break",
) -> list[str]:
    """Decode each chunk. BOS at the beginning of a document is not text."""
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
    """Drop the BOS of the documents that begin among the tokens."""
    before = [tokenizer.eod, *tokens]
    return [
        token
        for previous, token in pairwise(before)
        if token != tokenizer.bos or previous != tokenizer.eod
    ]


def _split(tokens: list[int], eod: int) -> list[list[int]]:
    """Split tokens at the ends of documents; empty pieces are dropped."""
    return [list(run) for is_end, run in groupby(tokens, eod.__eq__) if not is_end]
