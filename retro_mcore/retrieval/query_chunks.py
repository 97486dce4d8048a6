"""The chunks of samples that neighbors are searched for, read in ranges of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from retro_mcore.retrieval.filtering import SampleRows


class QuerySamples(Protocol):
    """A split's samples, as the search reads them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Read a sample: tokens i64 [S+1], dataset number and document ids."""


def read_chunks(
    samples: QuerySamples, start: int, end: int, chunk_length: int
) -> tuple[list[np.ndarray], list[SampleRows]]:
    """Read rows [start, end): their tokens and samples. Each sample is read once."""
    chunks: list[np.ndarray] = []
    owners: list[SampleRows] = []
    for sample, first, last in _cut_by_sample(samples, start, end, chunk_length):
        tokens, dataset, documents = samples.read(sample)
        rows = tokens[first * chunk_length : last * chunk_length].reshape(-1, chunk_length)
        owners.append(SampleRows(len(chunks), len(chunks) + len(rows), dataset, documents))
        chunks.extend(rows)
    return chunks, owners


def _cut_by_sample(
    samples: QuerySamples, start: int, end: int, chunk_length: int
) -> Iterator[tuple[int, int, int]]:
    """Yield each sample of rows [start, end), with its first and last chunk (exclusive)."""
    per_sample = (len(samples.read(0)[0]) - 1) // chunk_length
    while start < end:
        sample, first = divmod(start, per_sample)
        last = min(per_sample, first + end - start)
        yield sample, first, last
        start += last - first
