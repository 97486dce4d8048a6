"""Reading JSON lines and text."""

import json

import pytest

from retro_mcore.data.corpus import list_parts, read_documents, read_part
from retro_mcore.errors import CorpusError


def test_folders_are_read_in_order_and_blank_documents_left_out(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("erster — ü", encoding="utf-8")
    (tmp_path / "c.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "d.jsonl").write_text('{"text": "third"}\n\n{"text": ""}\n')
    assert [document.text for document in read_documents(tmp_path)] == [
        "erster — ü",
        "second",
        "third",
    ]


@pytest.mark.parametrize("part_bytes", [1, 7, 40, 1000])
def test_parts_hold_every_line_once(tmp_path, part_bytes):
    texts = [f"document {i} ü" * (i % 4 + 1) for i in range(20)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    parts = list_parts(path, part_bytes)
    assert [document.text for part in parts for document in read_part(part)] == texts


def test_several_keys_are_joined(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"title": "T", "body": "B"}\n')
    assert [document.text for document in read_documents(path, ["title", "body"])] == ["T\n\nB"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "a"', r"corpus\.jsonl:3: invalid JSON"),
        ('{"body": "a"}', r"corpus\.jsonl:3: no key 'text' among \['body'\].*--json-keys"),
        ('{"text": 7}', r"corpus\.jsonl:3: 'text' is int, not a string"),
        ('["text"]', r"corpus\.jsonl:3: not a JSON object"),
        (b'{"text": "\xff"}', r"corpus\.jsonl:3: not UTF-8 \(byte 0xff"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, found):
    path = tmp_path / "corpus.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError, match=found):
        list(read_documents(path))


def test_missing_input_and_text_that_is_not_utf8(tmp_path):
    with pytest.raises(CorpusError, match="no such file or folder"):
        list(read_documents(tmp_path / "none"))
    with pytest.raises(CorpusError, match=r"no \.jsonl or \.txt"):
        list(read_documents(tmp_path))
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"latin\.txt: not UTF-8 .*offset 2"):
        list(read_documents(tmp_path))
