"""Divide documents into overlapping windows that predict every token but the first once.

The first window of a document is scored in full. Later windows score only tokens after the
previous window, with the overlap as context. Windows start at chunk boundaries, so a chunk has the
same tokens and neighbors in every window.

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
    """A window of a document.

    Attributes:
        document: The document.
        start: First token of the window.
        length: Number of input tokens; the token after the last one is predicted too.
        scored_from: First position whose prediction counts.
    """

    document: int
    start: int
    length: int
    scored_from: int


def check_stride(stride: int, sequence_length: int, chunk_length: int) -> None:
    """Reject windows that would leave a gap or split a chunk.

    Raises:
        ConfigurationError: the stride is invalid. Names the flag.
    """
    if not 0 < stride <= sequence_length or stride % chunk_length:
        raise ConfigurationError(
            "--overlapping-eval",
            f"windows of {sequence_length} tokens that advance by {stride}",
            f"Give a multiple of the chunk length {chunk_length}, at most the window",
        )


def plan_windows(lengths: Sequence[int], sequence_length: int, stride: int) -> list[Window]:
    """Plan the windows of documents with these lengths.

    Args:
        lengths: Number of tokens of each document, at least 2.
        sequence_length: Window length in tokens.
        stride: Tokens from one window's start to the next.
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
    """Group windows of similar length into batches, longest first."""
    ordered = sorted(windows, key=lambda window: -window.length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@dataclass(frozen=True)
class WindowReader:
    """Reads batches of windows with the neighbors of their chunks.

    Attributes:
        documents: The documents.
        neighbors: Neighbors of each chunk of the documents; None disables retrieval.
        database: The retrieval database.
        num_neighbors: K.
        num_retrieved_chunks: Chunks per neighbor, including the neighbor itself.
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
        """Read the batches with these numbers; their sample ids are indexes of the windows."""
        for number in numbers:
            yield self.batch(batches[number]).to(device)

    def batch(self, windows: Sequence[Window]) -> RetroBatch:
        """Build one batch; its loss mask marks the scored positions."""
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
        """Tokens and mask [B, L, K, R]; chunks incomplete in a window have no neighbors."""
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
