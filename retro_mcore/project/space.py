"""Errors for writes that the system refuses, with the space needed and the space left."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from retro_mcore.errors import ProjectError, RetroError

#: Faiss, HDF5 and SentencePiece raise exceptions with the system's message but without errno.
_REFUSALS = {
    number: os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)
}
_IN_MESSAGES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_KEPT = "then repeat the command: what was built is kept"
_REPAIR = f"Free space or enlarge the quota, {_KEPT}"


def free_bytes(path: Path) -> int:
    """Number of bytes available to a new file at `path`."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_files(path: Path) -> int | None:
    """Number of files that can be created at `path`; None if the file system has no limit."""
    if not hasattr(os, "statvfs"):
        return None
    found = os.statvfs(_existing(path))
    return found.f_favail if found.f_files else None


def require_space(path: Path, needed: int, what: str, files: int = 1) -> None:
    """Check that the disk has enough space before work begins.

    Args:
        path: A file or directory on that disk; need not exist.
        needed: Bytes still to be written.
        what: What needs the space, for the message.
        files: Number of files still to be created.

    Raises:
        ProjectError: there is less space, or fewer files can be created.
    """
    free = free_bytes(path)
    if free < needed:
        raise ProjectError(
            path, f"{what} need {show_bytes(needed)}, {show_bytes(free)} are free", _REPAIR
        )
    makeable = free_files(path)
    if makeable is not None and makeable < files:
        raise _no_inodes(path, f"{what} need {files} files, {makeable} more can be made")


def refused_write(error: BaseException) -> int | None:
    """The errno of a write that the system refused, whichever library reports it.

    None if the error has another cause.
    """
    if isinstance(error, RetroError):
        return None
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number in _REFUSALS:
        return number
    told = str(error)
    return next((each for each in _IN_MESSAGES if _REFUSALS[each] in told), None)


def refused_write_error(path: Path, error: BaseException, written: int = 0) -> ProjectError:
    """The error to raise for a write to `path` that the system refused.

    Args:
        path: The file.
        error: An error for which `refused_write` returns a number.
        written: Bytes that were written before the error and are free again.
    """
    number = refused_write(error)
    if number in (errno.EACCES, errno.EPERM):
        path = Path(os.fsdecode(getattr(error, "filename", None) or path))
    free, makeable = free_bytes(path), free_files(path)
    if number == errno.ENOSPC and makeable == 0:
        return _no_inodes(path, f"no more files can be made there, {show_bytes(free)} are free")
    needed = max(written, free)
    more = f"more than {show_bytes(needed)} are needed here, " if needed else ""
    found, way = {
        errno.ENOSPC: (f"the disk is full: {more}{show_bytes(free)} are free", _REPAIR),
        errno.EDQUOT: (
            f"the quota is used up after {show_bytes(written)} of this file",
            f"Enlarge the quota or remove files of yours, {_KEPT}",
        ),
        errno.EROFS: (
            "the file system is read-only",
            f"Mount it for writing, {_KEPT}; or use a --project-dir on another disk",
        ),
        errno.EFBIG: (
            f"files may not exceed {show_bytes(written)} here",
            f"Raise the limit (ulimit -f), or use a disk with larger files, {_KEPT}",
        ),
    }.get(
        number or 0,
        ("permission denied", "Make it readable and writable, or use another --project-dir"),
    )
    return ProjectError(path, found, way)


def _no_inodes(path: Path, found: str) -> ProjectError:
    return ProjectError(
        path, f"the file system is out of inodes: {found}", f"Remove files, not bytes, {_KEPT}"
    )


def show_bytes(count: float) -> str:
    """`count` in a unit with one to three digits before the decimal point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
