"""One way to open a search: live retrieval, query_neighbors and evaluation use it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.errors import ProjectError
from retro_mcore.evaluation.documents import HeldOutDocuments, search_document_neighbors
from retro_mcore.project import ProjectConfig, ProjectPaths, ProjectSettings
from retro_mcore.retrieval.neighbor_search import NUM_QUERY
from retro_mcore.retrieval.project_search import open_search
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.stages import query_neighbors
from tests.unit.data.projects import built_project, forget_neighbors


def search_live(project: Path) -> None:
    Retriever(project, device="cpu").search_texts(["anything"])


def search_samples(project: Path) -> None:
    query_neighbors.run(forget_neighbors(project), query_neighbors.QueryNeighborsConfig())


def search_documents(project: Path) -> None:
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), ProjectPaths(project))
    documents = HeldOutDocuments.open(project, "valid", tokenizer.eod)
    search_document_neighbors(project, documents, tokenizer, 3, "cpu")


@pytest.mark.parametrize("search", [search_live, search_samples, search_documents])
def test_an_embedder_of_another_dimension_is_refused(tmp_path: Path, search) -> None:
    """Held-out documents were searched without this check."""
    project = shutil.copytree(built_project(), tmp_path / "project")
    settings = ProjectSettings.load(project)
    settings.embedding_dimension = 7
    settings.save(project)
    found = "the index holds vectors of 7, the embedder static gives 256"
    with pytest.raises(ProjectError, match=found):
        search(project)


def test_the_number_of_candidates_follows_the_database() -> None:
    search = open_search(built_project())
    assert len(search.database) < NUM_QUERY
    assert search.num_candidates(None) == len(search.database)
    assert search.num_candidates(3) == 3
    assert search.source == search.paths == ProjectPaths(built_project())
