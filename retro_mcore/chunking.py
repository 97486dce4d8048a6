"""Chunk arithmetic: which tokens form a chunk, and which positions attend to its neighbors.

A sample of S tokens is divided into chunks of M tokens. Chunk i's neighbors are retrieved with its
tokens, so they become visible at its last token (Borgeaud et al. 2022, section 2.4 and
Algorithm 1). M consecutive positions attend to the neighbors of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from retro_mcore.errors import ConfigurationError

Alignment = Literal["left", "right"]

#: Where documents begin in the samples of a project: at a chunk's start, or right after the
#: document before them.
SampleLayout = Literal["aligned", "packed"]

#: Chunk id of a neighbor or continuation that does not exist.
NO_NEIGHBOR = -1


@dataclass(frozen=True)
class ChunkGrid:
    """The chunks of one sequence.

    Attributes:
        sequence_length: S, in tokens.
        chunk_length: M, in tokens.
        alignment: "left": chunks start at token 0, and a trailing partial chunk has no neighbors
            yet. So every prefix of a sequence has the same chunks as the whole. "right" (the
            retired Megatron Retro): chunks end at the last token, and the first may be partial.
    """

    sequence_length: int
    chunk_length: int
    alignment: Alignment = "left"

    @property
    def num_chunks(self) -> int:
        """L, the number of chunks that have neighbors."""
        if self.alignment == "left":
            return self.sequence_length // self.chunk_length
        return -(-self.sequence_length // self.chunk_length)

    @property
    def first_attending(self) -> int:
        """First position that attends to neighbors (those of chunk 0)."""
        if self.alignment == "left":
            return self.chunk_length - 1
        return (self.sequence_length - 1) % self.chunk_length

    @property
    def first_chunk_length(self) -> int:
        """Number of tokens in chunk 0: M, or fewer if a right-aligned grid has a partial chunk."""
        remainder = self.sequence_length % self.chunk_length
        return remainder if self.alignment == "right" and remainder else self.chunk_length

    def attended_chunk(self, position: int) -> int | None:
        """The chunk whose neighbors `position` attends to, or None."""
        if position < self.first_attending:
            return None
        chunk = (position - self.first_attending) // self.chunk_length
        return chunk if chunk < self.num_chunks else None


@dataclass(frozen=True)
class PieceGrid:
    """The chunks whose neighbors a piece of a sequence attends to, under context parallelism.

    These are the piece's own chunks, and the chunk before it: the first M - 1 positions of the
    piece attend to that chunk's neighbors. It is chunk 0 here. Both alignments of `ChunkGrid` give
    the same grid, because pieces hold whole chunks.

    Attributes:
        sequence_length: Tokens of the piece, a multiple of M.
        chunk_length: M, in tokens.
    """

    sequence_length: int
    chunk_length: int

    @property
    def num_chunks(self) -> int:
        """The piece's chunks, and the one before."""
        return self.sequence_length // self.chunk_length + 1

    @property
    def first_attending(self) -> int:
        """First position that attends to chunk 0: the last token before the piece."""
        return -1


def chunks_per_sample(sequence_length: int, chunk_length: int) -> int:
    """L, the number of chunks in a training sample, which must hold whole chunks.

    Raises:
        ConfigurationError: S is not a positive multiple of M.
    """
    if chunk_length <= 0 or sequence_length <= 0 or sequence_length % chunk_length:
        raise ConfigurationError(
            "--seq-length",
            f"{sequence_length} is not a positive multiple of the chunk length {chunk_length}",
            "Choose a sequence length that is a multiple of --retro-chunk-length",
        )
    return sequence_length // chunk_length


def padding_mask(tokens: np.ndarray, chunk_length: int, eod: int) -> np.ndarray:
    """Which tokens of aligned documents are padding: in each chunk, all after the first EOD.

    Args:
        tokens: [..., n·M], beginning at a chunk's start.
        chunk_length: M.
        eod: Id of the end-of-document token, which is also the padding.

    Returns:
        bool, of the shape of `tokens`.
    """
    is_end = tokens.reshape(-1, chunk_length) == eod
    return (is_end.cumsum(axis=-1) > is_end).reshape(tokens.shape)
