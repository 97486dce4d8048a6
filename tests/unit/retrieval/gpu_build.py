"""Functions of Faiss's GPU build that record their arguments and return a copy on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from retro_mcore.retrieval.index import gpu
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.training import has_graph


class GpuBuild:
    """What the functions are given; `error` is raised instead of copying."""

    def __init__(self) -> None:
        self.options: list = []
        self.graphs: list[bool] = []
        self.clustered = 0
        self.error: Exception | None = None
        self.cuvs = False

    def cpu_to_gpu(self, resources, device, index, options):
        self.options.append(options)
        self.graphs.append(has_graph(index))
        if self.error:
            raise self.error
        return faiss_library().clone_index(index)

    def cpu_to_all_gpus(self, index):
        self.clustered += 1
        return faiss_library().clone_index(index)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> GpuBuild:
    """Let Faiss be a GPU build with one GPU."""
    build, faiss = GpuBuild(), faiss_library()

    def options() -> SimpleNamespace:
        return SimpleNamespace(use_cuvs=build.cuvs, allowCpuCoarseQuantizer=False)

    for name, function in (
        ("get_num_gpus", lambda: 1),
        ("StandardGpuResources", SimpleNamespace),
        ("GpuClonerOptions", options),
        ("index_cpu_to_gpu", build.cpu_to_gpu),
        ("index_cpu_to_all_gpus", build.cpu_to_all_gpus),
        ("index_gpu_to_cpu", lambda index: index),
    ):
        monkeypatch.setattr(faiss, name, function, raising=False)
    gpu.log_once.cache_clear()
    return build
