"""The planning command."""

import json
import math
import shutil
import sys

import numpy as np
import pytest

from retro_mcore.cli.plan_scale import PlanScaleOptions, main, plan_scale
from retro_mcore.errors import ConfigurationError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.embedders.lexical import count_texts, weights_of
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.measured import measure_index_rates
from retro_mcore.retrieval.measured_rates import measure_rates
from retro_mcore.retrieval.scale import Rates, parse_count
from tests.unit.data.projects import built_project


def test_a_plan_is_shown_and_written(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["--tokens", "1.2T", "--embedder-rate", "3456", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    for expected in ("19,271,739,130", "OPQ64_128,IVF4194304_HNSW32,PQ64", "1,549.0 GPU-hours"):
        assert expected in shown
    written = json.loads(path.read_text())
    assert written["rates"]["embedded"] == 3456
    assert written["plan"]["disk"] == pytest.approx(
        50.1e12, rel=0.01
    )  # vectors in fp16, the index twice
    assert [stage["name"].split(":")[0] for stage in written["plan"]["stages"]][:2] == [
        "preprocess_corpus",
        "build_db",
    ]


def test_rates_are_measured_on_a_projects_chunks(tmp_path):
    path = tmp_path / "plan.json"
    project = str(built_project())
    given = {"project_dir": project, "json": str(path)}
    assert plan_scale(PlanScaleOptions("1M", **given)).query_chunks == 1e6 / 16  # its chunk length
    plan_scale(PlanScaleOptions("1B", measure=True, device="cpu", **given))
    written = json.loads(path.read_text())
    with pytest.raises(ConfigurationError, match="--measure: no --project-dir"):
        plan_scale(PlanScaleOptions("1B", measure=True))
    assert written["workload"]["dimension"] == 256  # WordLlama's
    rates, published = written["rates"], Rates()
    for measured in ("embedded", "chunked"):  # how fast this machine is asserts nothing
        assert 0 < rates[measured] != getattr(published, measured)
    assert rates["queried"] == published.queried == 250


def test_a_precision_that_does_not_run_here_is_measured_in_fp32(tmp_path, caplog):
    project = shutil.copytree(built_project(), tmp_path / "project")
    settings = ProjectSettings.load(project)
    settings.embedder, settings.embed_precision = "lexical", "fp16"
    settings.save(project)
    corpus_weights = ProjectPaths(project).lexical_weights
    corpus_weights.parent.mkdir(exist_ok=True)
    np.save(corpus_weights, weights_of(count_texts(["a few words", "few"])))
    rates, _ = measure_rates(project, device="cpu")
    assert rates.embedded > 0
    assert "measured in fp32: the project's fp16 does not run on the CPU" in caplog.text


def test_numbers_that_cannot_be_are_refused():
    assert parse_count("--tokens", "1.5b") == 1.5e9
    assert parse_count("--tokens", "250") == 250
    for text in ("", "B", "-1B", "0", "1X", "inf", "nan"):
        with pytest.raises(ConfigurationError, match="--tokens"):
            parse_count("--tokens", text)
    for hours in (0, math.inf, math.nan):
        with pytest.raises(ConfigurationError, match=rf"--hours: {hours}.*more than 0"):
            plan_scale(PlanScaleOptions("1B", hours=hours))


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        (
            {"embedder": "static", "device": "cpu"},
            "(?s)--embedder: given without .*--device: given",
        ),
        ({"retro_chunk_length": 64}, "--retro-chunk-length: 64, but it is 16"),
        ({"embedding_dimension": 1024}, "--embedding-dimension: 1024, but it is 256"),
        (
            {"embedding_dimension": 512, "measure": True, "embedder": "minilm"},
            "--embedding-dimension: 512, but it is 384",
        ),
        ({"gpus_per_node": -1}, "--gpus-per-node: -1"),
    ],
)
def test_what_would_be_ignored_is_refused(given, refusal):
    """The project's chunk length and dimension replaced those that were given."""
    with pytest.raises(ConfigurationError, match=refusal):
        plan_scale(PlanScaleOptions("1M", project_dir=str(built_project()), **given))


def test_what_agrees_with_the_project_is_no_problem():
    options = PlanScaleOptions("1M", retro_chunk_length=16, embedding_dimension=256)
    options.project_dir = str(built_project())
    assert plan_scale(options).query_chunks == 1e6 / 16


