"""The files of nvidia-resiliency-ext's local checkpoints, with what its manager lacks (0.4.1).

| method          | what happens without it                                                      |
|-----------------|------------------------------------------------------------------------------|
| `latest`        | a file that is cut short or damaged counts as a checkpoint                   |
| `_my_ckpt_ids`  | copies count that no rank would send                                         |
| `_load`         | files are unpickled unguarded                                                |
| `_save_fn`      | if one rank cannot write, the others wait for it                             |
| `remove_from`   | the iteration in which a run crashed while saving cannot be saved again, and |
|                 | what a run leaves behind that goes on from before counts as its latest       |

The package writes `DIRECTORY/RUN/RANK/iter_0000005_RANK_local.pt` with `torch.save`, first under a
name with `.dirty`, and removes older ones when all ranks have it. Import this module only where it
is installed.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import (
    LocalCheckpointManager,
)
from nvidia_resiliency_ext.checkpointing.local.replication.group_utils import parse_group_sequence
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import (
    CliqueReplicationStrategy,
)

from retro_mcore.distributed import (
    gather,
    get_rank,
    get_world_size,
    group_timeout,
    raise_together,
)
from retro_mcore.errors import CheckpointError

#: Reads a file: its path, and whether to map its tensors into memory instead of reading them.
Reader = Callable[[Path, bool], Any]

_NAME = re.compile(r"iter_(\d+)_(\d+)_local(\.dirty)?\.pt")


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
                self.ranks, self.strategy = ranks, CliqueReplicationStrategy(group)


class LocalFiles(LocalCheckpointManager):
    """A run's local checkpoints, as files of this rank and of those whose copies it keeps.

    Args:
        directory: On this node.
        run: Names the run; a folder in `directory`.
        read: Reads a file without running what it holds.
        copies: Groups of ranks that keep copies of one another's files, if wanted.
    """

    def __init__(
        self, directory: str | Path, run: str, read: Reader, copies: Copies | None = None
    ) -> None:
        super().__init__(directory, run, copies and copies.strategy)
        self._read, self._kept = read, {get_rank()} if copies is None else {*copies.ranks}
        self._compares = False
        #: What `latest` found damaged, by path, on this rank.
        self.damaged: dict[Path, Exception] = {}

    @property
    def folder(self) -> Path:
        """Where this rank's files lie."""
        return self.local_ckpt_dir

    def latest(self) -> int | None:
        """The newest iteration that all ranks have, themselves or as a copy, undamaged.

        All ranks call it together. It reads the files.
        """
        with raise_together():
            self._ensure_dir()
        self.latest_iteration, self._compares = -1, True
        try:
            found = self.find_latest()
        finally:
            self._compares = False
        return None if found < 0 else found

    def lacking(self) -> tuple[int, Sequence[int]] | None:
        """The newest iteration after that of `latest`, and the ranks of which there is no file."""
        held: dict[int, set[int]] = {}
        for ids in self.globally_available_ids:
            for iteration, rank, _ in ids:
                held.setdefault(iteration, set()).add(rank)
        newest = max(held, default=-1)
        if newest <= self.latest_iteration:
            return None
        return newest, sorted({*range(get_world_size())} - held[newest])

    def told_damaged(self) -> list[str]:
        """What all ranks found damaged, a line each."""
        own = [f"{path} ({error})" for path, error in self.damaged.items()]
        return [line for lines in gather(own) for line in lines]

    def write(self, state: Any, iteration: int) -> None:
        """Save what this rank holds. All ranks call it together."""
        self.latest_iteration = -1
        with torch.no_grad():
            self.save(state, iteration)

    def remove_from(self, iteration: int) -> None:
        """Remove what was not written completely, and what is of this iteration or a later one."""
        self._ensure_dir()
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and (match[3] or int(match[1]) >= iteration):
                path.unlink()

    def _my_ckpt_ids(self) -> list[tuple[int, int, str]]:
        found = [id_ for id_ in super()._my_ckpt_ids() if id_[1] in self._kept]
        return [id_ for id_ in found if self._is_whole(id_)] if self._compares else found

    def _is_whole(self, id_: tuple[int, int, str]) -> bool:
        path = self._local_ckpt_path_from_id(id_)
        try:
            with zipfile.ZipFile(path) as archive:  # torch writes sums, and does not compare them
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it has another checksum")
            self._read(path, True)
        except Exception as error:  # a file can be damaged in many ways
            self.damaged[path] = error
            return False
        return True

    def _load(self, ckpt_id: tuple[int, int, str]) -> Any:
        return self._read(self._local_ckpt_path_from_id(ckpt_id), False)

    def _save_fn(self, id_to_state_dict: dict[tuple[int, int, str], Any]) -> None:
        with raise_together():
            try:
                super()._save_fn(id_to_state_dict)
            except Exception as error:
                raise CheckpointError(
                    self.folder,
                    f"cannot take a local checkpoint ({type(error).__name__}: {error})",
                    "Check the node's disk (--non-persistent-local-ckpt-dir); earlier checkpoints "
                    "are intact",
                ) from error
