"""What the tests of evaluation share: documents, a database and neighbors of random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK_LENGTH, NUM_NEIGHBORS, RETRIEVED_CHUNKS, EOD = 8, 2, 2, 0


class Tokens:
    """Sequences of tokens as a `TokenSource`."""

    def __init__(self, sequences: list[np.ndarray]) -> None:
        self.tokens = np.concatenate(sequences)
        self.lengths = np.array([len(sequence) for sequence in sequences])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.num_documents = len(sequences)


def random_documents(lengths: list[int], corpora: list[int] | None = None) -> Any:
    """HeldOutDocuments of these lengths; `corpora` says which of two corpora each is of."""
    from retro_mcore.evaluation.documents import HeldOutDocuments

    generator = np.random.default_rng(1)
    corpora = corpora or [0] * len(lengths)
    texts = [generator.integers(1, 90, length) for length in lengths]
    names = ["books", "code"][: max(corpora) + 1]
    of_corpus = [[i for i, c in enumerate(corpora) if c == corpus] for corpus in range(len(names))]
    return HeldOutDocuments(
        "valid",
        [Tokens([np.append(texts[i], EOD) for i in mine]) for mine in of_corpus],
        names,
        np.array(corpora),
        np.array([of_corpus[corpus].index(i) for i, corpus in enumerate(corpora)]),
        np.array(lengths),
        CHUNK_LENGTH,
        EOD,
    )


class RandomDatabase:
    """`ChunkDatabase.retrieved_tokens` over random chunks."""

    removed = None

    def __init__(self, num_chunks: int = 50) -> None:
        self.chunks = np.random.default_rng(2).integers(1, 90, (num_chunks + 1, CHUNK_LENGTH))

    def __len__(self) -> int:
        return len(self.chunks) - 1

    def retrieved_tokens(self, ids: np.ndarray, num_chunks: int, chunk_length: int, pad_id: int):
        tokens = np.concatenate([self.chunks[ids], self.chunks[ids + 1]], -1)
        mask = np.broadcast_to((ids < 0)[..., None], tokens.shape)
        return np.where(mask, pad_id, tokens), mask.copy()


@dataclass(frozen=True)
class RandomRows:
    """Saved neighbors of `num_rows` chunks."""

    num_rows: int
    num_saved: int = NUM_NEIGHBORS
    not_searched: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.num_rows

    def searched(self) -> np.ndarray:
        return ~np.isin(np.arange(self.num_rows), self.not_searched)

    def rows(self, start: int, end: int) -> np.ndarray:
        every = np.random.default_rng(3).integers(0, 50, (self.num_rows, self.num_saved))
        every[list(self.not_searched)] = -1
        return every[start:end]
