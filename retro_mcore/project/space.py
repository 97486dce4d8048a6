"""A full disk, told as what it is: which file, how much was needed, how much is free."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from retro_mcore.errors import ProjectError

_FULL = {errno.ENOSPC, errno.EDQUOT}
#: Faiss and SentencePiece carry the system's message in exceptions without a number.
_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded")
_MEND = "Free space or enlarge the quota, then repeat the command: what was built is kept"


def free_bytes(path: Path) -> int:
    """Bytes that a new file at `path` could take."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed: int, what: str) -> None:
    """Refuse to begin what will not fit.

    Args:
        path: A file or directory on the disk in question; need not exist.
        needed: Bytes that are still to be written.
        what: What takes them, for the message.

    Raises:
        ProjectError: fewer are free.
    """
    free = free_bytes(path)
    if free < needed:
        raise ProjectError(
            path, f"{what} need {show_bytes(needed)}, {show_bytes(free)} are free", _MEND
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether the system refused a write for lack of space, whichever library reports it."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(message in str(error) for message in _FULL_MESSAGES)


def disk_full_error(path: Path, written: int) -> ProjectError:
    """The error of a write to `path` that stopped after `written` bytes, which are free again."""
    free = free_bytes(path)
    return ProjectError(
        path,
        f"the disk is full: more than {show_bytes(max(written, free))} are needed here, "
        f"{show_bytes(free)} are free",
        _MEND,
    )


def show_bytes(count: float) -> str:
    """`count` in a unit that leaves one to three digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
