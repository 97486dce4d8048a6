"""The files of nvidia-resiliency-ext's local checkpoints, with what its manager lacks (0.4.1).

| here           | what its manager does                                                          |
|----------------|--------------------------------------------------------------------------------|
| `newest_after` | a file that is cut short or damaged counts as a checkpoint                     |
| `read`         | a rank finds only its own folder, and copies only in its own group of ranks    |
| `_load`        | files are unpickled unguarded                                                  |
| `_save_fn`     | it writes what may not have come from the GPU yet; if one rank cannot write,   |
|                | the others wait for it, and what is written stays; older files are removed     |
|                | before the new ones are on the disk                                            |

The package writes `DIRECTORY/RUN/RANK/iter_0000005_RANK_local.pt` with `torch.save`, first under a
name with `.dirty`, and removes older ones when all ranks have it. Import this module only where it
is installed.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import (
    LocalCheckpointManager,
)
from nvidia_resiliency_ext.checkpointing.local.replication.group_utils import (
    GroupWrapper,
    parse_group_sequence,
)
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import (
    CliqueReplicationStrategy,
)

from retro_mcore.distributed import (
    any_rank,
    gather,
    get_rank,
    get_world_size,
    group_timeout,
    raise_together,
)
from retro_mcore.errors import CheckpointError

#: Reads a file: its path, and whether to map its tensors into memory instead of reading them.
Reader = Callable[[Path, bool], Any]

#: The files that a node has, by iteration and rank: each with its copies.
Files = dict[tuple[int, int], list[Path]]

_NAME = re.compile(r"iter_(\d+)_(\d+)_local\.pt")


class Copies:
    """Groups of ranks that keep copies of one another's files. All ranks make it together.

    Args:
        jump: Distance between the ranks of a group.
        factor: Number of ranks in a group. Times `jump` it must divide the number of ranks.
    """

    def __init__(self, jump: int, factor: int) -> None:
        for ranks in parse_group_sequence(jump, factor, get_world_size()):
            group = dist.new_group([*ranks], timeout=group_timeout(), group_desc="LOCAL_COPIES")
            if get_rank() in ranks:
                self.strategy = CliqueReplicationStrategy(group)


@dataclass(frozen=True)
class Found:
    """Which local checkpoints the nodes have.

    Attributes:
        iteration: The newest of which some node has each rank's file, undamaged; None: of none.
        lacking: A newer iteration, and the ranks of which no node has a file; None: there is none.
        damaged: Files that are not used, and why, a line each.
    """

    iteration: int | None
    lacking: tuple[int, Sequence[int]] | None
    damaged: Sequence[str]


class LocalFiles(LocalCheckpointManager):
    """The local checkpoints that one start of a run saves, or has saved.

    Args:
        directory: On this node.
        run: Names the start; a folder in `directory`.
        read: Reads a file without running what it holds.
        copies: Groups of ranks that keep copies of one another's files, if wanted.
    """

    def __init__(
        self, directory: str | Path, run: str, read: Reader, copies: Copies | None = None
    ) -> None:
        super().__init__(directory, run, copies and copies.strategy)
        self._read = read
        self._own: dict[int, Path] = {}
        self._holders: list[int] = []

    @property
    def folder(self) -> Path:
        """Where this rank's files lie."""
        return self.local_ckpt_dir

    def newest_after(self, iteration: int) -> Found:
        """Find the newest one after an iteration. All ranks call it together.

        Ranks may be on other nodes than before: all folders on each node count. Files that will be
        read are compared with their checksums.
        """
        with raise_together():
            files = self._on_this_node(iteration)
        damaged: list[str] = []
        whole: set[Path] = set()  # compared already
        first = held = gather({*files})
        while (newest := _complete(held)) is not None:
            self._holders = [_holder(held, newest, rank) for rank in range(get_world_size())]
            self._own = {
                rank: files[newest, rank][0]
                for rank, holder in enumerate(self._holders)
                if holder == get_rank()
            }
            unknown = [rank for rank, path in self._own.items() if path not in whole]
            found = [line for rank in unknown if (line := _damage(files, newest, rank, self._read))]
            whole.update(
                self._own[rank] for rank in unknown
            )  # a damaged one is not asked for again
            damaged += found
            if not any_rank(bool(found)):
                break
            held = gather({*files})
        lines = dict.fromkeys(line for lines in gather(damaged) for line in lines)
        return Found(newest, _lacking(first, held, newest), [*lines])

    def read(self) -> Any:
        """What `newest_after` found of this rank, from its node or another. All ranks call it."""
        with raise_together():  # before some wait for what others read
            states = {rank: self._read(path, False) for rank, path in self._own.items()}
        own, world = None, GroupWrapper()
        for rank, holder in enumerate(self._holders):
            if holder == get_rank():
                state = states.pop(rank)
                state.restore_tensor_device(non_blocking=False)
                if rank == holder:
                    own = state
                else:
                    world.isend_state_dict(state, rank)
            elif rank == get_rank():
                own, _ = world.irecv_state_dict(holder)
        return own

    def write(self, state: Any, iteration: int) -> None:
        """Save what this rank holds. All ranks call it together."""
        self.latest_iteration = -1
        with torch.no_grad():
            self.save(state, iteration)

    def _on_this_node(self, iteration: int) -> Files:
        """All files after an iteration, of this rank's folder first."""
        files: Files = {}
        folders = sorted(self.folder.parent.glob("*"), key=lambda folder: folder != self.folder)
        for path in (path for folder in folders for path in folder.glob("iter_*")):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) > iteration:
                files.setdefault((int(match[1]), int(match[2])), []).append(path)
        return files

    def _load(self, ckpt_id: tuple[int, int, str]) -> Any:
        return self._read(self._local_ckpt_path_from_id(ckpt_id), False)

    def _save_fn(self, id_to_state_dict: dict[tuple[int, int, str], Any]) -> None:
        try:
            with raise_together():
                self._write_all(id_to_state_dict)
        except Exception:
            for iteration, _, _ in id_to_state_dict:  # on all ranks: it is of no use, and has bytes
                self._cleanup_failed_save(iteration)
            raise

    def _write_all(self, id_to_state_dict: dict[tuple[int, int, str], Any]) -> None:
        if torch.cuda.is_initialized():  # the package does not wait for copies from the GPU
            torch.cuda.synchronize()
        try:
            super()._save_fn(id_to_state_dict)
            # The package then removes older ones, which until now a loss of power leaves.
            for each in id_to_state_dict:
                _sync(self._local_ckpt_path_from_id(each))
            for folder in (self.folder, *self.folder.parents[:2]):  # of the rank, run and directory
                _sync(folder)
        except Exception as error:
            reason = _first(error)
            raise CheckpointError(
                self.folder,
                f"cannot take a local checkpoint ({type(reason).__name__}: {reason})",
                "Check the node's disk (--non-persistent-local-ckpt-dir); earlier checkpoints "
                "are intact",
            ) from error


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first(error: BaseException) -> BaseException:
    """What an error came of: on a full disk torch.save ends with `unexpected pos`."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _complete(held: Sequence[set[tuple[int, int]]]) -> int | None:
    """The newest iteration of which each rank's file is held by some rank."""
    iterations = {iteration for ids in held for iteration, _ in ids}
    complete = (each for each in iterations if not _missing(held, each))
    return max(complete, default=None)


