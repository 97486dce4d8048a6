"""Reading JSON lines and text, compressed or not."""

import gzip
import json
import re
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_mcore.data.corpus.documents import list_parts, read_documents, read_part, text_cleaner
from retro_mcore.errors import CorpusError, MissingDependencyError
from tests.unit.data import any_json


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
    with pytest.raises(CorpusError, match=r"holds no \.jsonl, .*or \.txt files"):
        list(read_documents(tmp_path))
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"latin\.txt: not UTF-8 .*offset 2"):
        list(read_documents(tmp_path))


def compress(path, data: bytes) -> None:
    import zstandard

    middle = len(data) // 2  # two frames, as parallel compressors write them
    squeeze = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor().compress
    path.write_bytes(squeeze(data[:middle]) + squeeze(data[middle:]))


def test_compressed_lines_in_a_folder_with_others(tmp_path):
    lines = b"".join(json.dumps({"text": f"line {i} \u00fc"}).encode() + b"\n" for i in range(5000))
    compress(tmp_path / "a.jsonl.gz", lines)
    compress(tmp_path / "b.json.zst", lines)
    (tmp_path / "c.jsonl").write_bytes(lines)
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "ignored.md").write_text("not read")
    documents = list(read_documents(tmp_path))
    texts = [f"line {i} \u00fc" for i in range(5000)]
    assert [document.text for document in documents] == [*texts * 3, "text"]
    sources = [document.source_id.removeprefix(f"{tmp_path}/") for document in documents]
    assert sources[7].split(":")[1] == sources[5007].split(":")[1] == sources[10007].split(":")[1]
    assert sources[5007].startswith("b.json.zst:")
    assert len(list_parts(tmp_path, 10_000)) > 5  # the plain file is cut, the others are not


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "flip", "foreign"])
def test_damaged_compression_is_named(tmp_path, ending, harm):
    path = tmp_path / f"corpus.jsonl{ending}"
    compress(path, b'{"text": "a line"}\n' * 2000)
    data = bytearray(path.read_bytes())
    if harm == "cut":
        data = data[:-3]
    elif harm == "flip":
        data[2 if ending == ".gz" else 1] ^= 0xFF
    else:
        data = bytearray(b'{"text": "not compressed"}\n')
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=rf"corpus\.jsonl\{ending}: damaged \{ending} data"):
        list(read_documents(path))


def test_a_malformed_line_of_a_compressed_file_is_numbered(tmp_path):
    path = tmp_path / "corpus.jsonl.zst"
    compress(path, b'{"text": "fine"}\n' * 3 + b'{"text"\n')
    with pytest.raises(CorpusError, match=r"corpus\.jsonl\.zst:4: invalid JSON"):
        list(read_documents(path))


def test_text_is_cleaned_on_request(tmp_path):
    path = tmp_path / "corpus.jsonl"
    broken = "gr\u00fcn &lt;b&gt;".encode().decode("latin-1")
    path.write_text(json.dumps({"text": broken}) + "\n" + json.dumps({"text": "\u0007"}) + "\n")
    assert [document.text for document in read_documents(path)] == [broken, "\u0007"]
    cleaned = [document.text for document in read_documents(path, clean=text_cleaner())]
    assert cleaned == ["gr\u00fcn <b>"]  # and the document that was a control character is gone


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl.zst"
    compress(path, b"{}\n")
    for name in ("ftfy", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"ftfy: not installed.*retro-mcore.corpus"):
        text_cleaner()
    with pytest.raises(MissingDependencyError, match="zstandard: not installed"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("text".encode("utf-16"), "is UTF-16 text"),
        (b"\xfe\xff\x00t", "is UTF-16 text"),
        ("text".encode("utf-16-le"), "NUL byte at offset 1"),
        (b"\0" * 4096, "NUL byte at offset 0"),
        (b"some text\0\0\0", "NUL byte at offset 9"),
        (b"%PDF-1.4\n1 0 obj", "a PDF file"),
        (b"PAR1\x15\x04\x15\x00", "NUL byte at offset 7"),
    ],
)
def test_a_text_file_that_is_no_text(tmp_path, data, found):
    """Files of other programs, and what a full disk left: they became one document."""
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(data)
    for source in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(CorpusError, match=rf"b\.txt: .*{found}"):
            list(read_documents(source))


def count(path) -> tuple[list[str], dict[str, int]]:
    """Texts of all parts, and what was counted."""
    counts: Counter[str] = Counter()
    documents = [d for part in list_parts(path) for d in read_part(part, counts=counts)]
    return [document.text for document in documents], {k: v for k, v in counts.items() if v}


