"""Ids of documents, from the corpus to the project."""

import json
import pickle

import numpy as np
import pytest

from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.data.tokens.document_ids import (
    DocumentIds,
    DocumentNames,
    ids_path,
    pack_ids,
    write_ids,
)
from retro_mcore.errors import CorruptFileError
from retro_mcore.project import ProjectPaths
from tests.unit.data.projects import documents, preprocess_options


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder of all kinds of ids, and JSON lines whose ids have another name."""
    folder = tmp_path_factory.mktemp("ids")
    texts = documents(12)
    source = folder / "source"
    (source / "deeper").mkdir(parents=True)
    lines = [
        {"text": texts[0], "id": "grün/☃"},
        {"text": " ", "id": "left out, being empty"},
        {"text": texts[1], "id": 17},
        {"text": texts[2]},
        {"text": texts[3], "id": None},
        {"text": texts[4], "id": ["no", "name"]},
        {"text": texts[5], "id": ""},
    ]
    (source / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (source / "deeper" / "b.txt").write_text(texts[6])
    other = folder / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": t, "url": f"u{i}"}) + "\n" for i, t in enumerate(texts))
    )
    first = ProjectPaths(folder / "first")
    preprocess_corpus(preprocess_options(first.root, source, split="100,0,0"))
    second = ProjectPaths(folder / "second")
    preprocess_corpus(preprocess_options(second.root, other, id_key="url"))
    return first, second


def test_ids_of_lines_and_files(project):
    ids = DocumentIds(project[0].data / "source_text_document")
    found = [ids[i] for i in range(len(ids))]
    lines = (project[0].root.parent / "source" / "a.jsonl").read_bytes().splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)]).tolist()
    places = [f"a.jsonl:{starts[i]}" for i in (3, 4, 5)]
    assert found == ["grün/☃", "17", *places, "", "deeper/b.txt"]
    with pytest.raises(IndexError, match="document 7 of 7"):
        ids[7]
    assert pickle.loads(pickle.dumps(ids))[0] == "grün/☃"


def test_another_key_names_the_documents(project):
    names = DocumentNames([project[1].data / "other_text_document", project[1].data / "none"])
    assert names.describe(0, 3) == "u3 (document 3 of other_text_document)"
    assert names.describe(1, 3) == "document 3 of none"
    assert pickle.loads(pickle.dumps(names)).id_of(0, 2) == "u2"
    assert names.id_of(1, 0) is None


def test_a_pair_brings_its_ids(project, tmp_path):
    (model,) = project[1].tokenizer.glob("*.model")
    options = preprocess_options(
        tmp_path / "project", project[1].data / "other_text_document", tokenizer_model=str(model)
    )
    preprocess_corpus(options)
    ids = DocumentIds(tmp_path / "project" / "data" / "other_text_document")
    assert [ids[i] for i in range(3)] == ["u0", "u1", "u2"]


def test_damaged_ids_are_named(tmp_path):
    packed, lengths = pack_ids(["one", "\ud800two"])
    write_ids(ids_path(tmp_path / "d"), lengths, iter([packed]))
    assert DocumentIds(tmp_path / "d")[1] == "?two"
    write_ids(ids_path(tmp_path / "d"), lengths[:1], iter([packed[:3]]))
    assert len(DocumentIds(tmp_path / "d")) == 1
    path = ids_path(tmp_path / "d")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(CorruptFileError, match=r"d\.ids\.hdf5"):
        DocumentIds(tmp_path / "d")
