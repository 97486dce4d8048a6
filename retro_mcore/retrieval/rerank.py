"""Reorder candidates by BM25 over their tokens.

Doostmohammadi et al. 2023, "Surface-based retrieval reduces perplexity of retrieval-augmented
language models": reranking Retro's dense candidates by BM25 is cheap and gives part of the gain of
a BM25 search. BM25 libraries index a whole corpus. Here, a few candidates of each query are scored
directly from the token file, without an index.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import CorruptFileError
from retro_mcore.project.arrays import load_array, save_array
from retro_mcore.project.markers import FileState, fingerprint_of, signed_write, state_of, verify
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import input_digests
from retro_mcore.retrieval.database import ChunkDatabase

#: Robertson and Zaragoza 2009: saturation of repetitions, and weight of the length.
K1, B = 1.2, 0.75
#: Number of chunks in which document frequencies are counted.
_COUNTED = 1_000_000
_COUNT_BATCH = 8192


def count_tokens(database: ChunkDatabase, vocab_size: int) -> np.ndarray:
    """Count the chunks of the database that contain each token, f64 [vocab_size + 2].

    In a large database, evenly spaced chunks are counted. The last two entries are the number of
    chunks and their mean length.
    """
    count = min(len(database), _COUNTED)
    rows = np.linspace(0, len(database) - 1, count).astype(np.int64)
    frequencies, total = np.zeros(vocab_size, np.int64), 0
    for batch in np.array_split(rows, math.ceil(count / _COUNT_BATCH)):
        chunks = database.tokens(batch)
        lengths = [len(chunk) for chunk in chunks]
        chunk_of = np.repeat(np.arange(len(chunks)), lengths)
        pairs = np.unique(chunk_of * vocab_size + np.concatenate(chunks).astype(np.int64))
        frequencies += np.bincount(pairs % vocab_size, minlength=vocab_size)
        total += sum(lengths)
    return np.concatenate([frequencies, [count, total / count]]).astype(np.float64)


def save_token_counts(database: ChunkDatabase, vocab_size: int, paths: ProjectPaths) -> None:
    """Count a project's database for `load_reranker`, unless its counts are saved already.

    Args:
        database: The database of the project.
        vocab_size: Size of the vocabulary.
        paths: The project.
    """
    fingerprint = fingerprint_of(input_digests(paths, [paths.merged_db("train")]))
    if state_of(paths.token_counts, fingerprint) is FileState.COMPLETE:
        return
    with signed_write(paths.token_counts, fingerprint) as temporary:
        save_array(temporary, count_tokens(database, vocab_size))


class BM25:
    """Scores chunks of a database against a query chunk, over token ids.

    Args:
        database: The retrieval database.
        counts: From `count_tokens`.
        chunk_length: M.
    """

    def __init__(self, database: ChunkDatabase, counts: np.ndarray, chunk_length: int) -> None:
        self._database, self._chunk_length = database, chunk_length
        frequencies, total, self._mean_length = counts[:-2], counts[-2], counts[-1]
        self._idf = np.log1p((total - frequencies + 0.5) / (frequencies + 0.5))
        self._term = np.full(len(frequencies) + 1, -1, np.int64)

    def over(self, database: ChunkDatabase) -> BM25:
        """The same weights for the chunks of another database."""
        other = copy.copy(self)
        other._database = database
        return other

    def scores(self, query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """BM25 of candidate chunks, f64 [n].

        Args:
            query: Tokens of a chunk; each occurrence counts.
            candidates: Chunk ids [n].
        """
        tokens, padded = self._database.padded_tokens(candidates, self._chunk_length, 0)
        terms, occurrences = np.unique(query, return_counts=True)
        self._term[terms] = np.arange(len(terms))
        term = np.where(padded, -1, self._term[tokens])
        self._term[terms] = -1
        rows, columns = np.nonzero(term >= 0)
        shape = (len(candidates), len(terms))
        frequency = np.bincount(
            rows * len(terms) + term[rows, columns], minlength=shape[0] * shape[1]
        ).reshape(shape)
        lengths = (~padded).sum(axis=1)
        norm = K1 * (1 - B + B * lengths / self._mean_length)
        weights = occurrences * self._idf[terms] * (K1 + 1)
        return (frequency / (frequency + norm[:, None])) @ weights

    def order(self, queries: Sequence[np.ndarray], candidates: np.ndarray) -> np.ndarray:
        """Order [rows, n] that sorts each row's candidates [rows, n] by descending score.

        Equal scores keep their order, and NO_NEIGHBOR (trailing) stays last.
        """
        order = np.tile(np.arange(candidates.shape[1]), (len(candidates), 1))
        for row, (query, ids) in enumerate(zip(queries, candidates, strict=True)):
            present = ids[ids != NO_NEIGHBOR]
            order[row, : len(present)] = np.argsort(-self.scores(query, present), kind="stable")
        return order

    def reorder(
        self, queries: Sequence[np.ndarray], candidates: np.ndarray, distances: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates and their distances, both [rows, n], in `order`."""
        order = self.order(queries, candidates)
        return (
            np.take_along_axis(candidates, order, axis=1),
            np.take_along_axis(distances, order, axis=1),
        )


def load_reranker(
    rerank: str | None,
    paths: ProjectPaths,
    database: ChunkDatabase,
    chunk_length: int,
    vocab_size: int | None = None,
) -> BM25 | None:
    """Load the reranker of a project; None: candidates are ordered by distance.

    Args:
        rerank: `ProjectSettings.rerank` of the project whose chunks are the queries.
        paths: The project whose database is searched.
        database: That database.
        chunk_length: M.
        vocab_size: Size of the project's vocabulary, if known.

    Raises:
        CorruptFileError: the token counts that query_neighbors saved are damaged.
    """
    if rerank is None:
        return None
    hint = f"Remove it, and run query_neighbors --project-dir {paths.root} again"
    verify(paths.token_counts, hint)
    shape = None if vocab_size is None else (vocab_size + 2,)
    counts = load_array(paths.token_counts, shape, "f", hint)
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts[-2:].all()):
        raise CorruptFileError(paths.token_counts, "holds values that are not counts", hint)
    return BM25(database, counts, chunk_length)
