"""Project directories go both ways between here and megatron-core 0.15.3, on real text."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.project import SPLITS, ProjectConfig, ProjectPaths, Split
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.samples.retro_dataset import RetroDataset, build_retro_datasets
from tests.parity import environment
from tests.parity.upstream_pipeline import NUM_SAVED
from tests.unit.data.projects import documents, preprocess_options, write_corpus

pytestmark = pytest.mark.parity

SCRIPT = str(environment.ROOT / "tests" / "parity" / "upstream_pipeline.py")
NUM_NEIGHBORS = NUM_SAVED - 2


def preprocess(project: Path) -> None:
    """Two corpora of Python's help topics, of unequal weights."""
    texts = documents(40, 700)
    first = write_corpus(project.parent / "first.jsonl", texts[::2] + texts[1:10:2])
    second = write_corpus(project.parent / "second.jsonl", texts[1::2])
    changes = {"input": [str(first), str(second)], "input_weights": [0.7, 0.3]}
    preprocess_corpus(preprocess_options(project, first, train_samples=24, **changes))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project built here."""
    project = tmp_path_factory.mktemp("ours") / "project"
    preprocess(project)
    build_db(BuildDbOptions(str(project), retro_doc_block_size=7))
    build_index(BuildIndexOptions(str(project), embedder="lexical"))
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=NUM_SAVED))
    return project


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose database, index and neighbors the retired pipeline built."""
    project = tmp_path_factory.mktemp("theirs") / "project"
    preprocess(project)
    for path in [project / "retro_mcore.json", *project.rglob("*.done")]:
        path.unlink()
    for path in project.glob("stages/*"):
        path.unlink()
    environment.run([SCRIPT, "build", str(project)])
    return project


def read_there(project: Path, out: Path) -> dict[str, np.ndarray]:
    environment.run([SCRIPT, "read", str(project), str(out)])
    with np.load(out) as arrays:
        return dict(arrays)


def read_here(project: Path) -> dict[Split, dict[str, np.ndarray]]:
    """Every sample of every split."""
    read = {}
    for split, dataset in build_retro_datasets(project, NUM_NEIGHBORS, 2).items():
        assert isinstance(dataset, RetroDataset)
        samples = [dataset[i] for i in range(len(dataset))]
        read[split] = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return read


def assert_same_samples(project: Path, there: dict[str, np.ndarray]) -> None:
    """Text, first ids and, where we do not mask, ids and tokens; and what we mask is padding.

    Upstream takes ids modulo the number of chunks where there is no neighbor or no continuation.
    """
    chunk_length = ProjectConfig.load(project).retro_gpt_chunk_length
    for split, here in read_here(project).items():
        chunks, tokens = there[f"{split}/neighbor_chunks"], there[f"{split}/neighbor_tokens"]
        np.testing.assert_array_equal(here["text"], there[f"{split}/text"])
        known = here["neighbor_chunks"] != NO_NEIGHBOR
        assert known[..., 0].mean() > 0.9  # or there would be little to compare
        assert known[..., 1].mean() > 0.5
        np.testing.assert_array_equal(here["neighbor_chunks"][known], chunks[known])
        of_chunk = np.repeat(known, chunk_length, axis=-1)
        np.testing.assert_array_equal(here["neighbor_tokens"][of_chunk], tokens[of_chunk])
        assert here["neighbor_mask"][~of_chunk].all()
        # A real token is masked nowhere: only padding follows the tokens of a known chunk.
        short = here["neighbor_mask"] & of_chunk
        assert len(np.unique(tokens[short])) <= 1


def test_what_is_built_here_is_read_there(ours: Path, tmp_path: Path) -> None:
    there = read_there(ours, tmp_path / "read.npz")
    assert_same_samples(ours, there)
    for split in SPLITS:
        name = ProjectConfig.load(ours).retro_neighbor_dirs[split]
        assert name == f"{split}_{there[f'{split}/hash']}"


def test_what_is_built_there_is_read_here(theirs: Path, tmp_path: Path) -> None:
    assert not (theirs / "retro_mcore.json").exists()
    assert not list(theirs.rglob("*.done"))
    there = read_there(theirs, tmp_path / "read.npz")
    assert_same_samples(theirs, there)
    for split, dataset in build_retro_datasets(theirs, NUM_NEIGHBORS, 2).items():
        assert dataset is not None
        name = ProjectConfig.load(theirs).retro_neighbor_dirs[split]
        assert name == f"{split}_{dataset.samples.description_hash}"


def test_a_moved_directory_of_theirs_is_read(theirs: Path, tmp_path: Path) -> None:
    before = read_here(theirs)["train"]
    moved = shutil.copytree(theirs, tmp_path / "moved")
    after = read_here(moved)["train"]
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_both_databases_hold_the_same_rows(ours: Path, theirs: Path) -> None:
    """Every dataset of every database file, from the same tokens."""
    for prefix in ProjectConfig.load(ours).blend[1]:
        for suffix in (".bin", ".idx"):
            name = f"{prefix}{suffix}"
            assert (ours / "data" / name).read_bytes() == (theirs / "data" / name).read_bytes()
    mine, other = ProjectPaths(ours), ProjectPaths(theirs)
    names = sorted(path.relative_to(mine.db) for path in mine.db.rglob("*.hdf5"))
    assert names == sorted(path.relative_to(other.db) for path in other.db.rglob("*.hdf5"))
    for name in names:
        if name.stem == "sampled":  # theirs must sample, ours takes all
            continue
        with h5py.File(mine.db / name, "r") as first, h5py.File(other.db / name, "r") as second:
            assert set(first) == set(second), name
            for key in first:
                np.testing.assert_array_equal(first[key][()], second[key][()], f"{name} {key}")
                assert first[key].dtype == second[key].dtype, (name, key)
    assert len(ChunkDatabase.open(theirs)) > 100
