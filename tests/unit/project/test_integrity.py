"""Damage that leaves a file's size as it was is found before a stage, a training or an evaluation
runs on it: a disk that lost a block, a copy that went wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from retro_mcore.cli import build_db, evaluate_perplexity, inspect_neighbors, query_neighbors
from retro_mcore.errors import CorruptFileError
from retro_mcore.project import ProjectPaths, integrity
from retro_mcore.project.integrity import SignedFile, verify_files, verifying
from retro_mcore.project.markers import checksum, marker_path, signed_write
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project


def flip(path: Path) -> None:
    """Change a bit in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 64]))


def zero(path: Path) -> None:
    """Lose the second half."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


@pytest.fixture
def project(tmp_path):
    return Path(shutil.copytree(built_project(), tmp_path / "project"))


READERS = {
    "build_db": lambda project: build_db.main(["--project-dir", project]),
    "query_neighbors": lambda project: query_neighbors.main(
        ["--project-dir", project, "--num-neighbors-save", "5"]
    ),
    "evaluate_perplexity": lambda project: evaluate_perplexity.main(
        ["--project-dir", project, "--load", small_checkpoint(), "--device", "cpu"]
    ),
    "inspect_neighbors": lambda project: inspect_neighbors.main(
        ["--project-dir", project, "--output", f"{project}/page.html"]
    ),
}
#: Digest of the samples; other tests may have evaluated documents of the project.
SAMPLES = "?" * 32
CASES = [
    ("build_db", "data/*.bin"),
    ("build_db", "data/*.idx"),
    ("build_db", "tokenizer/*"),
    ("query_neighbors", "data/*.bin"),
    ("query_neighbors", "db/merged/train.hdf5"),
    ("query_neighbors", "index/*/*/added*.faissindex"),
    ("evaluate_perplexity", "data/*.bin"),
    ("evaluate_perplexity", "data/*.idx"),
    ("evaluate_perplexity", f"query/valid_{SAMPLES}/*.hdf5"),
    ("evaluate_perplexity", "db/merged/train.hdf5"),
    ("inspect_neighbors", f"query/train_{SAMPLES}/distances/*.hdf5"),
    ("inspect_neighbors", "data/*.ids.hdf5"),
]


@pytest.mark.parametrize(("reader", "pattern"), CASES)
@pytest.mark.parametrize("damage", [flip, zero])
def test_damage_of_the_same_size_is_named(capsys, project, reader, pattern, damage):
    files = [path for path in sorted(project.glob(pattern)) if path.suffix != ".done"]
    damage(files[0])
    assert READERS[reader](str(project)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(files[0]) in line


def signed(path: Path, content: bytes) -> SignedFile:
    path.write_bytes(content)
    return SignedFile(path, len(content), checksum(path))


def test_large_files_are_compared_by_size_and_told_or_read_whole_on_demand(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(integrity, "QUICK_BYTES", 10)
    files = [signed(tmp_path / "small", b"12345678"), signed(tmp_path / "large", b"123456789")]
    flip(tmp_path / "large")
    verify_files(files, str)
    assert "note: 1 large files (9 B: large)" in capsys.readouterr().err
    with verifying(True), pytest.raises(CorruptFileError, match="large: its bytes differ"):
        verify_files(files, str)
    os.truncate(tmp_path / "large", 8)
    with pytest.raises(CorruptFileError, match="large: has 8 bytes, not 9"):
        verify_files(files, str)
    flip(tmp_path / "small")
    with pytest.raises(CorruptFileError, match="small: its bytes differ"):
        verify_files(files[:1], str)


def test_each_rank_reads_a_share(tmp_path, monkeypatch):
    files = [signed(tmp_path / str(n), bytes(n + 1)) for n in range(5)]
    read: list[str] = []
    monkeypatch.setattr(integrity, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        integrity, "checksum", lambda path: read.append(path.name) or checksum(path)
    )
    for rank in range(2):
        monkeypatch.setattr(integrity, "get_rank", lambda rank=rank: rank)
        verify_files(files, str)
    assert sorted(read) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\0" * 90, b'{"bytes": "x"}'])
def test_a_damaged_marker_is_no_marker_of_the_file(tmp_path, content):
    path = tmp_path / "rows.hdf5"
    with signed_write(path) as temporary:
        temporary.write_bytes(b"rows")
    marker_path(path).write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"rows\.hdf5"):
        integrity.verify_project(ProjectPaths(tmp_path), [path])


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1")
    os.utime(path, (1, 1))
    first = checksum(path)
    path.write_bytes(b"2")
    assert checksum(path) != first
