"""Train an index (coarse lists, transforms and codes) on a sample of the vectors."""

from __future__ import annotations

import logging
import os
from enum import Enum
from typing import Any

import numpy as np

from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.index.library import faiss_library, faiss_threads, message_of
from retro_mcore.retrieval.index.packing import is_packed

#: Number of vectors per list that Faiss uses for k-means, or for training codes without lists.
_VECTORS_PER_LIST = 256
#: With fewer, Faiss warns.
_FEWEST_PER_LIST = 39
_VECTORS_FOR_CODES = 65_536
#: From these on SuperKMeans (Kuffo et al. 2026) is faster than Lloyd's algorithm and as good. For
#: vectors near the unit sphere, as embeddings are, at least 4096 lists (faiss/SuperKMeans.h).
_FEWEST_FAST_LISTS = 4096
_LEAST_FAST_DIMENSION = 128
_CLUSTERING = ("niter", "seed", "min_points_per_centroid", "max_points_per_centroid")
#: Up to this many vectors, threads would spend most of their time waiting for one another.
_FEW_VECTORS = 10_000

_LOG = logging.getLogger(__name__)


class IndexKind(Enum):
    """Ways in which an index can be filled in parts and merged."""

    #: Inverted lists: parts are merged list by list.
    LISTS = "lists"
    #: Inverted lists in blocks for fast scans: parts hold single codes, and are packed at the end.
    PACKED = "packed"
    #: An array of codes, searched exhaustively: parts are concatenated.
    CODES = "codes"
    #: Graphs and everything else that cannot be merged: filled by one process.
    WHOLE = "whole"


WITH_LISTS = (IndexKind.LISTS, IndexKind.PACKED)
_LISTS = ("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer", "IndexIVFRaBitQ")
_CODES = ("IndexFlat", "IndexFlatL2", "IndexPQ", "IndexScalarQuantizer", "IndexRaBitQ")
#: Coarse quantizers that need no training beyond their centroids.
QUANTIZERS = ("IndexFlat", "IndexFlatL2", "IndexHNSWFlat")


def innermost(index: Any) -> Any:
    """The index below transforms such as OPQ, downcast to its class."""
    faiss = faiss_library()
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def kind_of(index: Any) -> IndexKind:
    """The way in which `index` can be filled."""
    inner = innermost(index)
    name = type(inner).__name__
    if name in _LISTS:
        return IndexKind.LISTS
    if is_packed(inner):
        return IndexKind.PACKED
    return IndexKind.CODES if name in _CODES else IndexKind.WHOLE


def make_index(index_string: str, dimension: int) -> Any:
    """Make an untrained Faiss index.

    Raises:
        ConfigurationError: Faiss does not know the string, or it does not fit the dimension.
    """
    try:
        return faiss_library().index_factory(dimension, index_string)
    except RuntimeError as error:
        raise ConfigurationError(
            "--index",
            f"{index_string!r} for dimension {dimension} ({message_of(error)})",
            "Give auto, or a Faiss factory string such as Flat or IVF1024,Flat",
        ) from error


def train_index(
    index_string: str,
    embeddings: Embeddings,
    sample: np.ndarray,
    memory: int | None = None,
    gpu: bool = False,
) -> Any:
    """Train a Faiss index on rows of the database; no vectors are added.

    Rounding in training depends on the number of threads. So it uses all cores of the machine (one
    core for few vectors), no matter how many ranks share them.

    Args:
        index_string: Faiss factory string.
        embeddings: The database's vectors.
        sample: Rows to train on; evenly spaced ones of them if Faiss would not use all.
        memory: Bytes that the training vectors may take.
        gpu: Cluster on the GPUs.

    Raises:
        ConfigurationError: Faiss rejects the string, or there are too few training vectors.
    """
    index = make_index(index_string, embeddings.dimension)
    if index.is_trained:
        return index
    rows = training_rows(index, sample, embeddings.dimension, memory)
    _LOG.info("train index: on %d of %d vectors", len(rows), len(sample))
    lists = num_lists(index) or 0
    if len(rows) < min(_FEWEST_PER_LIST * lists, len(sample)):
        _LOG.warning(
            "--index-memory leaves %d training vectors for %d lists. Faiss advises %d for each: "
            "give more memory, or an --index of fewer lists",
            *(len(rows), lists, _FEWEST_PER_LIST),
        )
    try:
        with faiss_threads((os.cpu_count() or 1) if len(rows) > _FEW_VECTORS else 1):
            train(index, embeddings.rows(rows), gpu)
    except RuntimeError as error:
        raise ConfigurationError(
            "--index",
            f"{index_string!r} cannot be trained on {len(rows)} vectors ({message_of(error)})",
            "Choose fewer lists or codes, or auto",
        ) from error
    return index


