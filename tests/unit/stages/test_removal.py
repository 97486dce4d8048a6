"""Documents are removed from the database, and the database is compacted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.cli.verify import VerifyOptions, verify
from retro_mcore.errors import ConfigurationError, CorruptFileError, ProjectError
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.records import stage_report
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.index import build, load_index
from retro_mcore.retrieval.neighbor_tables import SavedDistances, SavedNeighbors
from retro_mcore.retrieval.removed import removed_documents
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.samples.neighbor_noise import NeighborNoise
from retro_mcore.samples.retro_dataset import build_retro_datasets
from retro_mcore.stages import query_neighbors as query_stage
from retro_mcore.stages.update_db import UpdateDbReport
from tests.unit.data.projects import documents, preprocess_options, write_corpus

Table = tuple[np.ndarray, np.ndarray]
SAVED = 5
COUNT = 24
#: The second half repeats the first, so that copies of these are the nearest neighbors of others.
REMOVED = ["topic-1", "topic-13", "corpus_text_document:6"]
NUMBERS = (1, 6, 13)


def make(
    folder: Path,
    samples: str,
    index: str,
    texts: list[str],
    of_index: dict | None = None,
    **changes: object,
) -> Path:
    folder.mkdir(exist_ok=True)
    corpus = write_corpus(folder / "corpus.jsonl", texts)
    project = folder / "project"
    preprocess_corpus(preprocess_options(project, corpus, samples=samples, **changes))
    build_db(BuildDbOptions(str(project), retro_doc_block_size=6))
    given = {"embedder": "static", "index": index, **(of_index or {})}
    build_index(BuildIndexOptions(str(project), **given))
    return project


def search(project: Path, **options: object) -> None:
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=SAVED, **options))


@pytest.fixture(scope="module", params=["aligned", "packed"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished project of an exact index."""
    folder = tmp_path_factory.mktemp(request.param)
    search(make(folder, request.param, "Flat", documents(COUNT)))
    write_corpus(folder / "more.jsonl", documents(60)[50:54])
    return folder


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy") / "project"


def remove(project: Path, *names: str, **options: object) -> UpdateDbReport:
    given = list(names) or REMOVED
    return update_db(UpdateDbOptions(str(project), remove=given, **options))


def tables(project: Path) -> dict[str, Table]:
    """Neighbors and distances in the database that is used, as they are saved."""
    config, query = ProjectConfig.load(project), ProjectPaths(project).query
    found = {}
    for split, name in config.neighbor_dirs(ProjectSettings.load(project)).items():
        saved = SavedNeighbors(query / name), SavedDistances(query / name)
        found[split] = tuple(each.rows(0, len(each)) for each in saved)
    return found


def neighbors_of_samples(project: Path) -> np.ndarray:
    dataset = build_retro_datasets(project, SAVED, 2)["train"]
    assert dataset is not None
    ids = np.stack([dataset[i]["neighbor_chunks"] for i in range(len(dataset))])
    return dataset.database.documents(ids[ids != NO_NEIGHBOR])


def gone(documents: np.ndarray, dataset: int = 0) -> bool:
    """Whether none of the documents, [..., 2], was removed."""
    return not (np.isin(documents[..., 1], NUMBERS) & (documents[..., 0] == dataset)).any()


def test_nothing_retrieves_a_removed_document(project: Path, capsys) -> None:
    before = neighbors_of_samples(project)
    assert not gone(before)
    text = ChunkDatabase.open(project).texts([0], Retriever(project).tokenizer)[0]
    report = remove(project)
    assert report.removal is not None
    assert (report.removal.num_removed, report.removal.num_held_out) == (3, 0)
    database = ChunkDatabase.open(project)
    rows = np.isin(database.chunks[:, 1], NUMBERS)
    assert report.removal.num_chunks == report.num_removed == rows.sum() > 3
    assert database.num_retrieved == (~rows).sum()
    assert gone(neighbors_of_samples(project))
    assert all(gone(database.documents(ids[ids >= 0])) for ids, _ in tables(project).values())
    retriever = Retriever(project, len(database), 1)
    found = retriever.search_texts([text]).ids
    assert gone(database.documents(found[found >= 0]))
    assert (found >= 0).sum() == database.num_retrieved  # all others
    noise = NeighborNoise(1, replace_neighbors=1.0)
    ids = np.zeros((50, 20), np.int64)
    random = noise.disturb_neighbors(0, ids, database, 9, np.array([0]))
    assert gone(database.documents(random))
    assert len(np.unique(random)) > 20
    printed = capsys.readouterr().out
    assert "training samples contain text of these documents" in printed


