"""Documents as overlapping windows: every token but the first is predicted once.

The first window of a document counts in full, every later one only for what its predecessor did
not reach, so that those tokens have the overlap before them. Windows start at chunk boundaries, so
a chunk is the same chunk, with the same neighbors, in each.

Shapes: B windows of a batch, S their padded length, M chunk length, L chunks, K neighbors,
R retrieved length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.documents import HeldOutDocuments
from retro_mcore.evaluation.neighbor_sources import NeighborRows
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.samples.batch import RetroBatch


class Window(NamedTuple):
    """A part of a document that the model reads at once.

    Attributes:
        document: The document.
        start: Its first token that is read.
        length: Tokens that are read; the last one's successor is predicted too.
        scored_from: The first of its positions whose prediction counts.
    """

    document: int
    start: int
    length: int
    scored_from: int


def check_stride(stride: int, sequence_length: int, chunk_length: int) -> None:
    """Refuse windows that would leave a gap or cut a chunk.

    Raises:
        ConfigurationError: naming the flag.
    """
    if not 0 < stride <= sequence_length or stride % chunk_length:
        raise ConfigurationError(
            "--overlapping-eval",
            f"windows of {sequence_length} tokens that advance by {stride}",
            f"Give a multiple of the chunk length {chunk_length}, at most the window",
        )


def plan_windows(lengths: Sequence[int], sequence_length: int, stride: int) -> list[Window]:
    """The windows of documents of these lengths.

    Args:
        lengths: Tokens of each document, at least 2.
        sequence_length: Tokens that the model reads at once.
        stride: How far a window starts behind its predecessor.
    """
    windows = []
    for document, length in enumerate(lengths):
        start = reached = 0
        while reached < length - 1:
            stop = min(start + sequence_length, length - 1)
            windows.append(Window(document, start, stop - start, reached - start))
            start, reached = start + stride, stop
    return windows


def plan_batches(windows: Sequence[Window], batch_size: int) -> list[list[Window]]:
    """Batches of windows of similar lengths, the longest first."""
    ordered = sorted(windows, key=lambda window: -window.length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@dataclass(frozen=True)
class WindowReader:
    """Batches of windows, with the neighbors of their chunks.

    Attributes:
        documents: The documents.
        neighbors: Those of each chunk of the documents; None reads without retrieval.
        database: The retrieval database.
        num_neighbors: K.
        num_retrieved_chunks: Chunks per neighbor, itself included.
        divisor: Lengths are padded to a multiple of it (and of M).
    """

    documents: HeldOutDocuments
    neighbors: NeighborRows | None
    database: ChunkDatabase
    num_neighbors: int
    num_retrieved_chunks: int
    divisor: int = 1

    def read(
        self, batches: Sequence[Sequence[Window]], numbers: Sequence[int], device: torch.device
    ) -> Iterator[RetroBatch]:
        """The batches of these numbers, whose sample ids are the numbers of the windows there."""
        for number in numbers:
            yield self.batch(batches[number]).to(device)

    def batch(self, windows: Sequence[Window]) -> RetroBatch:
        """One batch; its loss mask says what counts."""
        multiple = math.lcm(self.documents.chunk_length, self.divisor)
        padded = -(-max(window.length for window in windows) // multiple) * multiple
        tokens = np.full((len(windows), padded + 1), self.documents.eod, np.int64)
        counts = np.zeros((len(windows), padded), np.float32)
        for row, window in enumerate(windows):
            text = self.documents.tokens(window.document)
            text = text[window.start : window.start + window.length + 1]
            tokens[row, : len(text)] = text
            counts[row, window.scored_from : window.length] = 1
        return RetroBatch.from_text(
            torch.from_numpy(tokens),
            self._retrieved(windows, padded // self.documents.chunk_length),
            torch.from_numpy(counts),
            sample_ids=range(len(windows)),
        )

    def _retrieved(
        self, windows: Sequence[Window], num_chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Tokens and mask [B, L, K, R]; chunks that a window does not complete have none."""
        if self.neighbors is None:
            return None
        chunk_length, first_rows = self.documents.chunk_length, self.documents.first_rows
        ids_BLK = np.full((len(windows), num_chunks, self.num_neighbors), NO_NEIGHBOR, np.int64)
        for place, window in enumerate(windows):
            complete = window.length // chunk_length
            row = int(first_rows[window.document]) + window.start // chunk_length
            ids_LK = self.neighbors.rows(row, row + complete) if complete else ids_BLK[0, :0]
            ids_BLK[place, :complete] = ids_LK[:, : self.num_neighbors]
        tokens, mask = self.database.retrieved_tokens(
            ids_BLK, self.num_retrieved_chunks, chunk_length, self.documents.eod
        )
        return torch.from_numpy(tokens), torch.from_numpy(mask)