def training_rows(
    index: Any, sample: np.ndarray, dimension: int, memory: int | None = None
) -> np.ndarray:
    """Choose the rows of `sample` that training uses, evenly spaced."""
    lists = num_lists(index)
    most = max(_VECTORS_FOR_CODES, _VECTORS_PER_LIST * (lists or 0))
    if memory is not None:
        most = min(most, max(memory // (2 * 4 * dimension), 1))  # SuperKMeans copies them
    if len(sample) <= most:
        return sample
    return sample[np.linspace(0, len(sample) - 1, most).astype(np.int64)]


def train(index: Any, vectors: np.ndarray, gpu: bool = False) -> None:
    """Train transforms, then lists, then codes, as Faiss does, on vectors [n, dimension]."""
    faiss = faiss_library()
    inner = innermost(index)
    if kind_of(index) not in WITH_LISTS:
        with faiss_threads(1 if has_graph(index) else faiss.omp_get_max_threads()):
            index.train(vectors)  # threads would race in building a graph
        return
    outer = faiss.downcast_index(index)
    while isinstance(outer, faiss.IndexPreTransform):
        for position in range(outer.chain.size()):
            transform = faiss.downcast_VectorTransform(outer.chain.at(position))
            if not transform.is_trained:
                transform.train(vectors)
            vectors = transform.apply(vectors)
        outer = faiss.downcast_index(outer.index)
    if type(faiss.downcast_index(inner.quantizer)).__name__ in QUANTIZERS:
        _train_lists(inner, vectors, gpu)
    with faiss_threads(1 if has_graph(index) else faiss.omp_get_max_threads()):
        inner.train(vectors)
    _mark_trained(index)


def _train_lists(ivf: Any, vectors: np.ndarray, gpu: bool) -> None:
    """Run k-means and add the centroids to the quantizer, which may be a graph."""
    centroids = _centroids(ivf, vectors, gpu)
    ivf.quantizer.reset()
    with faiss_threads(1):  # threads would race when building a graph
        ivf.quantizer.train(centroids)
        ivf.quantizer.add(centroids)


def _centroids(ivf: Any, vectors: np.ndarray, gpu: bool) -> np.ndarray:
    """Cluster `vectors` into the lists of an index, f32 [lists, dimension]."""
    faiss = faiss_library()
    if not gpu and _clusters_fast(ivf):
        parameters = faiss.SuperKMeansParameters()
        for name in _CLUSTERING:
            setattr(parameters, name, getattr(ivf.cp, name))
        clustering = faiss.SuperKMeans(ivf.d, ivf.nlist, parameters)
        clustering.train(vectors)
        return faiss.vector_to_array(clustering.centroids).reshape(ivf.nlist, ivf.d)
    clustering, flat = faiss.Clustering(ivf.d, ivf.nlist, ivf.cp), faiss.IndexFlatL2(ivf.d)
    if gpu:
        _LOG.info("clustering of %d vectors runs on %d GPUs", len(vectors), faiss.get_num_gpus())
        flat = faiss.index_cpu_to_all_gpus(flat)
    clustering.train(vectors, flat)
    return faiss.vector_to_array(clustering.centroids).reshape(ivf.nlist, ivf.d)


def _clusters_fast(ivf: Any) -> bool:
    """Whether SuperKMeans clusters these lists: faster, and for fewer its bounds do not hold."""
    there = hasattr(faiss_library(), "SuperKMeans")  # from 1.14.2 on
    return there and ivf.nlist >= _FEWEST_FAST_LISTS and ivf.d >= _LEAST_FAST_DIMENSION


def _mark_trained(index: Any) -> None:
    faiss = faiss_library()
    outer = faiss.downcast_index(index)
    while isinstance(outer, faiss.IndexPreTransform):
        outer.is_trained = True
        outer = faiss.downcast_index(outer.index)


def num_lists(index: Any) -> int | None:
    """Number of lists; None for an index without lists."""
    try:
        return int(faiss_library().extract_index_ivf(index).nlist)
    except RuntimeError:
        return None


def graph_of(index: Any) -> Any | None:
    """The graph over the vectors or over the lists that a search walks; None if there is none."""
    faiss = faiss_library()
    graph = innermost(index)
    if num_lists(index) is not None:
        graph = faiss.downcast_index(faiss.extract_index_ivf(index).quantizer)
    return graph if any(hasattr(graph, kind) for kind in ("hnsw", "nsg")) else None


def has_graph(index: Any) -> bool:
    """Whether a search walks a graph over the vectors or over the lists."""
    return graph_of(index) is not None
