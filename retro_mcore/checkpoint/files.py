"""Where a run's checkpoints lie, which of them is the latest, and which are kept.

    DIR/latest_checkpointed_iteration.txt      the last complete iteration, as Megatron writes it
    DIR/iter_0000100/                          model, optimizer, schedule, random states, arguments
    DIR/iter_0000200.tmp/                      being written, or left over from a crash

A checkpoint is written into a temporary directory, flushed to the disk, renamed, and only then
named in the tracker file, so a crash while saving leaves the previous one loadable.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.checkpoint.contents import CONFIG_FILE
from retro_mcore.checkpoint.tracker import TRACKER, checkpoint_path, read_tracker
from retro_mcore.errors import CheckpointError
from retro_mcore.project.atomic import atomic_write


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay: all, or the last ones and those at an interval.

    Attributes:
        keep_last_n: This many of the latest. None: all, or with an interval the latest.
        retain_interval: Also those whose iteration is a multiple of this.
    """

    keep_last_n: int | None = None
    retain_interval: int | None = None

    def superseded(self, iterations: list[int]) -> list[int]:
        """Those of `iterations` that need not stay."""
        if self.keep_last_n is None and self.retain_interval is None:
            return []
        old = sorted(iterations)[: -(self.keep_last_n or 1)]
        return [i for i in old if self.retain_interval is None or i % self.retain_interval]


def temporary_path(directory: str | Path, iteration: int) -> Path:
    """Where a checkpoint is written."""
    final = checkpoint_path(directory, iteration)
    return final.with_name(final.name + ".tmp")


def iteration_of(checkpoint: Path) -> int:
    """The iteration in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("iter_"))


def latest_iteration(directory: str | Path) -> int | None:
    """The iteration that the tracker file names; None where there is no checkpoint.

    Raises:
        CheckpointError: the tracker file is malformed, or its checkpoint is missing; or the file is
            missing, and checkpoints are there.
    """
    iteration = read_tracker(directory)
    if iteration is None:
        return _untracked_iteration(Path(directory))
    tracker = Path(directory) / TRACKER
    there = ", ".join(map(str, complete_iterations(directory))) or "none"
    if isinstance(iteration, str):
        raise CheckpointError(
            tracker,
            f"names {iteration!r}, not an iteration",
            f"Name one of the iter_* directories; complete iterations: {there}",
        )
    path = checkpoint_path(directory, iteration)
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            tracker,
            f"names iteration {iteration}, but {path} is not a complete checkpoint",
            "Write the iteration of a complete checkpoint into the tracker file; complete "
            f"iterations: {there}",
        )
    return iteration


def _untracked_iteration(directory: Path) -> int | None:
    """The only checkpoint there is: a run that is killed leaves its first one before the tracker
    file. Of several, the file has been lost; to start again would overwrite them."""
    there = complete_iterations(directory) if directory.is_dir() else []
    if len(there) > 1:
        raise CheckpointError(
            directory / TRACKER,
            "no such file, and there are checkpoints",
            f"Write into it which iteration to load, of {', '.join(map(str, there))}",
        )
    return there[0] if there else None


def existing_checkpoint(directory: str | Path, ckpt_step: int | None = None) -> Path | None:
    """The checkpoint of `ckpt_step`, else the latest; None where there is no latest.

    Raises:
        CheckpointError: there is none of `ckpt_step`; or as `latest_iteration`.
    """
    if ckpt_step is None:
        iteration = latest_iteration(directory)
        return None if iteration is None else checkpoint_path(directory, iteration)
    checkpoint = checkpoint_path(directory, ckpt_step)
    if not (checkpoint / CONFIG_FILE).is_file():
        there = ", ".join(map(str, complete_iterations(directory))) or "none"
        raise CheckpointError(
            f"--ckpt-step {ckpt_step}",
            f"{checkpoint} is not a complete checkpoint",
            f"Complete iterations: {there}",
        )
    return checkpoint


def find_checkpoint(directory: str | Path, ckpt_step: int | None = None) -> Path:
    """The checkpoint of `ckpt_step`, else the latest.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint = existing_checkpoint(directory, ckpt_step)
    if checkpoint is None:
        raise CheckpointError(
            f"--load {directory}",
            f"holds no checkpoint (no {TRACKER})",
            "Name the directory that pretrain_retro.py was given as --save",
        )
    return checkpoint


def complete_iterations(directory: str | Path) -> list[int]:
    """The iterations of complete checkpoints, ascending."""
    found = Path(directory).glob(f"iter_*/{CONFIG_FILE}")
    return sorted(int(p.parent.name[5:]) for p in found if re.fullmatch(r"iter_\d+", p.parent.name))


def make_temporary(directory: str | Path, iteration: int, alone: bool = True) -> Path:
    """An empty directory to write a checkpoint into.

    Args:
        directory: What --save names.
        iteration: Of the checkpoint.
        alone: Whether no other run saves there: then what crashes left over is removed.
    """
    temporary = temporary_path(directory, iteration)
    for left_over in Path(directory).glob("iter_*.tmp" if alone else temporary.name):
        shutil.rmtree(left_over)
    temporary.mkdir(parents=True)
    return temporary


def publish(directory: str | Path, iteration: int, retention: Retention) -> None:
    """Give a complete checkpoint its name, tell the tracker file, remove superseded ones.

    Raises:
        CheckpointError: it is not complete.
    """
    final, temporary = checkpoint_path(directory, iteration), temporary_path(directory, iteration)
    if not (temporary / CONFIG_FILE).is_file():
        raise CheckpointError(temporary, "was not written completely", "Save again")
    _flush(temporary)
    if final.exists():  # of a branch that was resumed before it
        _name_another(directory, iteration)
        _remove(final)
    temporary.replace(final)
    _flush(Path(directory))
    _name(directory, iteration)
    earlier = [i for i in complete_iterations(directory) if i <= iteration]
    for old in retention.superseded(earlier):
        _remove(checkpoint_path(directory, old))


def _name(directory: str | Path, iteration: int) -> None:
    with atomic_write(Path(directory) / TRACKER) as tracker:
        tracker.write_text(str(iteration), encoding="utf-8")


def _name_another(directory: str | Path, iteration: int) -> None:
    """Let the tracker file name the one before, so that a crash never leaves it without its own."""
    earlier = [i for i in complete_iterations(directory) if i < iteration]
    if earlier and read_tracker(directory) == iteration:
        _name(directory, earlier[-1])


def _remove(checkpoint: Path) -> None:
    # Under another name first: a directory half removed must not pass for a checkpoint.
    doomed = checkpoint.with_name(checkpoint.name + ".old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.replace(doomed)
    shutil.rmtree(doomed)


def _flush(directory: Path) -> None:
    """Force a directory and its files to the disk."""
    for path in (*(path for path in directory.iterdir() if path.is_file()), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
