"""The Faiss index over the embeddings of the retrieval database."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from retro_mcore.data.database import ChunkDatabase
from retro_mcore.data.embedders import Embedder, embed_unique
from retro_mcore.data.hdf5 import map_dataset
from retro_mcore.data.shards import Shard, ShardReport, run_shards
from retro_mcore.data.text import chunk_texts
from retro_mcore.data.tokenizers import Tokenizer
from retro_mcore.errors import ConfigurationError, CorruptFileError, MissingDependencyError

#: Up to this many vectors an exact search costs less than it would lose by approximation.
_LARGEST_FLAT = 50_000
_LARGEST_FLAT_LISTS = 1_000_000
_LARGEST_UNCOMPRESSED = 20_000_000
#: Faiss wants this many training vectors per list to place it well.
_VECTORS_PER_LIST = 39
_ADD_BATCH = 65_536


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "faiss", "not installed", "Install retro-mcore[cpu] or [gpu]"
        ) from error
    faiss.omp_set_num_threads(_threads())
    return faiss


def _threads() -> int:
    """This process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class IndexChoice:
    """A Faiss factory string and why it was chosen."""

    string: str
    reason: str


def choose_index_string(num_vectors: int, dimension: int) -> IndexChoice:
    """A factory string that fits the number of vectors.

    The number of lists is about 4·sqrt(n), a power of two, and small enough that each list has
    enough training vectors (Faiss's guidelines for choosing an index).
    """
    if num_vectors <= _LARGEST_FLAT:
        return IndexChoice("Flat", f"{num_vectors} vectors are searched exactly")
    lists = 2 ** round(math.log2(4 * math.sqrt(num_vectors)))
    while lists * _VECTORS_PER_LIST > num_vectors:
        lists //= 2
    if num_vectors <= _LARGEST_FLAT_LISTS:
        return IndexChoice(f"IVF{lists},Flat", f"{num_vectors} vectors in {lists} lists")
    if num_vectors <= _LARGEST_UNCOMPRESSED:
        reason = f"{num_vectors} vectors in {lists} lists, which a graph finds"
        return IndexChoice(f"IVF{lists}_HNSW32,Flat", reason)
    codes = next(code for code in (64, 32, 16, 8, 4, 2, 1) if dimension % code == 0)
    reason = f"{num_vectors} vectors of {dimension} floats are compressed to {codes} bytes"
    return IndexChoice(f"OPQ{codes},IVF{lists}_HNSW32,PQ{codes}", reason)


def embed_database(
    database: ChunkDatabase,
    tokenizer: Tokenizer,
    embedder: Embedder,
    shards: Sequence[Shard],
    fingerprint: str,
) -> ShardReport:
    """Embed every chunk of the database once, on all ranks: f32 [rows, dimension] per file."""

    def build(shard: Shard, path: Path) -> None:
        texts = chunk_texts(tokenizer, database.tokens(range(shard.start, shard.end)))
        with h5py.File(path, "w") as file:
            file["data"] = embed_unique(embedder, texts)

    row_bytes = 4 * embedder.dimension
    return run_shards(shards, build, fingerprint, "embed database", row_bytes)


class Embeddings:
    """The embeddings of a database, memory-mapped across their files."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._starts = np.array([shard.start for shard in shards])
        self._files = [map_dataset(shard.path, "data") for shard in shards]

    def __len__(self) -> int:
        return int(self._starts[-1]) + len(self._files[-1])

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._files[0].shape[1])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """f32 [n, dimension] of rows in any order."""
        result = np.empty((len(ids), self.dimension), np.float32)
        where = np.searchsorted(self._starts, ids, side="right") - 1
        for file in np.unique(where):
            mine = where == file
            result[mine] = self._files[file][ids[mine] - self._starts[file]]
        return result


def train_index(index_string: str, embeddings: Embeddings, sample: np.ndarray) -> Any:
    """A Faiss index trained on the rows `sample`; no vectors are added.

    Raises:
        ConfigurationError: Faiss refuses the string, or cannot train it on so few vectors.
    """
    faiss = _faiss()
    try:
        index = faiss.index_factory(embeddings.dimension, index_string)
    except RuntimeError as error:
        raise ConfigurationError(
            "--index-str",
            f"{index_string!r} for dimension {embeddings.dimension} ({_faiss_message(error)})",
            "Give a Faiss factory string, such as Flat or IVF1024,Flat",
        ) from error
    if index.is_trained:
        return index
    if "HNSW" in index_string:
        faiss.omp_set_num_threads(1)  # threads would race in building the graph
    try:
        index.train(embeddings.rows(sample))
    except RuntimeError as error:
        raise ConfigurationError(
            "--index-str",
            f"{index_string!r} cannot be trained on {len(sample)} vectors "
            f"({_faiss_message(error)})",
            "Choose fewer lists or codes, or leave it out",
        ) from error
    return index


def add_to_index(index: Any, embeddings: Embeddings, index_string: str) -> None:
    """Add all rows, in order: a vector's id is its row."""
    faiss = _faiss()
    if "HNSW" in index_string.split(",")[-1]:
        faiss.omp_set_num_threads(1)  # threads would race in building the graph
    for start in tqdm(range(0, len(embeddings), _ADD_BATCH), desc="add to index"):
        index.add(embeddings.rows(np.arange(start, min(start + _ADD_BATCH, len(embeddings)))))


