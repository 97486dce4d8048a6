"""Work divided into shards, one file each, shared by any number of ranks.

A shard's content depends only on its range, so the bytes are the same for every world size and
after every restart. Ranks take the next shard from a counter in torch.distributed's store, so a
slow rank does not delay the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from retro_mcore.distributed import barrier, get_rank, get_world_size, raise_together
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.progress import Progress
from retro_mcore.project.markers import FileState, signed_write, state_of
from retro_mcore.project.space import require_space

_round = itertools.count()
#: Most shards of a group, whose files are open together.
_MOST_SHARDS = 64


@dataclass(frozen=True)
class Shard:
    """Rows [start, end) and the file with their result."""

    start: int
    end: int
    path: Path


@dataclass(frozen=True)
class ShardReport:
    """Result of a run over shards, on all ranks together."""

    total: int
    reused: int
    damaged: tuple[Path, ...]

    @property
    def built(self) -> int:
        """Number of shards that this run built."""
        return self.total - self.reused

    def __str__(self) -> str:
        if self.reused == self.total:
            return f"{self.total} (reused)"
        text = f"{self.total} ({self.reused} reused)" if self.reused else str(self.total)
        if self.damaged:
            text += f", rebuilt damaged {', '.join(path.name for path in self.damaged)}"
        return text


def cut(directory: Path, count: int, shard_length: int, growth: Sequence[int] = ()) -> list[Shard]:
    """Divide rows [0, count) into shards with upstream's names: zero-padded `start-end`.

    Args:
        directory: Directory of the shards.
        count: Number of rows.
        shard_length: Rows per shard; the last one may be shorter.
        growth: Earlier numbers of rows. Shards also end there, so earlier shards are reused.
    """
    return name_shards(
        directory,
        [
            (start, min(start + shard_length, last))
            for first, last in itertools.pairwise([0, *growth, count])
            for start in range(first, last, shard_length)
        ],
    )


def name_shards(directory: Path, bounds: Sequence[tuple[int, int]]) -> list[Shard]:
    """Shards of consecutive ranges of rows, with upstream's names; see `cut`."""
    if not bounds:
        return []
    digits = math.ceil(math.log(bounds[-1][1]) / math.log(10)) + 1
    return [
        Shard(start, end, directory / f"{start:0{digits}d}-{end:0{digits}d}.hdf5")
        for start, end in bounds
    ]


