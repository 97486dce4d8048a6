"""Faiss indexes side by side: recall, bytes, speed and training time.

    python -m benchmarks.index_choice                                 # 50,000 clustered vectors
    python -m benchmarks.index_choice --project-dir /data/wiki --vectors 500000
    python -m benchmarks.index_choice --index RR,IVF1024,RaBitQ4 IVF1024,PQ96x4fs

One thread, processor seconds. See benchmarks/README.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.command import run_command
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.index import HeldOut, search, set_search_breadth, stored_bytes
from retro_mcore.retrieval.index.filling import add_rows
from retro_mcore.retrieval.index.library import faiss_threads
from retro_mcore.retrieval.index.recall import (
    exact_neighbors,
    recall_at,
    rounding_of,
    squared_distances,
)
from retro_mcore.retrieval.index.rescoring import rescored
from retro_mcore.retrieval.index.training import num_lists, train_index
from retro_mcore.stages.stored_vectors import stored_vectors

#: {D} is the dimension, {L} the number of lists.
_INDEXES = (
    "IVF{L},Flat", "IVF{L},SQfp16", "IVF{L},SQ8", "IVF{L},SQ6", "IVF{L},SQ4",
    "IVF{L},RaBitQ8", "IVF{L},RaBitQ6", "IVF{L},RaBitQ4", "IVF{L},RaBitQ2", "IVF{L},RaBitQ",
    "RR{D},IVF{L},RaBitQ4", "RR{D},IVF{L},RaBitQ",
    "IVF{L},RaBitQfs4", "IVF{L},RaBitQfs2", "IVF{L},RaBitQfs",
    "IVF{L},PQ{H}x4fs", "IVF{L},PQ{Q}x4fs", "IVF{L},PQ{Q}np", "IVF{L},PQ48np",
)  # fmt: skip


@dataclass
class Options:
    """Compare Faiss indexes on one set of vectors."""

    vectors: int = 50_000
    """Vectors in the index."""
    dimension: int = 384
    """Of synthetic vectors: clusters in 48 dimensions with noise in all, on the unit sphere."""
    project_dir: Path | None = None
    """Take the vectors of this project instead, after build_index."""
    lists: int = 256
    """Lists of each index."""
    nprobe: int = 16
    """Lists searched per query."""
    queries: int = 1000
    """Vectors that are searched; none of them is in the index."""
    candidates: int = 100
    """Candidates per query, as in query_neighbors."""
    index: list[str] = field(default_factory=list)
    """Faiss factory strings in place of the usual ones."""
    json: Path | None = None
    """Write all measurements here."""


@dataclass
class Row:
    """Measurements of one index."""

    index: str
    bytes: float
    train: float
    add: float
    queries: float
    recall: float
    recall_rescored: float


class Vectors:
    """Vectors in memory, with the face of `Embeddings`."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self.dimension = rows, rows.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows by number."""
        return self._rows[ids]

    def range(self, start: int, end: int) -> np.ndarray:
        """Consecutive rows."""
        return self._rows[start:end]


def clustered(count: int, dimension: int) -> np.ndarray:
    """Clusters of about 40 vectors in 48 dimensions, noise in all, of length 1."""
    random = np.random.default_rng(0)
    inner = 48
    centers = random.normal(size=(max(1, count // 40), inner))
    rows = centers[random.integers(0, len(centers), count)] + 0.7 * random.normal(
        size=(count, inner)
    )
    spread = random.normal(size=(inner, dimension)) * np.linspace(1.5, 0.3, inner)[:, None]
    result = rows @ spread + random.normal(size=(count, dimension))
    return (result / np.linalg.norm(result, axis=1, keepdims=True)).astype(np.float32)


def project_vectors(folder: Path, count: int) -> np.ndarray:
    """Evenly spaced stored vectors of a project, in random order."""
    files = stored_vectors(ProjectPaths(folder))
    rows = files.open()
    total = files.shards[-1].end
    ids = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
    return np.random.default_rng(0).permutation(rows.rows(ids))


def measure(options: Options) -> list[Row]:
    """Measure all indexes; prints a line for each."""
    wanted = options.vectors + options.queries
    folder = options.project_dir
    rows = project_vectors(folder, wanted) if folder else clustered(wanted, options.dimension)
    queries, vectors = rows[: options.queries], Vectors(rows[options.queries :])
    held_out = HeldOut(queries, np.full(len(queries), NO_NEIGHBOR))
    exact = exact_neighbors(vectors, held_out, Shard(0, len(vectors), Path()))[1]  # type: ignore[arg-type]
    print(f"{len(vectors)} x {vectors.dimension}, {options.lists} lists, nprobe {options.nprobe}")
    print(
        "| index | bytes per vector | training, s | adding, s | queries/s | recall@2 | re-scored |"
    )
    print("|---|---|---|---|---|---|---|")
    result = []
    for string in _strings(options, vectors.dimension):
        row = _row(string, options, vectors, queries, exact)
        result.append(row)
        print(
            f"| `{row.index}` | {row.bytes:.0f} | {row.train:.1f} | {row.add:.1f} | "
            f"{row.queries:.0f} | {row.recall:.3f} | {row.recall_rescored:.3f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in result], indent=4))
    return result


def _strings(options: Options, dimension: int) -> Iterator[str]:
    for form in options.index or _INDEXES:
        yield form.format(L=options.lists, D=dimension, H=dimension // 2, Q=dimension // 4)


def _row(
    string: str, options: Options, vectors: Vectors, queries: np.ndarray, exact: np.ndarray
) -> Row:
    sample = np.arange(len(vectors))
    with faiss_threads(1):
        index, train = _timed(lambda: train_index(string, vectors, sample))  # type: ignore[arg-type]
        _, add = _timed(lambda: add_rows(index, vectors.rows(sample), sample))
    if num_lists(index) is not None:
        set_search_breadth(index, options.nprobe, None)
    search(index, queries[:128], 10)  # starts the threads
    (_, ids), seconds = _timed(lambda: search(index, queries, options.candidates))
    again = rescored(vectors, queries, ids)[1]  # type: ignore[arg-type]
    return Row(
        string,
        _code_bytes(index),
        train,
        add,
        len(queries) / seconds,
        _recall(vectors, queries, exact, ids),
        _recall(vectors, queries, exact, again),
    )


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call, and its processor seconds on all threads."""
    start = time.process_time()
    return call(), time.process_time() - start


def _code_bytes(index: object) -> float:
    """Bytes of a vector's code and id."""
    return stored_bytes(index, 1)


def _recall(vectors: Vectors, queries: np.ndarray, exact: np.ndarray, ids: np.ndarray) -> float:
    """Recall@2 by distance, as build_index measures it."""

    def distances(found: np.ndarray) -> np.ndarray:
        rows = vectors.rows(np.maximum(found, 0).ravel()).reshape(*found.shape, -1)
        return squared_distances(queries, rows, found)

    rounding = rounding_of(queries, vectors.rows(exact[:, 0]))
    return recall_at(2, distances(ids[:, :2]), distances(exact[:, :2]), rounding)


def main() -> int:
    """The command line."""
    return run_command(Options, measure)


if __name__ == "__main__":
    sys.exit(main())