def test_only_what_was_touched_is_searched_and_as_all_would_be(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tables(project)
    database = ChunkDatabase.open(project)
    touched = {
        split: (np.isin(database.chunks[np.maximum(ids, 0), 1], NUMBERS) & (ids >= 0)).any(axis=1)
        for split, (ids, _) in before.items()
    }
    searched = []
    find = query_stage.NeighborSearch.find

    def counting(self, query, counts):
        searched.append(len(query.vectors))
        return find(self, query, counts)

    monkeypatch.setattr(query_stage.NeighborSearch, "find", counting)
    other = shutil.copytree(project, project.parent / "other")
    report = remove(project)
    assert report.neighbors is not None
    assert report.neighbors.num_again == sum(searched) == sum(map(np.sum, touched.values())) > 0
    assert not all(each.all() for each in touched.values())
    # The same by searching everything.
    monkeypatch.setattr(query_stage, "find_previous_neighbors", lambda *given: None)
    remove(other)
    wanted = tables(other)
    for split, found in tables(project).items():
        check_same(found, wanted[split])
        untouched = ~touched[split]
        np.testing.assert_array_equal(found[0][untouched], before[split][0][untouched])
    assert report_of(project) == report_of(other)


def report_of(project: Path) -> dict:
    (record,) = (project / "stages").glob("query_neighbors_*.json")
    return stage_report(ProjectPaths(project), record.stem)


def check_same(found: Table, wanted: Table) -> None:
    """The same neighbors; matrix products of other sizes round otherwise, which may swap ties."""
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
    same = (found[0] == wanted[0]).all(axis=1)
    gaps = np.diff(wanted[1], axis=1, append=np.inf)
    assert (np.nanmin(gaps[~same], axis=1, initial=0) < 1e-5).all()
    assert same.mean() > 0.9


#: Index, and options of build_index, query_neighbors and preprocess_corpus.
CASES: list[tuple[str, dict, dict, dict]] = [
    ("IVF4_HNSW8,SQ8", {}, {}, {"near_duplicates": "exclude-neighbors"}),
    ("Flat", {}, {"rerank": "bm25"}, {}),
    ("IVF4,Flat", {"on_disk": True}, {}, {}),
    ("IVF4,Flat", {"split_index": True}, {}, {}),
    ("IVF2,PQ4x4fsr", {}, {}, {}),
    ("IVF4,RaBitQ", {"rescore": True}, {}, {}),
    ("PQ8x4np", {}, {}, {}),
    ("HNSW8,Flat", {}, {}, {}),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if i else []) for i, case in enumerate(CASES)],
    ids=str,
)
def test_compacted_as_rebuilt_without_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, dict, dict, dict]
) -> None:
    index, of_index, of_search, of_corpus = case
    project = make(tmp_path / "a", "aligned", index, documents(COUNT), of_index, **of_corpus)
    search(project, **of_search)
    result = remove(project, compact=True)
    assert ProjectSettings.load(result.project).compacted_from == "../.."
    texts = [text for place, text in enumerate(documents(COUNT)) if place not in NUMBERS]
    empty = ProjectPaths(project).empty_index(index)
    monkeypatch.setattr(build, "train_index", lambda *given: load_index(empty))
    settings = ProjectSettings.load(project)
    rebuilt = make(
        tmp_path / "b",
        "aligned",
        index,
        texts,
        {"nprobe": settings.nprobe, "ef_search": settings.ef_search, **of_index},
        split="52.4,27.6,20",  # the 11 training documents that are left
        tokenizer_model=str(project / "tokenizer" / "sentencepiece.model"),
        **of_corpus,
    )
    search(rebuilt, **of_search)
    mine, theirs = ChunkDatabase.open(project), ChunkDatabase.open(rebuilt)
    assert len(mine) == len(theirs) == mine.num_retrieved
    np.testing.assert_array_equal(mine.chunks[:, 2:], theirs.chunks[:, 2:])
    own = ChunkDatabase.open(project, own=True)
    left = ~np.isin(own.chunks[:, 1], NUMBERS)
    found, wanted = tables(project), tables(rebuilt)
    check_same(tuple(each[left] for each in found["train"]), wanted["train"])
    check_same(found["valid"], wanted["valid"])
    stored = [
        [
            path
            for path in sorted(ProjectPaths(each).index_dir(index).rglob("*[sx]"))
            if path.is_file()
        ]
        for each in (result.project, rebuilt)
    ]
    for one, other in zip(*stored, strict=True):  # parts, and the merged index
        assert one.read_bytes() == other.read_bytes()
    assert gone(neighbors_of_samples(project))
    # Again there is nothing to do, and the old database keeps the documents out.
    assert remove(project, compact=True).neighbors is None
    update_db(UpdateDbOptions(str(project), exchange=str(project)))
    assert gone(neighbors_of_samples(project))


