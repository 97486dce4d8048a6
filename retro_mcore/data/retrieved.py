"""Retrieved tokens as arrays: texts in rows of one length, and the places of missing ones.

Shapes: K neighbors, R retrieved length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro_mcore.data.tokenizers.base import Tokenizer


def missing_neighbors(shape: Sequence[int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 and mask bool of a shape [..., K, R] with nothing in them: all is masked."""
    return np.full(shape, pad_id, np.int64), np.ones(shape, bool)


def pad_texts(
    texts: Sequence[str], tokenizer: Tokenizer, num_neighbors: int, retrieved_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts as the neighbors of one chunk: cut or padded to R tokens, the padding masked.

    Args:
        texts: K at most; the rest is missing.
        tokenizer: The project's.
        num_neighbors: K.
        retrieved_length: R.

    Returns:
        Tokens int64 [K, R] and mask bool [K, R], True = padding or missing.
    """
    tokens_KR, mask_KR = missing_neighbors((num_neighbors, retrieved_length), tokenizer.eod)
    for row, text in enumerate(texts):
        ids = tokenizer.tokenize(text)[:retrieved_length]
        tokens_KR[row, : len(ids)], mask_KR[row, : len(ids)] = ids, False
    return tokens_KR, mask_KR
