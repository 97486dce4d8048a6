"""build_index and query_neighbors as library calls."""

from __future__ import annotations

from dataclasses import fields

import pytest

from retro_mcore.cli.build_index import BuildIndexOptions
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions
from retro_mcore.project import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.stages import build_index, query_neighbors
from tests.unit.data.projects import built_project


def test_stages_report_and_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    project = built_project()  # all of it is reused
    num_chunks = len(ChunkDatabase.open(project))
    capsys.readouterr()
    index = build_index.run(ProjectPaths(project), build_index.BuildIndexConfig(embedder="static"))
    config = query_neighbors.QueryNeighborsConfig(num_neighbors_save=5)
    neighbors = query_neighbors.run(project, config)
    assert capsys.readouterr().out == ""
    assert index.reused
    assert index.choice is not None
    assert index.choice.string == "Flat"
    assert index.embedded is not None
    assert index.embedded.num_chunks == index.embedded.counts.chunks == num_chunks
    assert index.embedded.files.built == 0
    assert neighbors.num_chunks["train"] == neighbors.counts["train"].chunks == 32
    assert neighbors.num_candidates == num_chunks


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (BuildIndexOptions, build_index.BuildIndexConfig),
        (QueryNeighborsOptions, query_neighbors.QueryNeighborsConfig),
    ],
)
def test_a_command_has_the_options_of_its_stage(options: type, config: type) -> None:
    defaults = {field.name: field.default for field in fields(config)}
    names = {field.name: field.default for field in fields(options)}
    assert next(iter(names)) == "project_dir"
    assert {name: value for name, value in names.items() if name in defaults} == defaults
    assert names.keys() - defaults.keys() == {"project_dir"}
