"""Shards, embedder, index and neighbors."""

import json
import pickle
import shutil

import h5py
import numpy as np
import pytest

from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.errors import ConfigurationError
from retro_mcore.project import ProjectConfig, ProjectPaths, ProjectSettings
from retro_mcore.project.shards import choose_shard_length, cut, run_shards
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders import build_embedder
from retro_mcore.retrieval.embedders.base import embed_unique
from retro_mcore.retrieval.filtering import keep_first
from retro_mcore.retrieval.index import Embeddings
from retro_mcore.retrieval.neighbor_tables import SavedDistances, SavedNeighbors
from tests.unit.data.projects import project_of, write_rows


def test_shards_are_named_as_upstream_names_them(tmp_path):
    names = [shard.path.name for shard in cut(tmp_path, 250, 100)]
    assert names == ["0000-0100.hdf5", "0100-0200.hdf5", "0200-0250.hdf5"]
    assert [shard.path.name for shard in cut(tmp_path, 1, 100)] == ["0-1.hdf5"]
    assert cut(tmp_path, 0, 100) == []
    assert choose_shard_length(10_000_000, 100_000) == 100_000
    assert choose_shard_length(6400, 100_000) == 100
    assert choose_shard_length(3, 100_000) == 64


def test_only_missing_and_damaged_shards_are_built_again(tmp_path):
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    shards = write_rows(rows, tmp_path, 3)
    before = [shard.path.read_bytes() for shard in shards]
    shards[0].path.unlink()
    shards[2].path.write_bytes(b"\0" * len(before[2]))
    built = []

    def build(shard, path):
        built.append(shard.start)
        with h5py.File(path, "w") as file:
            file["data"] = rows[shard.start : shard.end]

    report = run_shards(shards, build, "rows", "again")
    assert built == [0, 6]
    assert (report.total, report.reused, report.damaged) == (4, 2, (shards[2].path,))
    assert [shard.path.read_bytes() for shard in shards] == before
    assert str(run_shards(shards, build, "rows", "third")) == "4 (reused)"
    assert run_shards(shards, build, "other rows", "foreign").built == 4


def test_the_installed_encoder_finds_the_related_text():
    embedder = build_embedder("minilm", device="cpu")
    texts = ["A dog chases a cat.", "Interest rates rose.", "A dog chases a cat.", ""]
    vectors = embed_unique(embedder, texts)
    assert vectors.shape == (4, embedder.dimension) == (4, 384)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors[0], vectors[2])
    query = embedder.embed(["The puppy runs after a kitten."])[0]
    assert query @ vectors[0] > query @ vectors[1]


def test_an_embedder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"--embedder: .*nothing"):
        build_embedder(str(tmp_path / "nothing"), device="cpu")


def test_the_first_allowed_candidates_are_kept_in_order():
    candidates = np.array([[7, 3, 9, 1], [5, 6, -1, -1], [2, 4, 8, 0]])
    allowed = np.array([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    distances = np.where(candidates < 0, np.inf, candidates / 2).astype(np.float32)
    ids, kept = keep_first(candidates, distances, allowed, 3)
    assert ids.tolist() == [[3, 1, -1], [5, 6, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(kept, np.where(ids < 0, np.nan, ids / 2))
    assert keep_first(candidates, distances, allowed, 6)[0][1].tolist() == [5, 6, -1, -1, -1, -1]


def test_neighbors_are_the_nearest_chunks_of_other_documents():
    """Against exact search and a filter, row by row."""
    from retro_mcore.data.tokenizers.loading import load_project_tokenizer
    from retro_mcore.retrieval.chunk_text import chunk_texts
    from retro_mcore.samples.project_samples import build_gpt_samples

    paths = ProjectPaths(project_of("minilm"))
    config = ProjectConfig.load(paths.root)
    tokenizer = load_project_tokenizer(config, paths)
    database = ChunkDatabase.open(paths.root)
    embedder = build_embedder("minilm", device="cpu")
    shards = cut(paths.embeddings, len(database), config.retro_block_size)
    everything = Embeddings(shards).rows(np.arange(len(database)))
    samples = build_gpt_samples(config, paths, "train")
    saved = SavedNeighbors(paths.query / config.retro_neighbor_dirs["train"])
    saved_distances = pickle.loads(pickle.dumps(SavedDistances(saved.directory)))
    assert len(saved) == len(saved_distances) == 8 * 4
    assert saved.num_saved == 5
    for sample in (0, 5, 7):  # chunks of sample 5 lie in two files
        rows = saved.rows(sample * 4, sample * 4 + 4)
        own = set(samples.document_ids(sample).tolist())
        for chunk in range(4):
            tokens = samples.tokens(sample)[chunk * 16 : chunk * 16 + 16]
            vector = embedder.embed(chunk_texts(tokenizer, [tokens]))[0]
            distances = ((everything - vector) ** 2).sum(1)
            documents = database.documents(np.arange(len(database)))[:, 1]
            allowed = [i for i in np.argsort(distances) if documents[i] not in own]
            assert not set(database.documents(rows[chunk])[:, 1].tolist()) & own
            # Unit vectors, of which a batch of another shape may round the last bits otherwise.
            np.testing.assert_allclose(distances[rows[chunk]], distances[allowed[:5]], atol=1e-4)
            told = saved_distances.rows(sample * 4 + chunk, sample * 4 + chunk + 1)[0]
            np.testing.assert_allclose(told, distances[rows[chunk]], atol=1e-4)


def test_the_recall_is_stored_beside_the_index():
    paths = ProjectPaths(project_of("minilm"))
    settings = ProjectSettings.load(paths.root)
    assert (settings.embedder, settings.embedding_dimension) == ("minilm", 384)
    assert settings.index_string == "Flat"
    assert settings.num_neighbors_save == 5
    report = json.loads(paths.recall_report("Flat").read_text())
    assert report["at"]["1"] == 1.0
    assert report["num_vectors"] == len(ChunkDatabase.open(paths.root))
    assert paths.added_index("Flat").is_file()
    assert paths.empty_index("Flat").is_file()


def test_neighbors_without_their_distances_are_searched_again(tmp_path):
    project = tmp_path / "project"
    shutil.copytree(project_of("minilm"), project)
    (directory,) = (project / "query").glob("train_*")
    before = {path: path.read_bytes() for path in directory.rglob("*.hdf5")}
    files = sorted((directory / "distances").glob("*.hdf5"))
    assert [path.name for path in files] == [path.name for path in sorted(directory.glob("*.hdf5"))]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    report = query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    train = report.reports["train"]
    assert (train.built, train.total) == (2, 2)
    assert {path: path.read_bytes() for path in directory.rglob("*.hdf5")} == before
