"""Writes that the system refuses, told as what they are: what was needed, what is left."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from retro_mcore.errors import ProjectError, RetroError

#: Faiss, HDF5 and SentencePiece carry the system's message in exceptions without a number.
_REFUSALS = {
    number: os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)
}
_IN_MESSAGES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_KEPT = "then repeat the command: what was built is kept"
_MEND = f"Free space or enlarge the quota, {_KEPT}"


def free_bytes(path: Path) -> int:
    """Bytes that a new file at `path` could take."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_files(path: Path) -> int | None:
    """Files that could be made at `path`; None where the file system has no limit of its own."""
    if not hasattr(os, "statvfs"):
        return None
    found = os.statvfs(_existing(path))
    return found.f_favail if found.f_files else None


def require_space(path: Path, needed: int, what: str, files: int = 1) -> None:
    """Refuse to begin what will not fit.

    Args:
        path: A file or directory on the disk in question; need not exist.
        needed: Bytes that are still to be written.
        what: What takes them, for the message.
        files: Files that are still to be made.

    Raises:
        ProjectError: fewer are free.
    """
    free = free_bytes(path)
    if free < needed:
        raise ProjectError(
            path, f"{what} need {show_bytes(needed)}, {show_bytes(free)} are free", _MEND
        )
    makeable = free_files(path)
    if makeable is not None and makeable < files:
        raise _no_inodes(path, f"{what} need {files} files, {makeable} more can be made")


def refused_write(error: BaseException) -> int | None:
    """The number (errno) by which the system refused a write, whichever library reports it.

    None where the error is something else.
    """
    if isinstance(error, RetroError):
        return None
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number in _REFUSALS:
        return number
    told = str(error)
    return next((each for each in _IN_MESSAGES if _REFUSALS[each] in told), None)


def refused_write_error(path: Path, error: BaseException, written: int = 0) -> ProjectError:
    """What to tell of a write to `path` that the system refused.

    Args:
        path: The file.
        error: Of which `refused_write` knows the number.
        written: Bytes that were written before, and are free again.
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
        errno.ENOSPC: (f"the disk is full: {more}{show_bytes(free)} are free", _MEND),
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
    """`count` in a unit that leaves one to three digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
