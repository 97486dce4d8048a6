"""Chunks longer than the embedder reads are named in the log of each stage, once."""

from __future__ import annotations

import logging
import shutil

import pytest

from retro_mcore.retrieval.embedders.static import StaticEmbedder
from retro_mcore.stages import build_index, query_neighbors
from tests.unit.data.projects import built_project, forget_neighbors


@pytest.mark.parametrize(("limit", "stages"), [(4, ["build_index", "query_neighbors"]), (999, [])])
def test_cut_chunks_are_logged_from_python(tmp_path, monkeypatch, caplog, limit, stages):
    project = forget_neighbors(shutil.copytree(built_project(), tmp_path / "project"))
    shutil.rmtree(project / "index")
    (project / "stages" / "build_index.json").unlink()
    monkeypatch.setattr(StaticEmbedder, "max_tokens", limit)
    with caplog.at_level(logging.WARNING, logger="retro_mcore"):
        build_index.run(project, build_index.BuildIndexConfig(embedder="static"))
        query_neighbors.run(project, query_neighbors.QueryNeighborsConfig())
    found = [each.getMessage() for each in caplog.records if "cut longer" in each.getMessage()]
    assert [text.split(":")[0] for text in found] == stages
    for text, name in zip(found, ("database", "train"), strict=False):
        assert f"the embedder reads {limit} tokens" in text
        assert f"{name}: " in text
        assert " chunks (" in text