def test_what_is_dropped_and_replaced_is_counted(tmp_path):
    """As exported by Windows programs and by JavaScript, which cuts characters in two."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.txt").write_bytes(b"")
    lines = ['{"text": "x\\ud83d", "id": 1}', '{"text": "\\ude00\\ude00"}', '{"text": " "}', ""]
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (tmp_path / "d.jsonl").write_bytes(b"")
    found, counts = count(tmp_path)
    assert found == ["text", "x\ufffd", "\ufffd\ufffd"]
    assert counts == {
        "byte_order_marks_removed": 2,
        "empty_documents": 2,
        "empty_files": 2,
        "replaced_characters": 3,
        "documents_without_id": 1,
    }


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_of_blank_lines_holds_nothing(tmp_path, data):
    (tmp_path / "a.jsonl").write_bytes(data)
    assert count(tmp_path / "a.jsonl")[0] == []


def test_cleaned_documents_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "plain"}\n{"text": "&lt;b&gt;"}\n')
    counts: Counter[str] = Counter()
    (part,) = list_parts(path)
    list(read_part(part, clean=text_cleaner(), counts=counts))
    assert counts["cleaned_documents"] == 1


SEPARATORS = ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001c", "\u001e", "\r"]


@pytest.mark.parametrize("part_bytes", [3, 1 << 20])
def test_only_a_line_feed_ends_a_line(tmp_path, part_bytes):
    """Text of web pages holds other ends of lines, which `splitlines` would cut at."""
    expected = [f"a{separator}b" for separator in SEPARATORS]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in expected]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode())  # the last one without its end
    parts = list_parts(path, part_bytes)
    assert [document.text for part in parts for document in read_part(part)] == expected


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"[" * 100_000, r"a\.jsonl:2: invalid JSON \(nested too deeply\)"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a\.jsonl:2: .*thousands of digits"),
        (b"\0" * 100, r"a\.jsonl:2: invalid JSON \(NUL bytes"),
        (b"null", r"a\.jsonl:2: not a JSON object but NoneType"),
        (b'"text"', r"a\.jsonl:2: not a JSON object but str"),
        (b'{"text": ["a"]}', r"a\.jsonl:2: 'text' is list"),
        (b'{"text": "a"} {"text": "b"}', r"a\.jsonl:2: invalid JSON \(Extra data, column 15\)"),
    ],
)
def test_lines_that_no_sane_writer_makes(tmp_path, line, found):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine", "score": NaN}\n' + line + b"\n")
    with pytest.raises(CorpusError, match=found):
        list(read_documents(path))


def test_a_text_that_stands_twice_in_a_line_is_refused(tmp_path):
    """The last one would be read, and the first one would be lost without a word."""
    path = tmp_path / "a.jsonl"
    for line, key in (
        ('{"text": "a", "text": "a"}', "text"),
        ('{"id": 1, "text": "", "id": 2}', "id"),
    ):
        path.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(CorpusError, match=rf"a\.jsonl:2: has the key '{key}' more than once"):
            list(read_documents(path))
    path.write_text('{"text": "a", "n": 1, "n": 2, "meta": {"text": 1, "text": 2}}')
    assert [document.text for document in read_documents(path)] == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        (
            "a.json",
            json.dumps([{"text": "a"}, {"text": "b"}], indent=2),
            r"list.*jq -c '\.\[\]' \S+a\.json > \S+a\.jsonl",
        ),
        (
            "a.json",
            json.dumps([{"text": "a"}, {"text": "b"}]),
            r"list.*jq -c '\.\[\]' \S+a\.json > ",
        ),
        ("a.jsonl", '\ufeff[\n{"text": "a"},\n{"text": "b"}]\n', r"list.*> \S+a\.lines\.jsonl"),
        (
            "a b.json",
            json.dumps({"text": "a", "id": 1}, indent=2),
            r"object.*jq -c \. '\S+a b\.json' > ",
        ),
        ("a.json", '{"text": "a",\n "id": 1}\n{"text": "b",\n "id": 2}\n', r"object.*jq -c \."),
        ("a.json", '{"text": "a"}\n{\n"text": "b"\n}\n', r"object.*jq -c \."),
    ],
)
def test_json_that_is_not_a_document_per_line_says_how_to_convert_it(tmp_path, name, text, found):
    """The commonest form of a .json file; "Expecting value" helps nobody."""
    (tmp_path / name).write_text(text)
    with pytest.raises(
        CorpusError, match=rf"\.jsonl?:\d: invalid JSON lines: it holds an? {found}"
    ):
        list(read_documents(tmp_path / name))


_LINES = any_json.odd_lines | (any_json.records(["text", "id"]) | any_json.values).map(
    lambda value: json.dumps(value).encode()
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@any_json.few
@given(
    lines=st.lists(_LINES, max_size=4),
    ending=st.sampled_from([b"\n", b"\r\n"]),
    part_bytes=st.integers(1, 50),
)
def test_any_bytes_are_documents_or_one_error(scratch, lines, ending, part_bytes):
    path = scratch / "a.jsonl"
    path.write_bytes(ending.join(lines))
    found = any_json.outcome(
        lambda: [d for part in list_parts(path, part_bytes) for d in read_part(part)], CorpusError
    )
    if isinstance(found, CorpusError):
        assert re.fullmatch(rf"{re.escape(str(path))}:\d+", found.subject)
        assert "\n" not in str(found)
    else:
        assert all(d.text.strip() and d.text.encode() and d.source_id.encode() for d in found)
        assert found == list(read_documents(path))  # however it is cut


@any_json.few
@given(data=st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_any_bytes_as_a_text_file(scratch, data):
    path = scratch / "a.txt"
    path.write_bytes(data)
    found = any_json.outcome(lambda: [d.text for d in read_documents(path)], CorpusError)
    if isinstance(found, CorpusError):
        assert found.subject == str(path)
    else:
        text = data.decode("utf-8").removeprefix("\ufeff")
        assert found == ([text] if text.strip() else [])