class Killed(BaseException):
    """The process ends here."""


def kill(*given: object, **named: object) -> None:
    raise Killed


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished aligned project."""
    folder = tmp_path_factory.mktemp("kept")
    search(make(folder, "aligned", "IVF4,Flat", documents(COUNT)))
    write_corpus(folder / "more.jsonl", documents(60)[50:54])
    return folder


def test_a_kill_at_any_point_loses_nothing(
    aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = shutil.copytree(aligned, tmp_path / "killed") / "project"
    places = [
        ("retro_mcore.retrieval.removed.save_array", False),  # the file of documents
        ("retro_mcore.retrieval.removed.replace", True),  # the settings
        ("retro_mcore.stages.query_neighbors.finish_stage", True),
        ("retro_mcore.project.config.ProjectConfig.save", True),
        ("retro_mcore.stages.build_db.run", True),
        ("retro_mcore.stages.build_index.run", True),
        ("retro_mcore.stages.query_neighbors.count_queried", True),
    ]
    for place, removed in places:
        with monkeypatch.context() as broken:
            broken.setattr(place, kill)
            with pytest.raises(Killed):
                remove(project, compact=True)
        assert gone(neighbors_of_samples(project)) == removed, place
    remove(project, compact=True)
    straight = shutil.copytree(aligned, tmp_path / "straight") / "project"
    remove(straight, compact=True)
    wanted = tables(straight)
    for split, found in tables(project).items():
        check_same(found, wanted[split])
    assert verify(VerifyOptions(str(project))).num_files > 0


def test_documents_are_appended_after_a_removal(aligned: Path, tmp_path: Path) -> None:
    """They keep their numbers, and what was removed stays so; before and after compacting."""
    project = shutil.copytree(aligned, tmp_path / "copy") / "project"
    more = {"append": [str(project.parent / "more.jsonl")]}
    remove(project, "topic-1", "topic-13")
    grown = update_db(UpdateDbOptions(str(project), **more))
    assert grown.num_removed > 0
    assert grown.neighbors is not None
    assert grown.neighbors.num_searched is not None  # only the new chunks
    remove(project, "corpus_text_document:6", "more_text_document:2", compact=True)
    found = neighbors_of_samples(project)
    assert gone(found)
    assert not ((found == (1, 2)).all(axis=-1)).any()
    database = ChunkDatabase.open(project)
    assert (database.removed, gone(database.chunks[:, :2])) == (None, True)
    assert set(database.chunks[:, 0]) == {0, 1}
    again = update_db(UpdateDbOptions(str(project), append=[str(project.parent / "corpus.jsonl")]))
    assert gone(ChunkDatabase.open(project).chunks[:, :2])
    assert again.neighbors is not None
    assert again.neighbors.num_searched is not None


def test_older_databases_are_marked_however_the_path_is_written(
    aligned: Path, tmp_path: Path, capsys
) -> None:
    project = shutil.copytree(aligned, tmp_path / "copy") / "project"
    update_db(UpdateDbOptions(str(project), append=[str(project.parent / "more.jsonl")]))
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    remove(tmp_path / "link" / "project", *REMOVED)
    (grown,) = (project / "updates").iterdir()
    for root in (project, grown):
        assert set(NUMBERS) <= set(removed_documents(ProjectPaths(root))[:, 1].tolist()), root
    assert "not removed from" not in capsys.readouterr().err
    # An older database that the one in use no longer leads to.
    settings = ProjectSettings.load(grown)
    replace(settings, grown_from="../gone").save(grown)
    remove(project, "topic-2")
    assert f"The documents are not removed from {project}" in capsys.readouterr().err


def test_names_of_documents(aligned: Path, tmp_path: Path) -> None:
    project = shutil.copytree(aligned, tmp_path / "copy") / "project"
    listed = tmp_path / "ids.txt"
    for names, message in (
        (["topic-1", "topic-99", "corpus_text_document:24"], "2 of 3 are no documents here"),
        ([f"topic-{number}" for number in range(COUNT)], "leaves no chunks"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            remove(project, *names)
    for options, message in (
        ({"remove_file": str(listed)}, "ids.txt: No such file"),
        ({"remove": ["topic-1"], "exchange": str(project)}, "--remove and --compact"),
        ({"remove": ["topic-1"], "num_neighbors_save": 3}, "most neighbors stay"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            update_db(UpdateDbOptions(str(project), **options))
    assert not (project / "db" / "removed").exists()
    listed.write_text("topic-1\r\n\ntopic-22\n")
    result = update_db(UpdateDbOptions(str(project), remove_file=str(listed))).removal
    assert result is not None
    assert (result.num_named, result.num_removed, result.num_held_out) == (2, 1, 1)
    dataset = build_retro_datasets(project, SAVED, 1)["train"]
    assert dataset is not None
    holding = [{1, 22} & set(dataset.samples.chunk_places(i, 16)[1].tolist()) for i in range(8)]
    assert result.num_train_samples == sum(map(bool, holding)) > 0
    assert remove(project, "topic-1").removal.num_before == 1  # type: ignore[union-attr]


def test_other_versions_and_lost_files_are_refused(aligned: Path, tmp_path: Path) -> None:
    project = shutil.copytree(aligned, tmp_path / "copy") / "project"
    settings = ProjectPaths(project).settings
    assert "removed_documents" not in json.loads(settings.read_text())
    remove(project)
    # Versions that do not know this key refuse the project.
    assert json.loads(settings.read_text())["removed_documents"] == 3
    (file,) = (project / "db" / "removed").iterdir()
    file.rename(file.with_name("0.npy"))
    with pytest.raises(CorruptFileError, match="differ from its name"):
        ChunkDatabase.open(project)
    (project / "db" / "removed" / "0.npy").unlink()
    for use in (ChunkDatabase.open, lambda path: verify(VerifyOptions(str(path)))):
        with pytest.raises(CorruptFileError, match="names 0 documents, but 3 were removed"):
            use(project)


def test_another_projects_database_is_left_to_its_owner(aligned: Path, tmp_path: Path) -> None:
    owner = shutil.copytree(aligned, tmp_path / "owner") / "project"
    project = shutil.copytree(aligned, tmp_path / "user") / "project"
    exchange = UpdateDbOptions(str(project), exchange=str(owner))
    update_db(exchange)
    with pytest.raises(ProjectError, match=r"Run update_db --project-dir .*owner"):
        remove(project)
    remove(owner)
    assert gone(neighbors_of_samples(project))  # at once
    again = update_db(exchange)
    assert again.neighbors is not None
    assert again.neighbors.num_again is not None
    assert gone(neighbors_of_samples(project))
