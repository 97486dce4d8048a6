"""Locks that allow one run at a time on a project directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from retro_mcore.distributed import broadcast_object, get_rank, raise_together
from retro_mcore.errors import ProjectError
from retro_mcore.project.atomic import TEMPORARY
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.space import refused_write, refused_write_error


class NoLocksError(ProjectError):
    """The file system of a directory does not support locks."""


#: Number of attempts to share the lock, 50 ms apart.
_PATIENCE = 20


@contextmanager
def stage_lock(
    paths: ProjectPaths, stage: str, create: bool = False, job: str | None = None
) -> Iterator[None]:
    """Run a stage while no other run uses the project. All ranks must call this.

    Rank 0 holds a flock on `PROJECT/.lock` for all ranks. The system releases it when the process
    ends for any reason, so a killed run needs no cleanup. Temporary files of `atomic_write` left
    by a killed run are removed before the body runs. Disk-full errors raised inside other libraries
    are reported in the same way as in `atomic_write`.

    Jobs of an array (`job`) share the project with each other, but with no other run. They hold a
    shared lock, and each also holds a lock named after itself. They keep the temporary files.

    Args:
        paths: The project. A missing directory is not locked, unless `create` makes it.
        stage: Name of the command, shown to other runs.
        create: Create the directory; it is removed again if the stage leaves it empty.
        job: Name of this job in an array of jobs, such as "add-3-of-8".

    Raises:
        ProjectError: another run holds the directory, or the disk is full. Raised on every rank.
    """
    held: list[tuple[Path, int]] = []
    made = False
    try:
        with raise_together():
            if get_rank() == 0:
                if create and not paths.root.exists():
                    paths.root.mkdir(parents=True)
                    made = True
                if paths.root.exists() and not paths.root.is_dir():
                    raise ProjectError(
                        paths.root, "is a file, not a directory", "Check --project-dir"
                    )
                if paths.root.is_dir():
                    held.append((paths.lock, _acquire(paths.lock, stage, shared=job is not None)))
                    if job is None:
                        _remove_leftovers(paths)
                    else:
                        own = paths.lock.with_name(f"{paths.lock.name}.{job}")
                        held.append((own, _acquire(own, f"{stage} ({job})")))
        try:
            yield
        except Exception as error:
            if refused_write(error) is None:
                raise
            raise refused_write_error(paths.root, error) from error
    finally:
        for path, descriptor in held[::-1]:
            _release(path, descriptor)
        if made:
            with suppress(OSError):  # not empty: the stage wrote something
                paths.root.rmdir()


def _release(path: Path, descriptor: int) -> None:
    """Remove the lock file, unless others hold it too, and release it."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    os.close(descriptor)


def _acquire(path: Path, stage: str, shared: bool = False) -> int:
    """Lock `path`, write this run's identity into it and return its file descriptor."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    # A finishing job briefly holds the lock exclusively, to remove the file.
    patience = _PATIENCE if shared else 0
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if (patience := patience - 1) >= 0:
                time.sleep(0.05)
                continue
            raise ProjectError(
                path.parent,
                f"another run works on it: {holder}",
                "Wait until it has finished, or stop it",
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise NoLocksError(
                path,
                f"this file system cannot lock ({error.strerror})",
                "Put the project on one with flock (NFS: version 4, without local_lock)",
            ) from error
        # The last holder may have removed the file between our two calls, leaving ours unlinked.
        if _is_named(descriptor, path):
            break
        os.close(descriptor)
    if os.fstat(descriptor).st_nlink == 1:  # else it is another file, which must not change
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "stage": stage}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    return descriptor


def _open(path: Path) -> int:
    """Open the lock file, creating it if needed. Links are not followed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink() or path.exists():
            found, hint = f"cannot be locked ({error.strerror})", "Remove it"
            if path.is_symlink():
                found = "is a symbolic link, not the project's lock"
            elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                hint = "Make the project directory and this file writable"
        else:
            found, hint = (
                f"cannot be created ({error.strerror})",
                "Make the project directory writable",
            )
        raise ProjectError(path, found, hint) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ProjectError(path, "is not a regular file", "Remove it")
    return descriptor


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _read_holder(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"{owner['stage']}, process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):  # it has the lock, but has not written yet
        return "it has just started"


def _remove_leftovers(paths: ProjectPaths) -> None:
    """Remove temporary files of killed runs from the directories that stages write to."""
    folders = (paths.data, paths.tokenizer, paths.db, paths.index, paths.query, paths.stages)
    found = [file for folder in folders for file in folder.rglob(TEMPORARY)]
    for file in [*paths.root.glob(TEMPORARY), *found]:
        file.unlink(missing_ok=True)


@contextmanager
def directory_lock(directory: Path, command: str) -> Iterator[bool]:
    """Lock a directory that is not a project, such as --save of a training. On all ranks.

    As in `stage_lock`, rank 0 holds the lock for all ranks. The system releases it when that
    process ends, even if processes that it forked (readers, writers) outlive it. Temporary files of
    a killed run are removed first. Without file system support, the body runs unlocked.

    Args:
        directory: The directory; created if missing.
        command: Name of the command, shown to other runs.

    Yields:
        Whether the directory is locked.

    Raises:
        ProjectError: another run holds the directory. Raised on every rank.
    """
    path, descriptor = directory / ".lock", None
    with raise_together():
        if get_rank() == 0:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ProjectError(
                    directory, f"cannot be created ({error.strerror})", "Name another directory"
                ) from error
            with suppress(NoLocksError):
                descriptor = _acquire(path, command)
                _kept_from_children.add(descriptor)
                for file in directory.glob(TEMPORARY):
                    file.unlink(missing_ok=True)
    try:
        yield bool(broadcast_object(descriptor is not None))
    finally:
        if descriptor is not None:
            _kept_from_children.discard(descriptor)
            _release(path, descriptor)


#: Locks that end with this process, even if processes that it forked are still running.
_kept_from_children: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _kept_from_children:
        os.close(descriptor)
    _kept_from_children.clear()


os.register_at_fork(after_in_child=_close_in_child)
