"""Which files an input consists of, on folders as people keep them: with links, and mixed."""

from __future__ import annotations

import os

import pytest

from retro_mcore.data.corpus.documents import read_documents
from retro_mcore.data.corpus.files import find_corpus_files
from retro_mcore.errors import CorpusError


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def texts(folder) -> list[str]:
    return sorted(document.text for document in read_documents(folder))


@pytest.fixture
def corpus(tmp_path):
    """One document in place, and one in another folder."""
    write(tmp_path / "corpus" / "here.jsonl", "here")
    write(tmp_path / "store" / "deep" / "there.jsonl", "there")
    return tmp_path / "corpus"


@pytest.mark.parametrize("place", ["linked", "a/b/linked", "linked.jsonl"])
def test_linked_folders_and_files_are_read(corpus, place):
    """A corpus that is put together of links into a store: 30 of 40 documents lay there."""
    target = corpus.parent / "store"
    (corpus / place).parent.mkdir(parents=True, exist_ok=True)
    (corpus / place).symlink_to(target / "deep" / "there.jsonl" if "." in place else target)
    assert texts(corpus) == ["here", "there"]
    (corpus.parent / "also").symlink_to(corpus)
    assert texts(corpus.parent / "also") == ["here", "there"]


@pytest.mark.parametrize(
    "links",
    [
        {"loop": "."},
        {"sub/loop": ".."},
        {"a/to_b": "../b", "b/to_a": "../a"},
        {"up": ".."},
        {"itself": "itself"},
    ],
)
def test_cycles_end_and_nothing_is_read_twice(corpus, links):
    for name, target in links.items():
        (corpus / name).parent.mkdir(exist_ok=True)
        write((corpus / name).parent / f"{name.replace('/', '_')}.jsonl", name)
        (corpus / name).symlink_to(target)
    found = texts(corpus)
    assert {"here", *links} <= set(found)
    assert len(found) == len(set(found))


def test_what_is_linked_twice_is_read_once_and_counted(corpus):
    for name in ("first", "second"):
        (corpus / name).symlink_to(corpus.parent / "store")
    (corpus / "again.jsonl").symlink_to("here.jsonl")
    assert texts(corpus) == ["here", "there"]
    found = find_corpus_files(corpus)
    assert found.repeated_links == (corpus / "again.jsonl", corpus / "second")
    assert found.files[1] == corpus / "here.jsonl"  # a path without links is preferred


def test_folders_linked_with_each_other_do_not_multiply(tmp_path):
    """16 folders, each linked into all others: by paths there would be 16! ways."""
    for i in range(16):
        write(tmp_path / str(i) / "a.jsonl", str(i))
        for j in range(16):
            (tmp_path / str(i) / f"to_{j}").symlink_to(f"../{j}")
    assert len(texts(tmp_path)) == 16


def test_broken_links_are_counted(corpus):
    for name in ("gone.jsonl", "folder"):
        (corpus / name).symlink_to(corpus / "nowhere")
    found = find_corpus_files(corpus)
    assert found.counts["broken_links"] == 2
    assert set(found.broken_links) == {corpus / "gone.jsonl", corpus / "folder"}
    with pytest.raises(CorpusError, match=r"gone\.jsonl: neither a file nor a folder"):
        find_corpus_files(corpus / "gone.jsonl")


def test_names_that_are_links_into_a_store_of_blobs(tmp_path):
    """As a hub's cache lies on the disk: the file's name is a hash, the link's tells its kind."""
    write(tmp_path / "blobs" / "0f3a", "text")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "part.jsonl").symlink_to("../blobs/0f3a")
    assert texts(tmp_path) == ["text"]
    assert find_corpus_files(tmp_path).left_out == ()


def test_files_of_other_kinds_are_counted(corpus):
    for name in ("a.csv", "b/c.CSV", "d.parquet", "README"):
        write(corpus / name, "x")
    os.mkfifo(corpus / "pipe.txt")  # opening it would wait for ever
    write(corpus / "UPPER.JSONL", "upper")
    found = find_corpus_files(corpus)
    assert found.counts["files_left_out"] == 5
    assert found.describe_left_out().startswith("2 .csv, ")
    assert texts(corpus) == ["here", "upper"]
    for name in ("here.jsonl", "UPPER.JSONL"):
        (corpus / name).unlink()
    with pytest.raises(CorpusError, match=r"holds no \.jsonl.*but 2 \.csv, .*such as .*README"):
        find_corpus_files(corpus)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("table.csv", "JSON lines"),
        ("table.TSV", "JSON lines"),
        ("table.parquet", "JSON lines"),
        ("page.html", "JSON lines"),
        ("paper.pdf", "JSON lines"),
        ("book.docx", "JSON lines"),
        ("lines.ndjson", "Rename"),
        ("lines.jsonl.bz2", "Decompress"),
        ("book.txt.gz", "Decompress"),
    ],
)
def test_a_file_that_is_no_text_by_its_name(tmp_path, name, hint):
    """`--input table.csv` became a single document."""
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(CorpusError, match=rf"{name}: a \.\w+ file is not read as text\. .*{hint}"):
        find_corpus_files(tmp_path / name)


@pytest.mark.parametrize("name", ["notes.md", "LICENSE", "code.py", "a.b.log"])
def test_other_text_files_are_read(tmp_path, name):
    (tmp_path / name).write_text("text")
    assert texts(tmp_path / name) == ["text"]


def test_a_name_that_no_file_can_have():
    with pytest.raises(CorpusError, match="Check --input"):
        find_corpus_files("Once upon a time. " * 1000)
