"""Faiss on GPUs: what is sent there, with which options, and what the log says.

There is no GPU here, so `stand_in` replaces the functions of Faiss's GPU build.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.index import (
    Embeddings,
    add_part,
    add_to_index,
    choice,
    gpu,
    load_index,
    search,
    set_search_breadth,
    train_index,
)
from retro_mcore.retrieval.index.files import read_lists
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.training import has_graph
from tests.unit.data.projects import write_rows
from tests.unit.retrieval.gpu_build import GpuBuild, stand_in

ROWS = np.random.default_rng(0).normal(size=(1200, 16)).astype(np.float32)


@pytest.fixture
def build(monkeypatch) -> GpuBuild:
    return stand_in(monkeypatch)


@pytest.fixture
def embeddings(tmp_path) -> Embeddings:
    return Embeddings(write_rows(ROWS, tmp_path / "embeddings", 700))


def trained(embeddings, string: str):
    return train_index(string, embeddings, np.arange(len(embeddings)))


@pytest.fixture
def filled(embeddings):
    def fill(string: str, nprobe: int | None = None):
        index = trained(embeddings, string)
        add_to_index(index, embeddings)
        set_search_breadth(index, nprobe, None)
        return index

    return fill


@pytest.mark.parametrize("string", ["IVF8_HNSW4,Flat", "OPQ4_8,IVF8_HNSW4,PQ4x4"])
def test_a_graph_over_the_lists_becomes_a_comparison_with_all(build, filled, string, caplog):
    index = filled(string, 8)
    before = search(index, ROWS[:50], 5)
    with caplog.at_level("INFO"):
        on_gpu = gpu.to_gpu_for_search(index, 5, 8)
    assert isinstance(on_gpu, gpu.GpuIndex)
    assert build.graphs == [False]
    assert not build.options[0].allowCpuCoarseQuantizer
    assert caplog.messages == ["search runs on GPUs, all centroids compared"]
    # All lists are searched, so the quantizer makes no difference; the original keeps its own.
    for found in (search(on_gpu, ROWS[:50], 5), search(index, ROWS[:50], 5)):
        np.testing.assert_allclose(found[0], before[0], atol=1e-4)
    assert has_graph(index)


def test_a_graph_over_very_many_lists_stays_on_the_cpu(build, filled, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "_MOST_CENTROIDS", 4)
    build.cuvs, index = True, filled("IVF8_HNSW4,Flat", 2)
    with caplog.at_level("INFO"):
        gpu.to_gpu_for_search(index, 5, 2)
    assert build.graphs == [True]
    assert build.options[0].allowCpuCoarseQuantizer
    assert not build.options[0].use_cuvs
    assert caplog.messages == ["search runs on GPUs, the graph over the centroids on the CPU"]


@pytest.mark.parametrize("most", [4, 1 << 20])
def test_a_build_that_does_not_know_cuvs(build, filled, monkeypatch, most):
    """As before 1.10."""
    options = SimpleNamespace(allowCpuCoarseQuantizer=False)
    monkeypatch.setattr(faiss_library(), "GpuClonerOptions", lambda: options)
    monkeypatch.setattr(gpu, "_MOST_CENTROIDS", most)
    index = filled("IVF8_HNSW4,Flat", 2)
    assert isinstance(gpu.to_gpu_for_search(index, 5, 2), gpu.GpuIndex)
    assert not hasattr(options, "use_cuvs")
    assert gpu.to_gpu_for_search(index, 2049, 2) is index


@pytest.mark.parametrize(
    ("string", "half"),
    [
        ("IVF8,PQ8x4", True),
        ("OPQ8_16,IVF8,PQ8x4", True),
        ("IVF8,PQ4x4", False),
        ("IVF8,SQ8", False),
    ],
)
def test_large_tables_of_codes_are_in_half_precision(
    build, filled, monkeypatch, caplog, string, half
):
    """Of 64 bytes they did not fit, so that the largest indexes were searched on the CPU."""
    monkeypatch.setattr(gpu, "_TABLE_BYTES", 4 * 4 * 16)
    index = filled(string, 2)
    with caplog.at_level("INFO"):
        gpu.to_gpu_for_search(index, 5, 2)
    assert hasattr(build.options[-1], "useFloat16") == half
    assert caplog.messages[-1].endswith("half precision" if half else "runs on GPUs")


def test_automatic_codes_for_a_gpu_run_there():
    """Faiss's GPU code has PQ codes of 96 bytes at most."""
    sizes = {code.string: code.num_bytes for code in choice._codes(10**6, 384, gpu=True)}
    assert max(size for string, size in sizes.items() if string.startswith("PQ")) == 96
    assert not any("RaBitQ" in string or "fs" in string for string in sizes)