def test_what_is_not_given_is_taken_from_the_project(tmp_path):
    """Documents of 1,150 tokens and 20 neighbors were planned for any project."""

    def workload(**given):
        plan_scale(PlanScaleOptions("1M", json=str(tmp_path / "plan.json"), **given))
        return json.loads((tmp_path / "plan.json").read_text())["workload"]

    project = shutil.copytree(built_project(), tmp_path / "project")
    record = ProjectPaths(project).stage_record("preprocess_corpus")
    counts = json.loads(record.read_text())["report"]
    names = ("document_tokens", "token_bytes", "neighbors_saved", "stored_as")

    def found(**given):
        work = workload(**given)
        return tuple(work[name] for name in names)

    mean = counts["tokens"] / counts["documents"]
    assert found(project_dir=str(project)) == (mean, 2, 5, "fp32")
    settings = ProjectSettings.load(project)
    settings.embeddings_dtype = "fp16"
    settings.save(project)
    given = {"document_tokens": 300.0, "num_neighbors_save": 2, "vocab_size": 100_000}
    assert found(project_dir=str(project), **given) == (300, 4, 2, "fp16")
    assert found() == (1150, 2, 20, None)


def test_the_planned_index_fits_the_memory(caplog):
    """Of the node, unless the index's own is given."""

    def planned(**given):
        return plan_scale(PlanScaleOptions("1B", document_tokens=1e5, **given)).index

    assert planned() == "IVF16384_HNSW32,Flat"
    assert planned(node_memory=64.0) == "IVF16384_HNSW32,SQfp16"
    assert planned(node_memory=64.0, index_memory="20G") == "IVF16384_HNSW32,SQ8"
    with pytest.raises(ConfigurationError, match="--index-memory: 'much'"):
        planned(index_memory="much")
    assert "build_index would refuse" not in caplog.text
    planned(index_memory="1M")
    assert "build_index would refuse" in caplog.text


def test_a_plan_needs_no_faiss(monkeypatch):
    """It is made before anything is installed for building."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    faiss_library.cache_clear()
    try:
        for memory in (None, "20G"):
            plan = plan_scale(PlanScaleOptions("1B", document_tokens=1e5, index_memory=memory))
            assert plan.index == f"IVF16384_HNSW32,{'SQ8' if memory else 'Flat'}"
    finally:
        monkeypatch.undo()
        faiss_library.cache_clear()


def test_aligned_samples_have_no_search_of_their_own():
    plan = plan_scale(PlanScaleOptions("1M", samples="aligned"))
    assert plan.query_chunks == plan.chunks
    with pytest.raises(ConfigurationError, match="--training-tokens: 1B, but aligned"):
        plan_scale(PlanScaleOptions("1M", samples="aligned", training_tokens="1B"))


def test_the_index_is_measured_with_the_projects_vectors(tmp_path):
    path = tmp_path / "plan.json"
    given = {"project_dir": str(built_project()), "device": "cpu", "measure": True}
    assert plan_scale(PlanScaleOptions("100K", json=str(path), **given)).index == "Flat"
    rates = json.loads(path.read_text())["rates"]
    assert rates["trained"] == Rates().trained  # nothing to train
    assert rates["added"] != Rates().added
    assert rates["queried"] != Rates().queried


@pytest.mark.parametrize(
    ("lists", "code"),
    [(0, "Flat"), (0, "SQ8"), (256, "Flat"), (8192, "Flat"), (8192, "SQ8"), (256, "PQ8np")],
)
def test_rates_of_an_index_with_lists_and_without(lists, code):
    rates = measure_index_rates(clustered(2000), max(lists, 1) * 60, lists, 0.9, 20, 10, code)
    assert (rates.trained is None) == (lists == 0)
    assert rates.added > 0
    assert rates.queried > 0
    assert rates.nprobe is None if lists == 0 else 1 <= rates.nprobe <= lists


def clustered(count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(50, 32))
    vectors = centers[generator.integers(0, 50, count)] + 0.2 * generator.normal(size=(count, 32))
    return vectors.astype(np.float32)


def test_the_lists_that_a_larger_index_visits_are_expected():
    """Within a factor of two of what building it finds; the tuner's own steps are quarters."""
    vectors = np.random.default_rng(0).normal(size=(4_000, 12)).astype(np.float32)
    expected = measure_index_rates(vectors[::2], 4_000, 32, 0.95, 20, 10).nprobe
    found = measure_index_rates(vectors, 4_000, 32, 0.95, 20, 10).nprobe
    assert found / 2 <= expected <= found * 2


def test_a_project_of_another_embedder_keeps_published_rates(tmp_path, caplog):
    path = tmp_path / "plan.json"
    project = shutil.copytree(built_project(), tmp_path / "project")
    settings = ProjectSettings.load(project)
    settings.embedder = "another"
    settings.save(project)
    given = {"project_dir": str(project), "device": "cpu", "measure": True}
    plan_scale(PlanScaleOptions("100K", json=str(path), embedder="static", **given))
    assert "has no vectors of the planned embedder" in caplog.text
    assert json.loads(path.read_text())["rates"]["queried"] == Rates().queried
