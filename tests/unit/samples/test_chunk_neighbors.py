"""Samples of aligned projects: their chunks, neighbors and losses against naive definitions."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.splits import document_ranges, num_retrieved_documents
from retro_mcore.data.tokens.token_file import TokenFile, bin_path
from retro_mcore.errors import CorruptFileError, ProjectError, RetroError
from retro_mcore.evaluation.repeats import distinct_text
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.samples.chunk_neighbors import first_rows
from retro_mcore.samples.neighbor_noise import NeighborNoise
from retro_mcore.samples.project_samples import numbers_in_database
from retro_mcore.samples.retro_dataset import build_retro_datasets, note_of_short_neighbors
from tests.unit.data.aligned import M, aligned_database, distances_between, save_tables
from tests.unit.data.projects import built_project, documents

#: Chosen by document counts 21 and 11: the training documents of the samples (rounded) are one more
#: than those of the database (rounded down).
SPLIT = "60,20,20"


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def project(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    changes = {"split": SPLIT, "input_weights": [0.3, 0.7], "train_samples": 24}
    made = aligned_database(folder, request.param, documents(11, 300), **changes)
    return save_tables(made)


def with_samples(project, tmp_path, **changes):
    """The project with other samples of the same documents."""
    copy = shutil.copytree(project, tmp_path / "project")
    config = ProjectConfig.load(copy)
    replace(config, **{f"retro_gpt_{name}": value for name, value in changes.items()}).save(copy)
    return copy


CHANGES = [
    {},
    {"seq_length": M, "seed": 7},
    {"seq_length": 7 * M, "seed": 99, "train_samples": 40},
    {"seq_length": 24 * M, "seed": 3, "global_batch_size": 1, "eval_iters": 3},
    {"seed": 5, "data_path": ["0.9", "corpus_text_document", "0.1", "0_text_document"]},
]


class Naive:
    """Documents of a project with their text, padding and rows, one token at a time."""

    def __init__(self, project):
        self.config, paths = ProjectConfig.load(project), ProjectPaths(project)
        self.eod = load_project_tokenizer(self.config, paths).eod
        self.files = [TokenFile(paths.data / prefix) for prefix in self.config.blend[1]]
        self.databases = {
            name: ChunkDatabase.open(project, name, own=True) for name in ("train", "valid")
        }
        self.rows = {
            (dataset, document, start // M): (name, row)
            for name, database in self.databases.items()
            for row, (dataset, document, start, *_) in enumerate(database.chunks.tolist())
        }
        train = self.databases["train"].chunks
        self.distances = {
            name: distances_between(database.chunks, train)
            for name, database in self.databases.items()
        }

    def stream(self, samples, index):
        """(dataset, document, position in it) of all S+1 tokens of a sample."""
        blended = samples.blended
        number = int(blended.dataset_index[index])
        dataset = blended.datasets[number]
        place = dataset.shuffle_index[blended.dataset_sample_index[index]]
        entry, offset = map(int, dataset.sample_index[place])
        found = []
        while len(found) <= samples.sample_length:
            document = int(dataset.document_index[entry])
            if offset == self.files[number].lengths[document]:
                entry, offset = entry + 1, 0
            else:
                found.append((number, document, offset))
                offset += 1
        return found

    def neighbors(self, key, own, num_neighbors):
        """Ids by exact search over the whole database, without the documents of the sample."""
        if key not in self.rows:
            return [NO_NEIGHBOR] * num_neighbors
        name, row = self.rows[key]
        train = self.databases["train"].chunks[:, :2].tolist()
        order = np.argsort(self.distances[name][row]).tolist()
        return [i for i in order if tuple(train[i]) not in own][:num_neighbors]

    def counts(self, place, after):
        """Whether the prediction of `after` at `place` counts: both in one text, or its end."""
        number, document, offset = place
        ends = self.files[number].sequence(document).tolist().index(self.eod)
        return place[:2] == after[:2] and offset < ends


@pytest.mark.parametrize("changes", CHANGES)
def test_samples_of_any_length_and_seed_find_the_neighbors_of_their_chunks(
    project, tmp_path, changes
):
    project = with_samples(project, tmp_path, **changes)
    naive, seen, lost = Naive(project), 0, 0
    for split, dataset in build_retro_datasets(project, 2, 1).items():
        assert len(dataset) == naive.config.num_samples(split)
        counted, chunks_per_sample = set(), naive.config.chunks_per_sample
        for index in range(len(dataset)):
            item, places = dataset[index], naive.stream(dataset.samples, index)
            tokens = [naive.files[n].sequence(d)[offset] for n, d, offset in places]
            assert item["text"].tolist() == tokens
            own = {place[:2] for place in places[:-1]}
            for chunk in range(chunks_per_sample):
                number, document, offset = places[chunk * M]
                assert offset % M == 0
                assert places[chunk * M + M - 1] == (number, document, offset + M - 1)
                key = (number, document, offset // M)
                expected = naive.neighbors(key, own, 2)
                found = item["neighbor_chunks"][chunk, :, 0].tolist()
                # 20 are saved: a sample of many documents may leave fewer than 2.
                missing = found.count(NO_NEIGHBOR)
                assert found == expected[: 2 - missing] + [NO_NEIGHBOR] * missing
                lost += missing if key in naive.rows else 0
                seen += key in naive.rows
                if key in naive.rows:
                    name, row = naive.rows[key]
                    (text,) = naive.databases[name].tokens([row])
                    here = item["text"][chunk * M : (chunk + 1) * M].tolist()
                    begin = int(naive.databases[name].chunks[row, 2]) % M
                    assert here[begin : begin + len(text)] == text.tolist()
                    assert set(here[begin + len(text) :]) <= {naive.eod}
            expected = [naive.counts(*pair) for pair in itertools.pairwise(places)]
            assert item["loss_mask"].dtype == np.float32
            assert item["loss_mask"].tolist() == expected
            assert dataset.text_item(index)["loss_mask"].tolist() == expected
            counted |= {place for place, yes in zip(places[1:], expected, strict=True) if yes}
        text = distinct_text(dataset.samples, len(dataset))
        assert text.num_tokens == len(counted)
    assert seen > 20
    assert lost <= (seen if changes.get("seq_length") == 24 * M else 0)


def test_the_last_training_document_may_be_held_out_by_the_database(project):
    """Megatron rounds the samples' documents, and the database's are rounded down."""
    naive = Naive(project)
    beyond = [
        (number, document)
        for number, file in enumerate(naive.files)
        for document in range(*document_ranges(SPLIT, len(file))["train"])
        if document >= num_retrieved_documents(SPLIT, len(file))
    ]
    assert beyond
    dataset = build_retro_datasets(project, 1, 1)["train"]
    found = 0
    for index in range(len(dataset)):
        places = naive.stream(dataset.samples, index)
        for chunk in range(naive.config.chunks_per_sample):
            number, document, offset = places[chunk * M]
            if (number, document) in beyond and (number, document, offset // M) in naive.rows:
                assert dataset[index]["neighbor_chunks"][chunk, 0, 0] != NO_NEIGHBOR
                found += 1
    assert found


def test_distances_are_those_of_the_neighbors_in_any_range(project):
    dataset = build_retro_datasets(project, 2, 1)["train"]
    naive, neighbors = Naive(project), dataset.neighbors
    distances = neighbors.distances()
    ids, found = neighbors.rows(0, len(neighbors)), distances.rows(0, len(neighbors))
    assert ids.shape == found.shape == (len(dataset) * dataset.chunks_per_sample, 20)
    assert (np.isnan(found) == (ids == NO_NEIGHBOR)).all()
    for row, (dist, these) in enumerate(zip(found, ids, strict=True)):
        sample, chunk = divmod(row, dataset.chunks_per_sample)
        number, document, offset = naive.stream(dataset.samples, sample)[chunk * M]
        there = these != NO_NEIGHBOR
        if there.any():
            name, at = naive.rows[number, document, offset // M]
            assert dist[there].tolist() == naive.distances[name][at, these[there]].tolist()
    for start, end in ((0, 1), (3, 4), (2, 11), (5, len(ids))):
        assert neighbors.rows(start, end).tolist() == ids[start:end].tolist()
    again = pickle.loads(pickle.dumps(dataset))
    assert (again[3]["neighbor_chunks"] == dataset[3]["neighbor_chunks"]).all()


def test_chunks_left_with_too_few_neighbors_are_counted(project):
    dataset, naive = build_retro_datasets(project, 20, 1)["train"], Naive(project)
    searched, short = [], 0
    for index in range(len(dataset)):
        places, item = naive.stream(dataset.samples, index), dataset[index]
        for chunk in range(dataset.chunks_per_sample):
            number, document, offset = places[chunk * M]
            searched.append((number, document, offset // M) in naive.rows)
            short += searched[-1] and item["neighbor_chunks"][chunk, -1, 0] == NO_NEIGHBOR
    assert dataset.neighbors.searched().tolist() == searched
    assert 0 < short < sum(searched) < len(searched)
    assert note_of_short_neighbors(dataset).startswith(f"{short} of {sum(searched)} chunks (")
    counted, length = dataset.neighbors.count_short(20, 2), dataset.chunks_per_sample
    assert (counted.samples, counted.chunks) == (2, sum(searched[:length] + searched[-length:]))
    assert " chunks of 2 samples (" in str(counted)
    assert note_of_short_neighbors(build_retro_datasets(project, 1, 1)["train"]) is None
    assert note_of_short_neighbors(dataset.samples) is None


def test_noise_changes_training_samples_alone(project):
    noise = NeighborNoise(seed=1, drop_neighbors=0.5)
    plain, noisy = build_retro_datasets(project), build_retro_datasets(project, train_noise=noise)
    changed = noisy["train"][0]["neighbor_chunks"] != plain["train"][0]["neighbor_chunks"]
    assert changed.any()
    assert (noisy["train"][0]["loss_mask"] == plain["train"][0]["loss_mask"]).all()
    assert (noisy["valid"][0]["neighbor_chunks"] == plain["valid"][0]["neighbor_chunks"]).all()


def test_rows_are_found_by_binary_search():
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 3, 8, 50):
        places = sorted({tuple(rng.integers(0, (2, 4, 40)).tolist()) for _ in range(size)})
        chunks = np.array([(*place, 0, 0) for place in places], np.uint32).reshape(-1, 5)
        if not len(chunks):
            continue
        for dataset in range(3):
            documents, starts = rng.integers(0, 5, 30), rng.integers(0, 42, 30)
            wanted = zip(documents.tolist(), starts.tolist(), strict=True)
            expected = [sum(p < (dataset, *place) for p in places) for place in wanted]
            assert first_rows(chunks, dataset, documents, starts).tolist() == expected


def refused(project, error, match):
    with pytest.raises(error, match=match):
        build_retro_datasets(project)


def test_damaged_and_foreign_tables_are_refused(project, tmp_path):
    copy = with_samples(project, tmp_path)
    table = copy / "query" / "chunks_train"
    last = sorted(table.glob("*.hdf5"))[-1]
    shutil.move(last, tmp_path / last.name)
    refused(copy, CorruptFileError, r"holds neighbors of \d+ chunks, train\.hdf5 has \d+")
    shutil.move(tmp_path / last.name, last)
    settings = json.loads((copy / "retro_mcore.json").read_text())
    swapped = {"train": "chunks_valid", "valid": "chunks_train"}
    for dirs, error, match in (
        (swapped, RetroError, "neighbors of valid"),
        ({"train": "chunks_train"}, ProjectError, "no neighbors of the valid samples"),
        (None, ProjectError, "names no neighbors of the train samples"),
    ):
        changed = {**settings, "chunk_neighbor_dirs": dirs}
        (copy / "retro_mcore.json").write_text(json.dumps(changed))
        refused(copy, error, match)


def test_documents_that_are_not_padded_are_refused(project, tmp_path):
    copy = with_samples(project, tmp_path, chunk_length=2 * M, seq_length=4 * M)
    refused(copy, CorruptFileError, "do not fill whole chunks of 32 tokens")


@pytest.mark.parametrize(
    ("held", "wanted", "numbers"),
    [
        ("aab", "aab", [0, 1, 2]),
        ("aaab", "ba", [3, 0]),
        ("ab", "aca", [0, 3, 0]),
        ("bca", "abc", [2, 0, 1]),
    ],
)
def test_datasets_of_the_same_tokens_have_numbers_of_their_own(tmp_path, held, wanted, numbers):
    """Both were taken for the first, so that chunks of the second found their own documents."""
    config = ProjectConfig.load(built_project())
    made: list[ProjectConfig] = []
    for name, contents in (("source", held), ("own", wanted)):
        paths = ProjectPaths(tmp_path / name)
        paths.data.mkdir(parents=True)
        prefixes = [f"{place}_text" for place in range(len(contents))]
        for prefix, content in zip(prefixes, contents, strict=True):
            bin_path(paths.data / prefix).write_text(content)
        path = [item for prefix in prefixes for item in ("1.0", prefix)]
        made.append(replace(config, retro_gpt_data_path=path))
        made[-1].save(paths.root)
    own, source = (ProjectPaths(tmp_path / name) for name in ("own", "source"))
    assert numbers_in_database(own, made[1], source) == numbers