@pytest.mark.parametrize(
    ("cuvs", "nprobe", "k", "message"),
    [
        (False, 2049, 20, "nprobe is 2049, and a GPU takes at most 2048"),
        (False, 8, 2049, "the number of candidates is 2049, and a GPU takes at most 2048"),
        (True, 16385, 20, "nprobe is 16385, and a GPU takes at most 16384"),
    ],
)
def test_too_broad_a_search_stays_on_the_cpu(build, filled, caplog, cuvs, nprobe, k, message):
    build.cuvs, index = cuvs, filled("IVF8,Flat")
    with caplog.at_level("INFO"):
        assert gpu.to_gpu_for_search(index, k, nprobe) is index
    assert not build.options
    assert caplog.messages == [f"search runs on the CPU: {message}"]


def test_a_search_that_widens_beyond_the_gpu_goes_on_on_the_cpu(filled, caplog):
    index = filled("Flat")
    on_gpu = gpu.GpuIndex(None, index, most=100)
    with caplog.at_level("INFO"):
        found = search(on_gpu, ROWS[:3], 101)
    np.testing.assert_array_equal(found[1], search(index, ROWS[:3], 101)[1])
    assert "more than 100 neighbors run on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("Error: 'x' failed: This index type is not implemented on GPU.", "not implemented on GPU"),
        ("StandardGpuResources: alloc fail type FlatData", "does not fit the GPU's memory"),
    ],
)
def test_an_index_that_cannot_be_on_a_gpu_stays_on_the_cpu_once_said(
    build, filled, caplog, error, message
):
    build.error, index = RuntimeError(error), filled("IVF8_HNSW4,Flat", 2)
    with caplog.at_level("INFO"):
        assert gpu.to_gpu_for_search(index, 5, 2) is index
        assert gpu.to_gpu_for_search(index, 5, 2) is index
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("search runs on the CPU: ")
    assert message in caplog.messages[0]
    assert has_graph(index)


def test_another_error_of_faiss_is_raised(build, filled):
    build.error = RuntimeError("Error: invalid argument")
    with pytest.raises(RuntimeError, match="invalid argument"):
        gpu.to_gpu_for_search(filled("IVF8,Flat"), 5, 1)


def test_unsorted_results_of_a_gpu_are_sorted():
    class Unsorted:
        def search(self, vectors, k):
            distances = np.array([[3, 1, 2, 9e9], [1, 1, 2, 2]], np.float32)
            return distances, np.array([[7, 5, 6, -1], [8, 4, 3, 2]])

    distances, ids = search(gpu.GpuIndex(Unsorted(), SimpleNamespace(d=2, ntotal=9), 9), ROWS, 4)
    assert ids.tolist() == [[5, 6, 7, -1], [4, 8, 2, 3]]
    assert distances[0, :3].tolist() == [1, 2, 3]


def test_only_lists_are_filled_on_a_gpu(build, embeddings, tmp_path, caplog):
    part = Shard(100, 1100, tmp_path / "part")
    index = trained(embeddings, "IVF8_HNSW4,SQfp16")
    with caplog.at_level("INFO"):
        add_part(index, embeddings, part, part.path, gpu=True)
    assert caplog.messages == ["adding to the index runs on GPUs, all centroids compared"]
    lists = read_lists(part.path, mapped=False)
    assert lists.compute_ntotal() == 1000
    assert sorted(i for n in range(8) for i in _ids(lists, n)) == list(range(100, 1100))
    build.options.clear()
    add_part(trained(embeddings, "SQfp16"), embeddings, part, part.path, gpu=True)
    assert not build.options
    assert load_index(part.path).ntotal == 1000


def _ids(lists, number: int) -> list[int]:
    faiss = faiss_library()
    return faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number)).tolist()