def _missing(held: Sequence[set[tuple[int, int]]], iteration: int) -> list[int]:
    there = {rank for ids in held for each, rank in ids if each == iteration}
    return sorted({*range(get_world_size())} - there)


def _lacking(
    first: Sequence[set[tuple[int, int]]],
    held: Sequence[set[tuple[int, int]]],
    newest: int | None,
) -> tuple[int, list[int]] | None:
    latest = max((iteration for ids in first for iteration, _ in ids), default=None)
    return None if latest is None or latest == newest else (latest, _missing(held, latest))


def _holder(held: Sequence[set[tuple[int, int]]], iteration: int, rank: int) -> int:
    """The rank that reads another's file: the rank itself, if its node has it."""
    holders = [each for each, ids in enumerate(held) if (iteration, rank) in ids]
    return rank if rank in holders else holders[rank % len(holders)]


def _damage(files: Files, iteration: int, rank: int, read: Reader) -> str | None:
    """What is wrong with the first file of a rank, which is then forgotten; None: nothing."""
    paths = files[iteration, rank]
    try:
        with zipfile.ZipFile(paths[0]) as archive:  # torch writes sums, and does not compare them
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it has another checksum")
        read(paths[0], True)
    except Exception as error:  # a file can be damaged in many ways
        path = paths.pop(0)
        if not paths:
            del files[iteration, rank]
        return f"{path} ({error})"
    return None
