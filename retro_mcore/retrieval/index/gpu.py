"""Faiss on GPUs, if its GPU build is installed and there is a GPU.

An index that Faiss's GPU code does not support, or that does not fit, stays on the CPU. The log
says once per step what runs where, and why.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np

from retro_mcore import launcher
from retro_mcore.retrieval.index.faiss_search import search
from retro_mcore.retrieval.index.library import faiss_library, message_of
from retro_mcore.retrieval.index.training import has_graph, innermost, num_lists

#: Largest nprobe and k of Faiss's own GPU code, and of cuVS (faiss/gpu/impl/IndexUtils.cu).
_MOST, _MOST_CUVS = 2048, 16384
#: Up to this many lists, a GPU compares each query with all centroids. Beyond, the graph over the
#: centroids is searched on the CPU.
_MOST_CENTROIDS = 1 << 20
#: Shared memory of a block, which holds the tables of PQ codes (faiss/gpu/GpuIndexIVFPQ.cu): those
#: of 48 bytes in single precision, of 96 in half.
_TABLE_BYTES = 48 << 10
#: Faiss's messages about an index that its GPU code does not support, or that does not fit.
_UNSUPPORTED = re.compile(r"not implemented|support|Bits per code|shared memory", re.IGNORECASE)
_NO_MEMORY = re.compile(r"alloc fail|memory allocation|out of memory|bad_alloc", re.IGNORECASE)

_LOG = logging.getLogger(__name__)


def num_gpus() -> int:
    """Number of GPUs that Faiss can use; 0 in its CPU build."""
    return int(getattr(faiss_library(), "get_num_gpus", lambda: 0)())


class GpuIndex:
    """An index that is searched on this rank's GPU, or on the CPU where k is too large for that.

    Args:
        copy: The index on the GPU.
        index: The same index on the CPU.
        most: Largest k of the GPU.
    """

    def __init__(self, copy: Any, index: Any, most: int) -> None:
        self._copy, self._index, self._most = copy, index, most
        self.d, self.ntotal = index.d, index.ntotal

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search the k nearest vectors of each query; rows may be unsorted."""
        if k <= self._most:
            return self._copy.search(vectors, k)
        log_once(f"searches of more than {self._most} neighbors run on the CPU")
        return search(self._index, vectors, k)


def to_gpu(index: Any, step: str) -> Any | None:
    """Copy an index to this rank's GPU.

    Args:
        index: A Faiss index.
        step: What the copy is for, as the log says it.

    Returns:
        The copy; None if Faiss does not support such an index on a GPU, or it does not fit.

    Raises:
        RuntimeError: any other error of Faiss.
    """
    faiss = faiss_library()
    device = launcher.local_rank() % num_gpus()
    resources = faiss.StandardGpuResources()
    graph, options = _graph_of(index), _cloner_options(index)
    flat = graph is not None and graph.ntotal <= _MOST_CENTROIDS
    try:
        with _flat_quantizer(index, graph) if flat else nullcontext():
            copy = faiss.index_cpu_to_gpu(resources, device, index, options)
    except (RuntimeError, MemoryError) as error:
        log_once(f"{step} runs on the CPU: {_refusal(error)}")
        return None
    copy.referenced_objects = [resources]
    how = ""
    if graph is not None:
        how = ", all centroids compared" if flat else ", the graph over the centroids on the CPU"
    if _has_large_tables(index):
        how += ", tables of its codes in half precision"
    log_once(f"{step} runs on GPUs{how}")
    return copy


def to_gpu_for_search(index: Any, k: int, nprobe: int | None) -> Any:
    """Put `index` on this rank's GPU if it can be searched there as asked, else return it."""
    most = _MOST_CUVS if getattr(_cloner_options(index), "use_cuvs", False) else _MOST
    for value, name in ((nprobe or 0, "nprobe"), (k, "the number of candidates")):
        if value > most:
            log_once(f"search runs on the CPU: {name} is {value}, and a GPU takes at most {most}")
            return index
    copy = to_gpu(index, "search")
    return index if copy is None else GpuIndex(copy, index, most)


def _cloner_options(index: Any) -> Any:
    """Options for copying `index` to a GPU."""
    options = faiss_library().GpuClonerOptions()
    graph = _graph_of(index)
    if graph is not None and graph.ntotal > _MOST_CENTROIDS:
        options.allowCpuCoarseQuantizer = True
        if hasattr(options, "use_cuvs"):  # from 1.10 on
            options.use_cuvs = False  # takes no quantizer on the CPU
    if _has_large_tables(index):
        options.useFloat16 = True
    return options


def _has_large_tables(index: Any) -> bool:
    """Whether the tables of PQ codes in lists do not fit a GPU's block in single precision."""
    pq = getattr(innermost(index), "pq", None) if num_lists(index) is not None else None
    return pq is not None and 4 * pq.M << pq.nbits > _TABLE_BYTES


def _graph_of(index: Any) -> Any | None:
    """The graph over the lists of an index; None if it has none."""
    if num_lists(index) is None or not has_graph(index):
        return None
    faiss = faiss_library()
    return faiss.downcast_index(faiss.extract_index_ivf(index).quantizer)


@contextmanager
def _flat_quantizer(index: Any, graph: Any) -> Iterator[None]:
    """Inside the block, `index` compares all centroids instead of walking the graph over them."""
    faiss = faiss_library()
    ivf = faiss.extract_index_ivf(index)
    flat, owned = faiss.IndexFlatL2(ivf.d), ivf.own_fields
    flat.add(graph.reconstruct_n(0, graph.ntotal))
    ivf.quantizer, ivf.own_fields = flat, False
    flat.this.own(True)  # the assignment took it over
    try:
        yield
    finally:
        ivf.quantizer, ivf.own_fields = graph, owned


def _refusal(error: Exception) -> str:
    """The reason why an index stays on the CPU.

    Raises:
        Exception: the error itself, if it is neither unsupported nor a lack of memory.
    """
    message = message_of(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return f"the index does not fit the GPU's memory ({message})"
    if _UNSUPPORTED.search(str(error)):
        return message.rstrip(".")
    raise error


@cache
def log_once(message: str) -> None:
    """Log a line once per process; only rank 0 shows it on the terminal."""
    _LOG.info("%s", message)
