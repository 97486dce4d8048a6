"""Writes that the system refuses: told as what they are, and what was there stays.

Met on clusters with quotas, on file systems without inodes left, and on read-only copies.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from retro_mcore.errors import ProjectError
from retro_mcore.project import ProjectPaths, space
from retro_mcore.project.arrays import load_array, save_array
from retro_mcore.project.atomic import atomic_write
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.space import require_space

REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up after 3 B",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "files may not exceed 3 B here",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


def refuse(path: Path, error: Exception) -> str:
    """What is told of a write of three bytes that ends in `error`."""

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(ProjectError) as caught:
        write()
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "in_words"),
    [
        *((number, False) for number in REFUSALS),
        # Not those of a missing permission, which stand for much else.
        *((number, True) for number in list(REFUSALS)[:4]),
    ],
)
def test_each_refusal_is_told_as_what_it_is(tmp_path, number, in_words):
    """Faiss and HDF5 tell the system's words in exceptions without a number."""
    path = tmp_path / "file"
    path.write_text("old")
    told = f"Error in write: {os.strerror(number)} (3 of 9)"
    error = RuntimeError(told) if in_words else OSError(number, os.strerror(number))
    found = refuse(path, error)
    assert found.startswith(f"{path}: {REFUSALS[number]}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ProjectError) as caught, stage_lock(ProjectPaths(tmp_path), "build_db"):
        raise error
    assert REFUSALS[number].split(" 3 ")[0].split(" after")[0][:18] in str(caught.value)


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EIO, "I/O error"), ValueError("x"), ProjectError("a", "b", "c")):
        with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "file"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("free", "files", "found"),
    [
        (0, 5, "the disk is full: 0 B are free"),
        (1 << 40, 0, "out of inodes: no more files can be made there, 1.0 TiB are free"),
        (1 << 40, None, "the disk is full: more than 1.0 TiB are needed here, 1.0 TiB are free"),
        (1 << 10, 7, "the disk is full: more than 1.0 KiB are needed here, 1.0 KiB are free"),
    ],
)
def test_what_is_full_is_told_bytes_or_inodes(monkeypatch, tmp_path, free, files, found):
    """Out of inodes it said: more than 11.8 GiB are needed here, 11.8 GiB are free."""
    monkeypatch.setattr(space, "free_bytes", lambda path: free)
    monkeypatch.setattr(space, "free_files", lambda path: files)
    told = space.refused_write_error(tmp_path, OSError(errno.ENOSPC, "full"))
    assert found in str(told)
    assert "then repeat the command" in str(told)


def test_too_few_inodes_are_found_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(space, "free_files", lambda path: 9)
    require_space(tmp_path, 1, "9 files", 9)
    with pytest.raises(ProjectError, match="out of inodes: 10 files need 10 files, 9 more can be"):
        require_space(tmp_path, 1, "10 files", 10)
    monkeypatch.undo()
    assert space.free_files(tmp_path) is None or space.free_files(tmp_path) > 0


def test_permission_names_the_file_that_was_refused(tmp_path):
    found = refuse(tmp_path / "out", PermissionError(errno.EACCES, "denied", "/input/corpus.jsonl"))
    assert found.startswith("/input/corpus.jsonl: permission denied. Make it readable")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_numpy_tells_a_full_disk(tmp_path):
    """`np.save` raises an error without the system's number: 262144 requested and 0 written."""

    def write() -> None:
        with atomic_write(tmp_path / "weights.npy") as temporary:
            temporary.symlink_to("/dev/full")
            save_array(temporary, np.zeros(1000))

    with pytest.raises(ProjectError, match="the disk is full"):
        write()
    save_array(tmp_path / "weights.npy", np.arange(3))
    assert load_array(tmp_path / "weights.npy", (3,), "i", "").tolist() == [0, 1, 2]


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(100_000)


def write_array(path: Path) -> None:
    save_array(path, np.zeros(100_000))


def write_index(path: Path) -> None:
    import faiss

    index = faiss.IndexFlatL2(8)
    index.add(np.zeros((10_000, 8), np.float32))
    faiss.write_index(index, str(path))


@pytest.mark.parametrize("write", [write_hdf5, write_array, write_index])
def test_a_limit_of_the_file_size_is_told(tmp_path, write):
    """`ulimit -f` of a batch system, for real."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with (
            pytest.raises(ProjectError, match="files may not exceed"),
            atomic_write(tmp_path / "file") as temporary,
        ):
            write(temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
