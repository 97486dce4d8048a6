"""Near-duplicates and neighbors: left out of the search, the samples and extended databases."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.data.near_duplicates.files import groups_path
from retro_mcore.data.tokens.document_ids import DocumentIds
from retro_mcore.errors import CorpusError, CorruptFileError, ProjectError
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.records import stage_report
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.neighbor_tables import SavedNeighbors
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.unit.data.aligned import save_tokenizer
from tests.unit.data.near_copies import ALIKE, near, planted, text
from tests.unit.data.projects import forget_neighbors, preprocess_options, write_corpus

SAVED = 5
#: Words 10 to 190 of document 10 that document 11 changes: half of them leave a similarity of
#: 176 / 216, all of them less than 0.8.
PLACES = tuple(range(10, 190, 25))


def corpus() -> list[str]:
    """As `planted`, with two documents that only a third one connects."""
    return [*planted()[:11], " ".join(near(text(10), 11, PLACES)), *planted()[12:]]


def build(folder: Path, mode: str, samples: str = "aligned") -> Path:
    project = folder / "project"
    options = preprocess_options(
        project,
        write_corpus(folder / "corpus.jsonl", corpus()),
        tokenizer_model=str(save_tokenizer(folder, True)),
        samples=samples,
        near_duplicates=mode,
        seq_length=256,
        retro_chunk_length=64,
        retro_block_size=100,
    )
    preprocess_corpus(options)
    build_db(BuildDbOptions(str(project)))
    build_index(BuildIndexOptions(str(project), embedder="lexical", index="IVF4,Flat", nprobe=4))
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=SAVED))
    return project


@pytest.fixture(scope="module")
def excluding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("excluding"), "exclude-neighbors").parent


@pytest.fixture
def project(excluding: Path, tmp_path: Path) -> Path:
    return shutil.copytree(excluding, tmp_path / "copy") / "project"


def alike(project: Path) -> dict[str, int]:
    """How many saved neighbors of each table are near-duplicates of their chunk's document."""
    paths, config = ProjectPaths(project), ProjectConfig.load(project)
    database = ChunkDatabase.open(project)
    groups = np.arange(1000)
    for group in [*ALIKE, *(((10, 11),) if config.retro_database else ())]:
        groups[list(group)] = group[0]
    found = {}
    for name, directory in config.neighbor_dirs(ProjectSettings.load(project)).items():
        own = ChunkDatabase.open(project, name, own=True)
        saved = SavedNeighbors(paths.query / directory, len(database))
        ids = saved.rows(0, len(own))
        documents = database.documents(np.maximum(ids, 0)).astype(np.int64)
        same = groups[own.chunks[:, 1]][:, None] == groups[documents[..., 1]]
        found[name] = int((same & (documents[..., 0] == 0) & (ids != NO_NEIGHBOR)).sum())
    return found


def test_no_chunk_retrieves_a_near_duplicate(tmp_path: Path, excluding: Path) -> None:
    assert alike(excluding / "project") == {"train": 0, "valid": 0}
    kept = build(tmp_path, "keep")
    assert min(alike(kept).values()) > 0
    copies = {
        mode: stage_report(ProjectPaths(project), "query_neighbors")["valid"]["near_copy_found"]
        for mode, project in (("keep", kept), ("exclude", excluding / "project"))
    }
    assert copies["keep"] >= 15  # most chunks of the two held-out documents
    assert copies["exclude"] == 0


def test_samples_do_not_read_near_duplicates_of_their_documents(excluding: Path) -> None:
    dataset = build_retro_datasets(excluding / "project", SAVED, 1)["train"]
    assert dataset is not None
    groups = dataset.database.groups
    assert groups is not None
    assert np.array_equal(
        pickle.loads(pickle.dumps(dataset.database)).groups.numbers, groups.numbers
    )
    for number in range(len(dataset)):
        source, documents, _ = dataset.samples.chunk_places(number, 64)
        ids = dataset[number]["neighbor_chunks"][..., 0]
        found = dataset.database.documents(ids[ids != NO_NEIGHBOR])
        assert not np.isin(
            groups.of(found[..., 0], found[..., 1]), groups.of(source, documents)
        ).any()


def test_packed_samples_do_not_retrieve_them_either(tmp_path: Path) -> None:
    project = build(tmp_path, "exclude-neighbors", "packed")
    dataset = build_retro_datasets(project, SAVED, 1)["train"]
    assert dataset is not None
    groups = dataset.database.groups
    for number in range(len(dataset)):
        _, source, documents = dataset.samples.read(number)
        ids = dataset[number]["neighbor_chunks"][..., 0]
        found = dataset.database.documents(ids[ids != NO_NEIGHBOR])
        assert not np.isin(
            groups.of(found[..., 0], found[..., 1]), groups.of(source, documents)
        ).any()


def test_damaged_groups_are_refused(project: Path) -> None:
    path = groups_path(project / "data")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    forget_neighbors(project)
    with pytest.raises(CorruptFileError, match=r"near_duplicates.hdf5"):
        query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=SAVED))


def test_appended_documents_are_compared_with_the_old(project: Path) -> None:
    folder = project.parent
    write_corpus(folder / "fresh.jsonl", [" ".join(text(50)), " ".join(near(text(2), 51))])
    result = update_db(UpdateDbOptions(str(project), append=[str(folder / "fresh.jsonl")]))
    assert result.report["near_duplicates"] == 1
    assert result.neighbors is not None
    assert result.neighbors.num_searched is not None  # the old documents are grouped as before
    grown = ChunkDatabase.open(project)
    assert grown.groups is not None
    assert grown.groups.of(1, np.array([0, 1])).tolist() == [20, 2]
    # This one connects two old documents, so all chunks are searched again.
    write_corpus(folder / "link.jsonl", [" ".join(near(text(10), 11, PLACES[::2]))])
    result = update_db(UpdateDbOptions(str(project), append=[str(folder / "link.jsonl")]))
    assert result.neighbors is not None
    assert result.neighbors.num_searched is None
    assert ChunkDatabase.open(project).groups.of(0, np.array([10, 11])).tolist() == [10, 10]
    assert alike(project) == {"train": 0, "valid": 0}


def test_appended_near_duplicates_are_dropped(tmp_path: Path) -> None:
    project = build(tmp_path, "drop")
    fresh = " ".join(text(50))
    texts = [" ".join(near(text(2), 51)), " ".join(near(text(15), 52)), fresh, fresh.upper()]
    write_corpus(tmp_path / "new.jsonl", texts)
    result = update_db(UpdateDbOptions(str(project), append=[str(tmp_path / "new.jsonl")]))
    assert result.report["near_duplicates_dropped"] == 2
    assert result.report["near_duplicates_of_held_out_dropped"] == 1
    ids = DocumentIds(result.project / "data" / "new_text_document")
    assert [ids[number] for number in range(len(ids))] == ["topic-2"]
    write_corpus(tmp_path / "known.jsonl", texts[:2])
    with pytest.raises(CorpusError, match="nothing but near-duplicates"):
        update_db(UpdateDbOptions(str(project), append=[str(tmp_path / "known.jsonl")]))


def test_documents_that_were_not_compared_are_refused(project: Path, tmp_path: Path) -> None:
    other = build(tmp_path, "keep")
    with pytest.raises(ProjectError, match="--near-duplicates exclude-neighbors"):
        update_db(UpdateDbOptions(str(project), exchange=str(other)))
