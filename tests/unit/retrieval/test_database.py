"""The chunk database against a naive cutting of the same documents."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.token_file import open_token_files
from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.project.config import read_json_list
from retro_mcore.retrieval.bert_tokens import BertTokenCounter, default_bert_vocab
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.database_build import chunk_bounds
from tests.unit.data.projects import built_project

M = 16


@pytest.fixture(scope="module")
def project():
    return ProjectPaths(built_project())


@pytest.fixture(scope="module")
def database(project):
    return ChunkDatabase.open(project.root)


@pytest.fixture(scope="module")
def naive(project):
    """Rows (document, start, end, BERT tokens) of all documents, one chunk at a time."""
    config = ProjectConfig.load(project.root)
    (dataset,) = open_token_files(config, project)
    tokenizer = load_project_tokenizer(config, project)
    counter = BertTokenCounter(default_bert_vocab())
    rows = []
    for document in range(len(dataset)):
        tokens = dataset.sequence(document).tolist()
        assert tokens.pop() == tokenizer.eod
        for start in range(0, len(tokens), M):
            chunk = tokens[start : start + M]
            count = counter.count([tokenizer.detokenize(chunk)])[0]
            rows.append((document, start, start + len(chunk), count))
    return [row for row in rows if row[3]], [row for row in rows if not row[3]]


def test_individual_and_merged_files_hold_the_chunks(project, naive):
    valid, invalid = naive
    files = sorted(project.individual_db("corpus_text_document").glob("*.hdf5"))
    assert [file.name for file in files] == [
        "000-006.hdf5",
        "006-012.hdf5",
        "012-018.hdf5",
        "018-020.hdf5",
    ]
    found, found_invalid, offsets = [], [], []
    for path in files:
        with h5py.File(path) as file:
            assert file["chunks_valid"].dtype == np.uint32
            assert file["doc_offsets"].dtype == np.uint64
            found += file["chunks_valid"][:].tolist()
            found_invalid += file["chunks_invalid"][:].tolist()
            offsets += file["doc_offsets"][:].tolist()
    assert found == [list(row) for row in valid]
    assert found_invalid == [list(row) for row in invalid]
    per_document = np.bincount([row[0] for row in valid], minlength=20)
    assert offsets[:6] == [[i, sum(per_document[: i + 1])] for i in range(6)]
    assert offsets[6] == [6, per_document[6]]


def test_only_training_documents_are_retrieved_from(project, naive, database):
    valid, _ = naive
    train = [[0, *row] for row in valid if row[0] < 12]  # 60% of 20 documents
    assert database.chunks.tolist() == train
    with h5py.File(project.merged_db("valid")) as file:
        assert file["chunks"][:].tolist() == [[0, *row] for row in valid if row[0] >= 12]
        assert sorted(file) == ["chunks", "n_written"]
    with h5py.File(project.merged_db("train")) as file:
        assert file["n_written"][:].tolist() == [len(train)]
        assert file["doc_offsets"].shape == (12, 3)
        assert file["doc_offsets"][-1].tolist() == [0, 11, len(train)]
    (info,) = read_json_list(project.dataset_infos)
    assert info["n_docs_train"] == 12
    assert info["n_chunks_train"] == info["n_chunks_sampled"] == len(train)


def test_chunk_bounds_keep_the_short_last_chunk():
    sequence, start, end = chunk_bounds(np.array([5, 0, 4]), 2)
    assert sequence.tolist() == [0, 0, 0, 2, 2]
    assert start.tolist() == [0, 2, 4, 0, 2]
    assert end.tolist() == [2, 4, 5, 2, 4]


def test_continuations_stay_in_their_document(database):
    ids = np.arange(len(database))
    documents = database.documents(ids)[:, 1]
    expected = [
        i + 1 if i + 1 < len(ids) and documents[i + 1] == documents[i] else NO_NEIGHBOR for i in ids
    ]
    assert database.continuation(ids).tolist() == expected
    assert database.continuation(np.array([[NO_NEIGHBOR]])).tolist() == [[NO_NEIGHBOR]]
    assert NO_NEIGHBOR in expected[:-1]


def test_retrieved_tokens_are_padded_and_masked(database):
    last = int(np.flatnonzero(database.continuation(np.arange(len(database))) == NO_NEIGHBOR)[0])
    ids = np.array([[0, last], [NO_NEIGHBOR, 1]])
    tokens, mask = database.retrieved_tokens(ids, 2, M, pad_id=2)
    assert tokens.shape == mask.shape == (2, 2, 2 * M)
    assert tokens.dtype == np.int64
    assert tokens[0, 0].tolist() == np.concatenate(database.tokens([0, 1])).tolist()
    assert not mask[0, 0].any()
    (short,) = database.tokens([last])
    assert tokens[0, 1].tolist() == short.tolist() + [2] * (2 * M - len(short))
    assert mask[0, 1].tolist() == [False] * len(short) + [True] * (2 * M - len(short))
    assert mask[1, 0].all()
    assert (tokens[1, 0] == 2).all()


def test_padded_tokens_of_several_datasets_and_at_the_very_end(tmp_path):
    """A window of M tokens would run over the end of the first dataset, whose chunks are short."""
    sources = [
        SimpleNamespace(tokens=np.arange(10, 17, dtype=np.uint16), starts=np.array([0, 4])),
        SimpleNamespace(tokens=np.arange(50, 90, dtype=np.int32), starts=np.array([0])),
    ]
    rows = [[0, 0, 0, 3, 1], [1, 0, 32, 40, 1], [0, 1, 0, 3, 1], [1, 0, 0, 8, 1]]
    with h5py.File(tmp_path / "train.hdf5", "w") as file:
        file["chunks"] = np.array(rows, np.uint32)
    database = ChunkDatabase(tmp_path / "train.hdf5", sources)
    for ids in ([0], [2], [1, 3], [0, 1, NO_NEIGHBOR, 2, 3]):
        tokens, mask = database.padded_tokens(np.array(ids), 8, -5)
        for row, chunk_id in enumerate(ids):
            known = [] if chunk_id == NO_NEIGHBOR else database.tokens([chunk_id])[0].tolist()
            assert tokens[row].tolist() == known + [-5] * (8 - len(known))
            assert mask[row].tolist() == [False] * len(known) + [True] * (8 - len(known))
    with pytest.raises(ProjectError, match=r"has no chunk 4\. It has 4"):
        database.tokens([0, 4])


def test_a_missing_or_damaged_database_is_named(project, tmp_path):
    import shutil

    copy = tmp_path / "project"
    shutil.copytree(project.root, copy)
    path = ProjectPaths(copy).merged_db("train")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptFileError, match=r"train\.hdf5.*Run build_db"):
        ChunkDatabase.open(copy)
    path.unlink()
    with pytest.raises(ProjectError, match=r"train\.hdf5: no such file. Run build_db"):
        ChunkDatabase.open(copy)