def stored_bytes(index: Any, count: int) -> int:
    """Bytes that `count` vectors take in an index's file, codes and ids; 0 if Faiss can't say."""
    try:
        return count * (int(index.sa_code_size()) + 8)
    except RuntimeError:  # not every index has codes of one size
        return 0


def save_index(index: Any, path: Path) -> None:
    """Write a Faiss index."""
    _faiss().write_index(index, str(path))


def load_index(path: Path | str, nprobe: int | None = None, ef_search: int | None = None) -> Any:
    """Read a Faiss index and set how broadly it searches.

    Args:
        path: A .faissindex file.
        nprobe: Lists to search, for an index that has lists.
        ef_search: Breadth of the graph search, for an index that has a graph.

    Raises:
        CorruptFileError: Faiss cannot read it.
    """
    faiss = _faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise CorruptFileError(
            path, f"unreadable ({_faiss_message(error)})", "Run build_index again"
        ) from error
    set_search_breadth(index, nprobe, ef_search)
    return index


def set_search_breadth(index: Any, nprobe: int | None, ef_search: int | None) -> None:
    """Set nprobe and efSearch where they are given."""
    parameters = _faiss().ParameterSpace()
    if nprobe is not None:
        parameters.set_index_parameter(index, "nprobe", nprobe)
    if ef_search is not None:
        name = "quantizer_efSearch" if nprobe is not None else "efSearch"
        parameters.set_index_parameter(index, name, ef_search)


def search(index: Any, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest vectors of each query.

    Args:
        index: A Faiss index.
        vectors: f32 [n, dimension].
        k: Neighbors wanted.

    Returns:
        Distances f32 [n, k] and ids i64 [n, k], nearest first; NO_NEIGHBOR (trailing) where the
        index found fewer.
    """
    _faiss()
    return index.search(np.ascontiguousarray(vectors, np.float32), k)


@dataclass(frozen=True)
class Recall:
    """Share of the exact nearest neighbors that the index finds.

    Attributes:
        at: K to recall@K.
        num_queries: Database vectors that were searched for (themselves left out).
        nprobe: Lists searched, None without lists.
        ef_search: Breadth of the graph search, None without a graph.
    """

    at: dict[int, float]
    num_queries: int
    nprobe: int | None
    ef_search: int | None


def measure_recall(
    index: Any,
    embeddings: Embeddings,
    nprobe: int | None = None,
    ef_search: int | None = None,
    target: float = 0.95,
    num_queries: int = 500,
    ks: Sequence[int] = (1, 2, 10),
) -> Recall:
    """Compare with exact search on evenly spaced rows; choose nprobe where it is not given.

    nprobe doubles until recall@2 reaches `target`, or all lists are searched.
    """
    faiss = _faiss()
    total = len(embeddings)
    queries = np.unique(np.linspace(0, total - 1, min(num_queries, total)).astype(np.int64))
    vectors = embeddings.rows(queries)
    ks = [k for k in ks if k < total] or [1]
    exact = _exact_neighbors(embeddings, vectors, queries, max(ks))
    lists = _num_lists(index)
    has_graph = "HNSW" in str(type(faiss.downcast_index(index)).__name__) or (
        lists is not None and "HNSW" in type(_quantizer(index)).__name__
    )
    ef_search = (ef_search or 256) if has_graph else None
    chosen = None if lists is None else (nprobe or 1)
    while True:
        set_search_breadth(index, chosen, ef_search)
        found = _without_self(search(index, vectors, max(ks) + 1)[1], queries)
        at = {k: _overlap(found[:, :k], exact[:, :k]) for k in ks}
        enough = at.get(2, at[ks[0]]) >= target
        if chosen is None or lists is None or nprobe is not None or enough or chosen >= lists:
            return Recall(at, len(queries), chosen, ef_search)
        chosen = min(2 * chosen, lists)


def _num_lists(index: Any) -> int | None:
    try:
        return int(_faiss().extract_index_ivf(index).nlist)
    except RuntimeError:
        return None


def _quantizer(index: Any) -> Any:
    faiss = _faiss()
    return faiss.downcast_index(faiss.extract_index_ivf(index).quantizer)


def _exact_neighbors(
    embeddings: Embeddings, vectors: np.ndarray, queries: np.ndarray, k: int
) -> np.ndarray:
    """Ids [n, k] by exhaustive search, a batch of rows in memory at a time."""
    faiss = _faiss()
    heap = faiss.ResultHeap(len(vectors), k + 1)
    for start in range(0, len(embeddings), _ADD_BATCH):
        rows = np.arange(start, min(start + _ADD_BATCH, len(embeddings)))
        distances, ids = faiss.knn(vectors, embeddings.rows(rows), min(k + 1, len(rows)))
        heap.add_result(distances, ids.astype(np.int64) + start)
    heap.finalize()
    return _without_self(heap.I, queries)


def _without_self(ids: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Drop each query's own row, or the last candidate where it is not among them."""
    keep = ids != queries[:, None]
    keep[keep.all(axis=1), -1] = False
    return ids[keep].reshape(len(ids), -1)


def _overlap(found: np.ndarray, exact: np.ndarray) -> float:
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True))
    return float(hits / exact.size) if exact.size else 1.0


def _faiss_message(error: RuntimeError) -> str:
    return str(error).splitlines()[0].split("Error: ")[-1].strip()
