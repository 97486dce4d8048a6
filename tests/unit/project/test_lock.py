"""One run at a time, nothing half-written after a kill or an interrupt, and full disks."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from retro_mcore.errors import ProjectError
from retro_mcore.project import ProjectPaths
from retro_mcore.project.atomic import atomic_write, write_json
from retro_mcore.project.lock import directory_lock, stage_lock
from retro_mcore.project.markers import signed_write
from retro_mcore.project.shards import cut, run_shards
from retro_mcore.project.space import free_bytes, require_space, show_bytes

# Writes half of a file inside a stage, says so, and sleeps.
# A shell that runs the tests in the background may have set SIGINT to be ignored.
HOLDER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from retro_mcore.cli.command import run_command
from retro_mcore.project import ProjectPaths
from retro_mcore.project.lock import directory_lock, stage_lock
from retro_mcore.project.markers import signed_write
from dataclasses import dataclass

@dataclass
class Options:
    '''Hold a project.'''
    project_dir: str
    '''Which.'''

def hold(options):
    paths = ProjectPaths(options.project_dir)
    with stage_lock(paths, "build_db"), signed_write(paths.merged_db("train")) as temporary:
        temporary.write_bytes(b"half")
        print("ready", flush=True)
        time.sleep(60)

sys.exit(run_command(Options, hold))
"""


def start_holder(project: Path) -> subprocess.Popen:
    """A process that holds the project and is writing train.hdf5."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "--project-dir", str(project)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_second_run_is_refused_by_name_until_the_first_is_killed(tmp_path):
    paths = ProjectPaths(tmp_path)
    process = start_holder(tmp_path)
    with pytest.raises(ProjectError) as caught, stage_lock(paths, "build_index"):
        pass
    name = f"build_db, process {process.pid} on {socket.gethostname()}"
    assert str(caught.value).startswith(f"{tmp_path}: another run works on it: {name}. Wait")
    assert len(files(tmp_path)) == 2  # the lock, and what is being written
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".model.7.tmp").touch()  # not a stage's
    with stage_lock(paths, "build_index"):
        assert files(tmp_path) == [".lock", "checkpoints/.model.7.tmp"]
    assert files(tmp_path) == ["checkpoints/.model.7.tmp"]


def test_an_interrupt_leaves_no_half_written_file(tmp_path):
    process = start_holder(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert files(tmp_path) == []


def test_an_exception_releases_the_lock_and_an_empty_directory_goes(tmp_path):
    paths = ProjectPaths(tmp_path / "new" / "project")

    def fail() -> None:
        with stage_lock(paths, "preprocess_corpus", create=True):
            assert paths.lock.is_file()
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
    assert not paths.root.exists()
    with stage_lock(paths, "build_db"):  # refused later, for what it lacks
        assert not paths.root.exists()
    with stage_lock(paths, "preprocess_corpus", create=True):
        paths.config.write_text("{}")
    assert files(paths.root) == ["config.json"]


def write_text(path: Path) -> None:
    path.write_text("x" * 100_000)


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["rows"] = np.zeros(100_000)


def write_index(path: Path) -> None:
    import faiss

    index = faiss.IndexFlatL2(8)
    index.add(np.zeros((10_000, 8), np.float32))
    faiss.write_index(index, str(path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write", [write_text, write_hdf5, write_index])
def test_a_full_disk_keeps_what_was_there(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")

    def fill() -> None:
        with atomic_write(path) as temporary:
            temporary.symlink_to("/dev/full")
            write(temporary)

    with pytest.raises(ProjectError) as caught:
        fill()
    assert f"{path}: the disk is full: more than" in str(caught.value)
    assert f"{show_bytes(free_bytes(path))} are free. Free space" in str(caught.value)
    assert files(tmp_path) == ["file"]
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_others_fill_is_told_alike(tmp_path):
    paths = ProjectPaths(tmp_path)
    with pytest.raises(ProjectError, match="the disk is full"), stage_lock(paths, "build_db"):
        Path("/dev/full").write_text("x")
    with pytest.raises(OSError, match="No such file"), stage_lock(paths, "build_db"):
        Path("/none/file").write_text("x")


def test_what_will_not_fit_is_not_begun(tmp_path):
    require_space(tmp_path / "not" / "yet", 1, "a byte")
    shards = cut(tmp_path / "rows", 100, 10)
    built = []
    with pytest.raises(ProjectError) as caught:
        run_shards(shards, lambda shard, path: built.append(shard), "f", "rows", 1 << 50)
    assert "10 files (rows) need 102400.0 TiB" in str(caught.value)
    assert "are free" in str(caught.value)
    assert built == []


def test_a_file_that_is_written_while_the_lock_is_held_is_whole(tmp_path):
    paths = ProjectPaths(tmp_path)
    with stage_lock(paths, "build_db"):
        write_json(paths.config, {"a": 1})
        with signed_write(paths.merged_db("train")) as temporary:
            assert temporary.name.endswith(f".{os.getpid()}.tmp")
            temporary.write_bytes(b"rows")
    assert files(tmp_path) == ["config.json", "db/merged/train.hdf5", "db/merged/train.hdf5.done"]


def test_a_lock_that_is_a_link_overwrites_nothing(tmp_path):
    """Whoever may write into a project directory must not reach files that its users own."""
    victim, paths = tmp_path / "victim", ProjectPaths(tmp_path / "project")
    paths.root.mkdir()
    victim.write_text("precious")
    paths.lock.symlink_to(victim)
    with pytest.raises(ProjectError, match=r"\.lock: is a symbolic link"):
        stage_lock(paths, "build_db").__enter__()
    paths.lock.unlink()
    os.link(victim, paths.lock)
    with stage_lock(paths, "build_db"):
        pass
    assert victim.read_text() == "precious"
    os.mkfifo(paths.lock)
    with pytest.raises(ProjectError, match=r"\.lock: is not a regular file"):
        stage_lock(paths, "build_db").__enter__()


def test_a_temporary_file_that_is_a_link_overwrites_nothing(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    with atomic_write(path) as temporary:
        pass_over = temporary
        temporary.write_text("content")
    for link in (pass_over, path):
        link.unlink(missing_ok=True)
        link.symlink_to(victim)
    write_json(path, {"a": 1})
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


FORKING_HOLDER = """
import os, sys, time
from pathlib import Path
from retro_mcore.project.lock import directory_lock
with directory_lock(Path(sys.argv[1]), "pretrain_retro") as alone:
    if os.fork() == 0:  # as a process that reads samples, or writes a checkpoint
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_a_directory_is_kept_to_one_run_until_it_is_killed(tmp_path):
    """Two trainings into one --save: the later deleted what the earlier was writing."""
    (tmp_path / ".config.yaml.host.7.tmp").touch()  # of a run that was killed
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING_HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        assert files(tmp_path) == [".lock"]
        name = f"pretrain_retro, process {process.pid} on {socket.gethostname()}"
        with pytest.raises(ProjectError, match=name), directory_lock(tmp_path, "finetune_retro"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with directory_lock(tmp_path, "finetune_retro") as alone:  # though the child still runs
            assert alone
    finally:
        os.kill(child, signal.SIGKILL)
    assert files(tmp_path) == []


def test_where_files_cannot_be_locked_a_directory_is_used_without(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("retro_mcore.project.lock.fcntl.flock", unsupported)
    with directory_lock(tmp_path, "pretrain_retro") as alone:
        assert not alone


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ProjectError, match="file: cannot be created"):
        directory_lock(tmp_path / "file", "pretrain_retro").__enter__()
