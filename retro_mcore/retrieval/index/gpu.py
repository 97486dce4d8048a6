"""Faiss on GPUs, if its GPU build is installed and there is a GPU."""

from __future__ import annotations

import os
from typing import Any

from retro_mcore.retrieval.index.library import faiss_library

#: Maximum number of lists and of neighbors that Faiss searches on a GPU.
_MOST_LISTS = _MOST_NEIGHBORS = 2048


def num_gpus() -> int:
    """Number of GPUs that Faiss can use; 0 in its CPU build."""
    return int(getattr(faiss_library(), "get_num_gpus", lambda: 0)())


def to_gpu(index: Any) -> Any | None:
    """Copy an index to this rank's GPU; None if it does not fit or Faiss does not support it.

    Graphs (also over lists) stay on the CPU.
    """
    faiss = faiss_library()
    device = int(os.environ.get("LOCAL_RANK", "0")) % num_gpus()
    resources = faiss.StandardGpuResources()
    try:
        copy = faiss.index_cpu_to_gpu(resources, device, index)
    except RuntimeError:
        return None
    copy.referenced_objects = [resources]
    return copy


def to_gpu_for_search(index: Any, k: int, nprobe: int | None) -> Any:
    """Copy `index` to this rank's GPU if it can search there as requested; otherwise return it as
    it is."""
    if k > _MOST_NEIGHBORS or (nprobe or 0) > _MOST_LISTS:
        return index
    return to_gpu(index) or index
