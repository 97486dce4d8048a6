"""Comparing all checkpoints of a run with their checksums."""

from __future__ import annotations

from pathlib import Path

from retro_mcore.checkpoint.checksums import CHECKSUMS_FILE, verify_checkpoint
from retro_mcore.checkpoint.tracker import existing_checkpoints
from retro_mcore.errors import CheckpointError


def verify_run(directory: Path) -> tuple[list[str], list[str]]:
    """Compare every checkpoint of a run. All ranks call it, inside `raise_together`.

    Returns:
        Names of the checkpoints that are whole, and of those that have no checksums.

    Raises:
        CheckpointError: a checkpoint is damaged, or there is none.
    """
    if not directory.is_dir():
        raise CheckpointError(f"--load {directory}", "no such directory", "Name a run's --save")
    checked: list[str] = []
    unchecked: list[str] = []
    for name in existing_checkpoints(directory):
        has_checksums = (directory / name / CHECKSUMS_FILE).is_file()
        (checked if has_checksums else unchecked).append(name)
        verify_checkpoint(directory / name)
    if not checked and not unchecked:
        raise CheckpointError(f"--load {directory}", "holds no checkpoint", "Name a run's --save")
    return checked, unchecked
