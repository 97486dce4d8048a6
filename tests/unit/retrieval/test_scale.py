"""The arithmetic of scale, against published figures and by hand."""

import math
from dataclasses import replace

import pytest

from retro_mcore.retrieval.index.choice import _codes
from retro_mcore.retrieval.scale import Node, Rates, Workload, count_chunks, index_for, plan_scale


def work(tokens, **changes):
    return replace(Workload(tokens, tokens), **changes)


def test_published_databases():
    plan = plan_scale(work(1.2e12))  # InstructRetro
    assert round(plan.chunks / 1e9) == 19
    assert plan.index == "OPQ64_128,IVF4194304_HNSW32,PQ64"
    assert plan.training_vectors == pytest.approx(600e6, rel=1e-3)
    hours = {stage.name: stage.hours for stage in plan.stages}
    assert hours["build_index: add, merge"] == pytest.approx(192, rel=0.03)
    assert hours["build_index: train"] == pytest.approx(4, rel=1e-3)
    assert hours["build_index: embed"] == pytest.approx(19.27e9 / 1728 / 3600, rel=1e-3)
    assert count_chunks(work(330e9)) == pytest.approx(5.3e9, rel=0.01)  # Wang et al.
    assert 350e9 < 5.3e9 * index_for(5_300_000_000, 1024)[2] < 400e9


@pytest.mark.parametrize(
    ("vectors", "string"),
    [
        (50_000, "Flat"),
        (50_001, "IVF1024,Flat"),
        (1_000_000, "IVF4096,Flat"),
        (1_000_001, "IVF4096,Flat"),
        (20_000_000, "IVF16384_HNSW32,Flat"),
        (20_000_001, "OPQ64_128,IVF262144_HNSW32,PQ64"),
        (1_000_000_001, "OPQ64_128,IVF4194304_HNSW32,PQ64"),
    ],
)
def test_faiss_knows_the_index_of_every_size(vectors, string):
    import faiss

    assert index_for(vectors, 1024)[0] == string
    index = faiss.index_factory(1024, string)
    if vectors < 10_000_000:
        assert index.sa_code_size() >= index_for(vectors, 1024)[2] - 8
    else:
        assert faiss.extract_index_ivf(index).code_size == index_for(vectors, 1024)[2] - 8


@pytest.mark.parametrize(
    ("gigabytes", "code"), [(20, "Flat"), (3, "SQfp16"), (1.5, "SQ8"), (0.01, None)]
)
def test_the_largest_codes_that_fit_the_memory_are_planned(gigabytes, code):
    """5 million vectors of 256 dimensions; if nothing fits, the smallest codes."""
    import faiss

    planned = index_for(5_000_000, 256, gigabytes * 1e9)
    smallest = min(_codes(5_000_000, 256), key=lambda each: each.num_bytes)
    assert planned.code == (code or smallest.string)
    assert planned.string.split(",")[0] == "IVF8192_HNSW32"
    index = faiss.index_factory(256, planned.string)
    assert faiss.extract_index_ivf(index).code_size == planned.vector_bytes - 8
    plan = plan_scale(work(320e6, dimension=256), index_memory=gigabytes * 1e9)
    assert plan.index == planned.string
    assert plan.index_shares == (1 if code else math.ceil(plan.index_bytes / 1e7))


def test_a_plan_by_hand():
    """1,000 documents of 96 tokens: each a whole and a half chunk of 64; 640 training chunks."""
    small = Workload(96_000, 40_960, 64, 96, 2, 100, 10)
    rates = Rates(tokenized=1, chunked=2, embedded=5, added=10, queried=0.5)
    plan = plan_scale(small, rates, Node(gpus=2, cores=4, memory=1e6), hours=0.01)
    assert (plan.chunks, plan.query_chunks, plan.index) == (2000, 640, "Flat")
    assert plan.index_bytes == 2000 * 400
    assert plan.stages[4].disk == 2 * 2000 * 400  # its parts, and merged
    assert plan.index_shares == 1  # 800 of 800 KB
    stages = {stage.name.split()[-1]: stage for stage in plan.stages[2:]}
    assert stages["search"].hours == pytest.approx(640 / 0.5 / 3600)
    assert stages["search"].disk == 640 * 10 * 12
    assert stages["search"].nodes == 36  # 1,280 seconds, 36 a node
    embed = plan.stages[2]
    assert (embed.disk, embed.worker) == (2000 * 400, "GPU")
    assert (embed.nodes, embed.ranks) == (6, 12)  # 400 seconds, 72 a node and 36 a GPU
    assert plan.stages[0].disk == 96_000 * 2 + 20 * 1000
    assert plan.stages[1].disk == 2000 * 36 + 1000 * 40
    assert plan.disk == sum(stage.disk for stage in plan.stages)
    cores = plan_scale(small, rates, Node(gpus=0, cores=4, memory=1e5), hours=0.01)
    assert (cores.stages[2].worker, cores.stages[2].nodes) == ("core", 3)
    assert cores.index_shares == 10


def test_aligned_chunks_are_embedded_once():
    """The chunks of the database are searched with their own vectors, and documents are padded."""
    packed = Workload(96_000, 40_960, 64, 96, 2, 100, 10)
    plans = [plan_scale(each) for each in (packed, replace(packed, samples="aligned"))]
    assert plans[1].query_chunks == plans[1].chunks == 2000
    names = [{stage.name: stage for stage in plan.stages} for plan in plans]
    assert set(names[0]) - set(names[1]) == {"query_neighbors: embed"}
    assert names[1]["query_neighbors: search"].disk == 2000 * 10 * 12
    assert names[1]["preprocess_corpus"].disk == 2000 * 64 * 2 + 20 * 1000