def choose_shard_length(count: int, longest: int, shards: int = 64, shortest: int = 64) -> int:
    """Choose rows per shard: enough shards for all ranks, none tiny or longer than `longest`."""
    return min(longest, max(shortest, -(-count // shards)))


def run_shards(
    shards: Sequence[Shard],
    build: Callable[[Shard, Path], None],
    fingerprint: str,
    description: str,
    row_bytes: float = 0.0,
    beside: Callable[[Shard], Path] | None = None,
    group: dist.ProcessGroup | None = None,
) -> ShardReport:
    """Build the missing shards on all ranks of `group`. Ends with a barrier.

    Args:
        shards: All shards of the stage.
        build: Writes a shard's file at the given temporary path.
        fingerprint: Fingerprint of the inputs; files with another fingerprint are rebuilt.
        description: Label of the progress bar.
        row_bytes: Bytes per row on disk, if known in advance.
        beside: A second (signed) file that `build` writes; a shard is complete only with both.
        group: Process group; default: the world.

    Raises:
        ProjectError: the missing shards would not fit on the disk; nothing is written.
        RetroError: any rank failed; raised on all ranks.
    """
    missing, report = missing_shards(shards, fingerprint, description, row_bytes, beside, group)

    def build_one(together: Sequence[Shard]) -> None:
        (shard,) = together
        with signed_write(shard.path, fingerprint) as temporary:
            build(shard, temporary)

    run_groups([[shard] for shard in missing], build_one, description, group)
    return report


def run_groups(
    groups: Sequence[Sequence[Shard]],
    build: Callable[[Sequence[Shard]], None],
    description: str,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Build groups of shards, each on one rank of `group`. Ends with a barrier.

    Args:
        groups: Shards that are built together.
        build: Writes the files of a group.
        description: Label of the progress bar.
        group: Process group; default: the world.

    Raises:
        RetroError: any rank failed; raised on all ranks.
    """
    ends = [0, *itertools.accumulate(map(len, groups))]
    with raise_together(group):
        hidden = get_rank(group) != 0 or not groups
        with Progress(description, ends[-1], hidden=hidden) as progress:
            done = 0
            for index in _take_turns(len(groups), group):
                build(groups[index])
                progress.update(ends[index + 1] - done)
                done = ends[index + 1]
            progress.update(ends[-1] - done)
    barrier(group)


def group_shards(shards: Sequence[Shard], rows: int, least: int = 1) -> list[list[Shard]]:
    """Group consecutive shards by number of rows.

    Args:
        shards: The shards.
        rows: Most rows of a group of more than one shard.
        least: Make at least so many groups, as far as there are shards.
    """
    total = sum(shard.end - shard.start for shard in shards)
    most = min(rows, -(-total // least))
    groups: list[list[Shard]] = []
    held = 0
    for shard in shards:
        length = shard.end - shard.start
        if groups and held + length <= most and len(groups[-1]) < _MOST_SHARDS:
            groups[-1].append(shard)
        else:
            groups.append([shard])
            held = 0
        held += length
    return groups


def missing_shards(
    shards: Sequence[Shard],
    fingerprint: str,
    description: str,
    row_bytes: float = 0.0,
    beside: Callable[[Shard], Path] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[list[Shard], ShardReport]:
    """Shards still to build, and the report for when they are built; see `run_shards`.

    Raises:
        ProjectError: the shards would not fit on the disk.
    """
    states = states_of(shards, fingerprint, beside, group)
    found = list(zip(shards, states, strict=True))
    missing = [shard for shard, state in found if state is not FileState.COMPLETE]
    damaged = tuple(shard.path for shard, state in found if state is FileState.DAMAGED)
    with raise_together(group):
        if missing:
            rows = sum(shard.end - shard.start for shard in missing)
            needed = math.ceil(rows * row_bytes)
            what, files = f"{len(missing)} files ({description})", 2 * len(missing)  # and markers
            require_space(missing[0].path.parent, needed, what, files)
    return missing, ShardReport(len(shards), len(shards) - len(missing), damaged)


def states_of(
    shards: Sequence[Shard],
    fingerprint: str,
    beside: Callable[[Shard], Path] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[FileState]:
    """Compare shards with their markers, divided among the ranks of `group`; see `run_shards`."""
    states: list[FileState] = [FileState.MISSING] * len(shards)
    rank, world = get_rank(group), get_world_size(group)
    with raise_together(group):
        for index in range(rank, len(shards), world):
            states[index] = _state(shards[index], fingerprint, beside)
    return _gather_states(states, world, group)


def require_shards(
    shards: Sequence[Shard],
    fingerprint: str,
    hint: str,
    beside: Callable[[Shard], Path] | None = None,
) -> None:
    """Require the shards of an earlier step. All ranks must call this.

    Raises:
        ProjectError: a shard is missing or damaged. Names the first one; `hint` is the hint.
    """
    states = states_of(shards, fingerprint, beside)
    for shard, state in zip(shards, states, strict=True):
        if state is not FileState.COMPLETE:
            raise ProjectError(shard.path, f"is {state.value}", hint)


@dataclass(frozen=True)
class Share:
    """One job's share of a step, written "I/N": the I-th of N, counted from 1.

    Attributes:
        index: I - 1.
        count: N.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read "I/N".

        Raises:
            ConfigurationError: not two numbers, or I is not in 1 to N.
        """
        try:
            number, count = (int(part) for part in text.split("/"))
        except ValueError:
            number, count = 0, 0
        if not 1 <= number <= count:
            raise ConfigurationError(
                "--shard", repr(text), "Give I/N with I from 1 to N, such as 3/8"
            )
        return cls(number - 1, count)

    def of(self, shards: Sequence[Shard]) -> list[Shard]:
        """This job's shards."""
        return list(shards[self.index :: self.count])


def _state(shard: Shard, fingerprint: str, beside: Callable[[Shard], Path] | None) -> FileState:
    state = state_of(shard.path, fingerprint)
    if state is not FileState.COMPLETE or beside is None:
        return state
    return state_of(beside(shard), fingerprint)


def _gather_states(
    states: list[FileState], world: int, group: dist.ProcessGroup | None
) -> list[FileState]:
    if world == 1:
        return states
    gathered: list[list[FileState] | None] = [None] * world
    dist.all_gather_object(gathered, states, group=group)
    return [gathered[index % world][index] for index in range(len(states))]  # type: ignore[index]


def _take_turns(count: int, group: dist.ProcessGroup | None) -> Iterator[int]:
    """Numbers below `count`, each assigned to one rank: a free rank takes the next."""
    if get_world_size(group) == 1:
        yield from range(count)
        return
    # All calls share the store, so each round has its own counter. Ranks run the same rounds.
    key = f"retro_mcore/shards/{next(_round)}"
    store = dist.distributed_c10d._get_default_store()
    while (index := store.add(key, 1) - 1) < count:
        yield index
