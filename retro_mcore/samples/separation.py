"""Documents of a sample that are kept apart: by attention, positions and loss, as in Megatron.

See docs/decisions/0028-packed-documents.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Separation:
    """How the documents of a sample are kept apart.

    Attributes:
        eod: Id of the end-of-document token.
        chunk_length: M, which documents of an aligned project are padded to a multiple of; None in
            a packed project.
        reset_position_ids: Positions restart in every document.
        reset_attention_mask: Documents do not attend to one another.
        eod_mask_loss: Predictions from the end-of-document token do not count.
    """

    eod: int
    chunk_length: int | None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def segments(self, tokens: np.ndarray) -> np.ndarray:
        """Number of each token's document within its sample, i64 [S].

        A document includes its end and, in an aligned project, its padding.

        Args:
            tokens: i64 [S].
        """
        ends = tokens == self.eod
        if self.chunk_length is not None:  # padding repeats the end: count one for each chunk
            last = ends.reshape(-1, self.chunk_length).any(axis=1)
            return np.repeat(np.cumsum(last) - last, self.chunk_length)
        return np.cumsum(ends) - ends

    def items(self, text: np.ndarray) -> dict[str, np.ndarray]:
        """Parts of a sample's item.

        Args:
            text: Tokens of the sample and the label of its last token, i64 [S+1].

        Returns:
            segments: i64 [S], if documents do not attend to one another.
            position_ids: i64 [S], if documents are kept apart in any way.
            loss_mask: f32 [S], in a packed project with `eod_mask_loss`.
        """
        tokens, items = text[:-1], {}
        segments = self.segments(tokens)
        if self.reset_attention_mask:
            items["segments"] = segments
        if self.reset_attention_mask or self.reset_position_ids:
            items["position_ids"] = self._positions(segments)
        if self.eod_mask_loss and self.chunk_length is None:
            items["loss_mask"] = (tokens != self.eod).astype(np.float32)
        return items

    def _positions(self, segments: np.ndarray) -> np.ndarray:
        positions = np.arange(len(segments))
        if not self.reset_position_ids:
            return positions
        begins = np.flatnonzero(np.diff(segments, prepend=-1))
        return positions - begins[segments - segments[0]]

    def mixed_chunks(self, tokens: np.ndarray, chunk_length: int) -> np.ndarray:
        """Which chunks of a sample hold several documents, bool [L].

        With `reset_attention_mask` nobody reads their neighbors, which were searched with all of
        these documents.
        """
        chunks = self.segments(tokens).reshape(-1, chunk_length)
        return chunks[:, 0] != chunks[:, -1]
