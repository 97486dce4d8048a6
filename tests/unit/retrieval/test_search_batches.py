"""Batches in which searches embed chunks: those of the database, or as they were begun."""

from __future__ import annotations

import json
import shutil

import pytest

from retro_mcore.cli import build_index, query_neighbors, update_db
from retro_mcore.project import ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.retrieval.project_search import open_search
from retro_mcore.stages import embedding_choice
from tests.unit.data.projects import built_project, forget_neighbors

IN_CHUNKS = {"--embed-batch-size": 16}
IN_TOKENS = {**IN_CHUNKS, "--embed-batch-tokens": 64}


@pytest.fixture
def project(tmp_path):
    """A packed project after build_db."""
    project = shutil.copytree(built_project(), tmp_path / "project")
    forget_neighbors(project)
    shutil.rmtree(project / "index")
    (project / "stages" / "build_index.json").unlink()
    (project / "retro_mcore.json").write_text("{}")
    return project


def run(command, project, *flags):
    return command.main(["--project-dir", str(project), *map(str, flags)])


def batches(project):
    """Batches that each search of a project recorded."""
    stages = [path.stem for path in (project / "stages").glob("query_neighbors*.json")]
    return [
        {flag: value for flag, value in recorded_options(ProjectPaths(project), stage).items()
         if "-batch-" in flag}
        for stage in stages
    ]  # fmt: skip


def append(project, tmp_path, *flags):
    (tmp_path / "new.txt").write_text("A new document about batches. " * 40)
    return run(update_db, project, "--append", tmp_path / "new.txt", *flags)


def files(project):
    paths = sorted(ProjectPaths(project).query.glob("*/*.hdf5"))
    return {path: path.stat().st_mtime_ns for path in paths}


def test_new_searches_take_the_databases_batches(project, tiny_bert, tmp_path):
    embed = ("--embedder", tiny_bert, "--device", "cpu", "--embed-batch-tokens", 64)
    assert run(build_index, project, *embed) == 0
    assert run(query_neighbors, project) == 0
    assert batches(project) == [IN_TOKENS]
    assert append(project, tmp_path) == 0
    assert batches(project) == [IN_TOKENS, IN_TOKENS]


@pytest.mark.parametrize("finished", [True, False])
def test_older_searches_go_on_in_their_batches(project, tiny_bert, tmp_path, finished):
    """Versions before took 16 chunks, whatever the database had."""
    embed = ("--embedder", tiny_bert, "--device", "cpu", "--embed-batch-tokens", 64)
    assert run(build_index, project, *embed) == 0
    assert run(query_neighbors, project, "--embed-batch-size", 16) == 0
    if not finished:
        (project / "stages" / "query_neighbors.json").unlink()
        lost, *_ = files(project)
        lost.unlink()
    before = files(project)
    assert run(query_neighbors, project) == 0
    assert before.items() <= files(project).items()
    assert batches(project) == [IN_CHUNKS]
    # An update goes on as the project's own search, so that nothing old is embedded again.
    assert append(project, tmp_path) == 0
    assert batches(project) == [IN_CHUNKS, IN_CHUNKS]


@pytest.mark.parametrize("embedder", ["static", "lexical"])
def test_embedders_without_batches_refuse_a_number(project, tmp_path, capsys, embedder):
    """It changed nothing but the record, so that all was embedded and searched again."""
    found = f"--embed-batch-size: {embedder} runs no model on batches. Leave it out"
    assert run(build_index, project, "--embedder", embedder, "--embed-batch-size", 3) == 2
    assert found in capsys.readouterr().err
    assert run(build_index, project, "--embedder", embedder) == 0
    assert run(query_neighbors, project, "--embed-batch-size", 3) == 2
    assert found in capsys.readouterr().err
    assert run(query_neighbors, project) == 0
    assert batches(project) == [IN_CHUNKS]
    assert append(project, tmp_path, "--embed-batch-size", 3) == 2
    assert found in capsys.readouterr().err


def test_a_number_that_an_older_version_recorded_stays(project, tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(embedding_choice, "takes_batches", lambda name: True)
        assert run(build_index, project, "--embedder", "static", "--embed-batch-size", 3) == 0
    written = (project / "stages" / "build_index.json").read_text()
    for repeated in ((), ("--embed-batch-size", 3)):
        assert run(build_index, project, "--embedder", "static", *repeated) == 0
    assert json.loads(written) == json.loads((project / "stages" / "build_index.json").read_text())
    assert run(query_neighbors, project) == 0
    assert append(project, tmp_path) == 0
    (grown,) = (project / "updates").iterdir()
    olds, news = (sorted(ProjectPaths(each).embeddings.glob("*.hdf5")) for each in (project, grown))
    assert any(new.samefile(old) for new in news for old in olds)  # linked, not embedded again


def test_tokens_are_not_asked_of_another_databases_embedder(project, tiny_bert, tmp_path):
    other = shutil.copytree(built_project(), tmp_path / "other")
    embed = ("--embedder", tiny_bert, "--device", "cpu", "--embed-batch-tokens", 64)
    assert run(build_index, project, *embed) == 0
    assert run(query_neighbors, project) == 0
    assert run(update_db, project, "--exchange", other) == 0
    assert sorted(batches(project), key=len) == [IN_CHUNKS, IN_TOKENS]


@pytest.mark.parametrize(("samples", "tokens"), [("aligned", 1024), ("packed", None)])
def test_searches_that_name_no_batches_have_those_of_the_layout(
    tmp_path, tiny_bert, samples, tokens
):
    """Live retrieval and held-out documents."""
    project = shutil.copytree(built_project(), tmp_path / "project")
    settings = ProjectSettings.load(project)
    settings.embedder, settings.embedding_dimension = str(tiny_bert), 8
    settings.samples, settings.embedder_digests = samples, None
    settings.save(project)
    search = open_search(project)
    embedder = search.load_embedder(device="cpu")
    assert (embedder.batch_size, embedder.batch_tokens) == (16, tokens)
    named = search.load_embedder(5, "cpu")
    assert (named.batch_size, named.batch_tokens) == (5, None)
