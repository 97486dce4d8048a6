"""The tracker file, which names a run's latest checkpoint: an iteration, or `release`."""

from __future__ import annotations

import re
from pathlib import Path

from retro_mcore.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"

_LONGEST = 64  # bytes; what follows is no iteration
_CHECKPOINT = re.compile(r"iter_([0-9]+)|release")


def checkpoint_path(directory: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies: `iter_0000100`, as in Megatron."""
    return Path(directory) / f"iter_{iteration:07d}"


def read_tracker(directory: str | Path) -> int | str | None:
    """What the tracker file of a directory names: an iteration, `RELEASE`, or None without one.

    Raises:
        CheckpointError: the file holds something else.
    """
    tracker = Path(directory) / TRACKER
    if not tracker.is_file():
        if tracker.exists() or tracker.is_symlink():
            raise CheckpointError(tracker, "is not a readable file", _hint(directory))
        return None
    with tracker.open("rb") as file:
        content = file.read(_LONGEST + 1)
    text = content.decode("utf-8-sig", "replace").strip()
    if text == RELEASE:
        return RELEASE
    # As bytes: isdigit() takes other scripts' digits for some, and int() blanks and underscores.
    if not re.fullmatch(r"[0-9]{1,18}", text):
        shown = f"{text[:_LONGEST]!a}" if text else "nothing"
        raise CheckpointError(tracker, f"names {shown}, not an iteration", _hint(directory))
    return int(text)


def tracked_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint's directory that the tracker file names; None without a tracker file.

    Raises:
        CheckpointError: the file holds something else, or the directory is not there.
    """
    named = read_tracker(directory)
    if named is None:
        return None
    path = Path(directory) / named if isinstance(named, str) else checkpoint_path(directory, named)
    if not path.is_dir():
        raise CheckpointError(
            Path(directory) / TRACKER,
            f"names {str(named)!r}, which is not there",
            _hint(directory),
        )
    return path


def existing_checkpoints(directory: str | Path) -> list[str]:
    """What the tracker file could name: the directories of checkpoints, complete or not."""
    found = (path.name for path in Path(directory).iterdir() if path.is_dir())
    return sorted(name for name in found if _CHECKPOINT.fullmatch(name))


def _hint(directory: str | Path) -> str:
    there = ", ".join(existing_checkpoints(directory))
    return f"Write into it which one to load, of {there}" if there else "No checkpoint is there"
