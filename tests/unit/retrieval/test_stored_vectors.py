"""Embeddings stored in fp16: half the bytes, the same neighbors, and nothing lost in silence."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch

from retro_mcore.cli import build_index, query_neighbors, update_db
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.retrieval.embedders import default_precision, precision
from retro_mcore.retrieval.index import Embeddings
from retro_mcore.retrieval.stored_types import StoredCounts, as_stored
from retro_mcore.stages import build_index as build_stage
from retro_mcore.stages import database_embedding
from retro_mcore.stages import query_neighbors as query_stage
from tests.unit.data.projects import built_project, forget_neighbors, write_rows


def unit_vectors(count=400, dimension=48):
    rows = np.random.default_rng(0).standard_normal((count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_fp16_keeps_the_neighbors(tmp_path):
    """An error of 2^-11 per number moves few of the neighbors of random vectors, the hardest."""
    rows = unit_vectors()
    stored = as_stored(rows, "fp16", StoredCounts())
    assert stored.dtype == np.float16
    read = Embeddings(write_rows(stored, tmp_path, 150)).range(0, len(rows))
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, rows, rtol=2**-10, atol=2**-25)
    near = [np.argsort(-(queries @ rows.T), axis=1)[:, 1:3] for queries in (rows, read)]
    shared = [len(set(a) & set(b)) for a, b in zip(*near, strict=True)]
    assert np.mean(shared) / 2 > 0.98


@pytest.mark.parametrize("scale", [1e6, 1e-7, 1e-30])
def test_what_fp16_cannot_hold_stays_in_fp32(scale):
    rows = unit_vectors(10)
    rows[3] *= scale
    counts = StoredCounts()
    assert as_stored(rows, "fp16", counts) is rows
    assert counts.beyond_fp16 == 1
    assert as_stored(np.zeros((2, 3), np.float32), "fp16", counts).dtype == np.float16
    assert counts.beyond_fp16 == 1


@pytest.fixture
def project(tmp_path):
    return shutil.copytree(built_project(), tmp_path / "project")


def dtypes(project):
    found = []
    for path in sorted(ProjectPaths(project).embeddings.glob("*.hdf5")):
        with h5py.File(path) as file:
            found.append(file["data"].dtype.name)
    return found


@pytest.fixture
def run(tiny_bert):
    """Runs build_index on a project."""
    embedder = ("--embedder", str(tiny_bert))
    return lambda project, *flags: build_index.main(
        ["--project-dir", str(project), *embedder, *flags]
    )


def without_index(project):
    forget_neighbors(project)
    shutil.rmtree(project / "index")
    (project / "stages" / "build_index.json").unlink()
    (project / "retro_mcore.json").write_text("{}")
    return project


@pytest.mark.parametrize(("samples", "dtype"), [("aligned", "fp16"), ("packed", "fp32")])
def test_new_projects_are_stored_as_their_samples_need(
    run, project, tiny_bert, capsys, samples, dtype
):
    """Packed projects are exchanged with programs that read fp32."""
    without_index(project)
    ProjectSettings(samples=samples).save(project)
    assert run(project, "--stage", "embed") == 0
    assert set(dtypes(project)) == {dtype.replace("fp", "float")}
    assert run(project) == 0
    settings = ProjectSettings.load(project)
    automatic = default_precision(str(tiny_bert), "auto")  # of this processor
    expected = automatic if samples == "aligned" else "fp32"
    assert (settings.embed_precision, settings.embeddings_dtype) == (expected, dtype)
    other = "fp32" if dtype == "fp16" else "fp16"
    assert run(project, "--embeddings-dtype", other) == 2
    assert "--embeddings-dtype: " in capsys.readouterr().err


def test_a_project_of_an_older_version_stays_in_fp32(run, project):
    """It is repeated, and grows, with the default flags."""
    before = ("--embeddings-dtype", "fp32", "--embed-precision", "fp32")
    assert run(without_index(project), *before) == 0
    settings = json.loads((project / "retro_mcore.json").read_text())
    for name in ("embed_precision", "embeddings_dtype"):
        del settings[name]
    (project / "retro_mcore.json").write_text(json.dumps(settings))
    assert run(project) == 0
    assert set(dtypes(project)) == {"float32"}
    assert "--embeddings-dtype" not in (project / "stages" / "build_index.json").read_text()


def begin_and_continue(run, project, *given):
    """Embed with flags, lose all files but the first, and continue without the flags."""
    assert run(without_index(project), "--stage", "embed", *given) == 0
    (first, *others) = sorted(ProjectPaths(project).embeddings.glob("*.hdf5"))
    before = first.stat().st_mtime_ns
    for path in others:
        path.unlink()
    assert run(project) == 0
    assert first.stat().st_mtime_ns == before


def test_embeddings_that_were_begun_in_fp32_are_continued(run, project):
    begin_and_continue(run, project, "--embeddings-dtype", "fp32")
    assert set(dtypes(project)) == {"float32"}
    assert ProjectSettings.load(project).embeddings_dtype == "fp32"


def recorded(project):
    """Options of batches, as build_index recorded them."""
    options = recorded_options(ProjectPaths(project), "build_index")
    return {flag: value for flag, value in options.items() if "-batch-" in flag}


IN_CHUNKS = {"--embed-batch-size": 16}
IN_TOKENS = {**IN_CHUNKS, "--embed-batch-tokens": 1024}


@pytest.mark.parametrize(("samples", "batches"), [("aligned", IN_TOKENS), ("packed", IN_CHUNKS)])
def test_new_aligned_projects_are_embedded_in_batches_of_tokens_on_a_cpu(
    run, project, capsys, samples, batches
):
    without_index(project)
    ProjectSettings(samples=samples).save(project)
    assert run(project, "--device", "cpu") == 0
    assert recorded(project) == batches
    assert run(project) == 0
    other = ("--embed-batch-size", "16") if samples == "aligned" else ("--embed-batch-tokens", "64")
    assert run(project, *other) == 2
    assert "--embed-batch-tokens: " in capsys.readouterr().err


@pytest.fixture
def on_gpu(monkeypatch):
    """Embeds on a GPU, for which the CPU stands in, from the call of what this returns on."""

    def begin(cpu_in_use: bool = False) -> None:
        monkeypatch.setattr(build_stage, "is_cpu_in_use", lambda: cpu_in_use)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: True)
        monkeypatch.setattr(precision, "processor_features", lambda: frozenset({"amx_bf16"}))
        for stage in (database_embedding, query_stage):
            monkeypatch.setattr(stage, "choose_device", lambda device: torch.device("cpu"))

    return begin


@pytest.mark.parametrize(
    ("samples", "cpu_in_use", "batches"),
    [
        ("aligned", False, {**IN_CHUNKS, "--embed-batch-tokens": 16_384}),
        ("packed", False, IN_CHUNKS),
        ("aligned", True, IN_TOKENS),
    ],
)
def test_new_aligned_projects_take_a_gpus_defaults(
    run, project, on_gpu, samples, cpu_in_use, batches
):
    """Not in a process whose models run on the CPU, so that its embedder does, too."""
    without_index(project)
    ProjectSettings(samples=samples).save(project)
    on_gpu(cpu_in_use)
    assert run(project) == 0
    assert recorded(project) == batches
    settings = ProjectSettings.load(project)
    assert settings.embed_precision == ("bf16" if samples == "aligned" else "fp32")


@pytest.mark.parametrize("finished", [False, True])
def test_a_gpu_goes_on_with_what_was_embedded_as_before(run, project, on_gpu, finished):
    """In fp32 and in 16 chunks, as versions before and packed projects do."""
    before = ("--embed-precision", "fp32", "--embed-batch-size", "16")
    steps = () if finished else ("--stage", "embed")
    assert run(without_index(project), *before, *steps) == 0
    (first, *_) = sorted(ProjectPaths(project).embeddings.glob("*.hdf5"))
    written = first.stat().st_mtime_ns
    on_gpu()
    assert run(project) == 0
    assert first.stat().st_mtime_ns == written
    assert recorded(project) == IN_CHUNKS
    assert ProjectSettings.load(project).embed_precision == "fp32"


@pytest.mark.parametrize("given", [("--embed-batch-size", "3"), ("--embed-batch-tokens", "64")])
def test_a_project_keeps_the_batches_that_it_was_built_with(run, project, tmp_path, given):
    assert run(without_index(project), *given) == 0
    expected = recorded(project)
    assert expected[given[0]] == int(given[1])
    assert run(project) == 0
    assert query_neighbors.main(["--project-dir", str(project)]) == 0
    (tmp_path / "new.txt").write_text("A new document about batches. " * 40)
    append = ["--append", str(tmp_path / "new.txt")]
    assert update_db.main(["--project-dir", str(project), *append]) == 0
    (grown,) = (project / "updates").iterdir()
    assert recorded(project) == recorded(grown) == expected


@pytest.mark.parametrize("given", [("--embed-batch-size", "16"), ("--embed-batch-tokens", "1024")])
def test_embeddings_that_were_begun_in_other_batches_are_continued(run, project, given):
    """By a version or on a machine with another default."""
    begin_and_continue(run, project, *given)
    assert recorded(project).get(given[0]) == int(given[1])
    assert ("--embed-batch-tokens" in recorded(project)) == (given[0] == "--embed-batch-tokens")


def test_a_grown_project_keeps_the_type(run, project, tmp_path):
    assert run(without_index(project), "--embeddings-dtype", "fp32") == 0
    assert query_neighbors.main(["--project-dir", str(project)]) == 0
    (tmp_path / "new.txt").write_text("A new document about storing vectors. " * 40)
    append = ["--append", str(tmp_path / "new.txt")]
    assert update_db.main(["--project-dir", str(project), *append]) == 0
    (grown,) = (project / "updates").iterdir()
    assert set(dtypes(grown)) == {"float32"}
    # The old files are linked, not embedded again.
    olds = sorted(ProjectPaths(project).embeddings.glob("*.hdf5"))
    news = sorted(ProjectPaths(grown).embeddings.glob("*.hdf5"))
    assert any(new.samefile(old) for new in news for old in olds)
