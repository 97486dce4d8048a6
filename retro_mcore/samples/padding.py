"""Padding of an aligned project's documents, which no loss counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from retro_mcore.chunking import padding_mask


@dataclass(frozen=True)
class DocumentPadding:
    """Where samples of padded documents hold padding.

    Attributes:
        chunk_length: M, which documents are padded to a multiple of.
        eod: Id of the end-of-document token, which is also the padding.
    """

    chunk_length: int
    eod: int

    def loss_mask(self, text: np.ndarray) -> np.ndarray:
        """Which predictions of a sample count, f32 [S]: those within a document, its EOD included.

        After EOD follows padding or another document, so nothing is predicted from either.

        Args:
            text: Tokens of the sample and the label of its last token, i64 [S+1].
        """
        inputs = text[:-1]
        ended = padding_mask(inputs, self.chunk_length, self.eod) | (inputs == self.eod)
        return (~ended).astype(np.float32)

    def drop(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens of whole chunks, [n·M], without the padding."""
        return tokens[~padding_mask(tokens, self.chunk_length, self.eod)]

    def predicted(self, tokens: Any, document: int) -> tuple[int, int]:
        """First and end of a document's tokens that samples predict: all but the first and padding.

        Args:
            tokens: Megatron's indexed dataset.
            document: Number of the document.
        """
        length = int(tokens.sequence_lengths[document])
        start = length - self.chunk_length
        tail = tokens.get(document, offset=start, length=self.chunk_length)
        return 1, start + int(np.argmax(tail == self.eod)) + 1
