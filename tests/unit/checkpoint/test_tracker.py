"""Tracker files that an editor, another system or a damaged disk left: one error that names the
file, what it holds and what is there, for every command that reads one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_mcore.checkpoint.conversion.formats import latest_checkpoint
from retro_mcore.checkpoint.files import find_checkpoint
from retro_mcore.checkpoint.tracker import RELEASE, TRACKER, read_tracker
from retro_mcore.errors import CheckpointError
from retro_mcore.retrieval.embedders.megatron_bert import find_bert_checkpoint

READERS = [latest_checkpoint, lambda folder: find_bert_checkpoint(str(folder)), find_checkpoint]


@pytest.fixture
def folder(tmp_path):
    for name in ("iter_0000002", "iter_0000010", "iter_0000012.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").touch()
    return tmp_path


@pytest.mark.parametrize("content", [b"10", b"10\n", b" 10\r\n", b"\xef\xbb\xbf10", b"0000010"])
@pytest.mark.parametrize("read", READERS)
def test_an_iteration_as_editors_write_it(folder, read, content):
    (folder / TRACKER).write_bytes(content)
    assert read(folder) == folder / "iter_0000010"


BAD = [
    b"",
    b"\n",
    b"-10",
    b"+10",
    b"1_0",
    b"10.0",
    b"1e1",
    b"10 2",
    b"iter_0000010",
    b"Release",
    b"9" * 5000,
    b"1" * 10**6,
    b"\xff\xfe1\x000\x00",
    b"\0" * 8,
    "\u00b2".encode(),
    "\u0661\u0660".encode(),
    b"../iter_0000010",
]


@pytest.mark.parametrize("content", BAD, ids=lambda content: ascii(content[:12]))
@pytest.mark.parametrize("read", READERS)
def test_anything_else_is_told_with_what_is_there(folder, read, content):
    (folder / TRACKER).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / TRACKER}: names ")
    assert "iter_0000002, iter_0000010" in message
    assert len(message) < 1000


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("content", ["7", "release"])
def test_a_checkpoint_that_is_not_there(folder, read, content):
    (folder / TRACKER).write_text(content)
    with pytest.raises(CheckpointError, match=f"{TRACKER}: names .*{content}.*10"):
        read(folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("make", ["mkdir", "dangling"])
def test_a_tracker_that_is_no_file(folder, read, make):
    path = folder / TRACKER
    path.mkdir() if make == "mkdir" else path.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"{TRACKER}: is not a readable file"):
        read(folder)


@given(st.one_of(st.binary(max_size=80), st.text(max_size=20).map(str.encode)))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_bytes_name_an_iteration_or_are_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "tracked"
    folder.mkdir(exist_ok=True)
    (folder / TRACKER).write_bytes(content)
    try:
        named = read_tracker(folder)
    except CheckpointError:
        return
    assert named == RELEASE or int(content.decode("utf-8-sig")) == named
