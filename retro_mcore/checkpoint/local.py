"""Local checkpoints: what each rank holds, on the disk of its node, between those of --save.

    SAVE/local_checkpoints.json                         names the start that saved last
    DIRECTORY/START/RANK/iter_0000005_RANK_local.pt     of one rank, on its node

They hold what other checkpoints hold (`state.state_dict`), in this layout of ranks alone. Only the
latest stays, and none when the run ends. See docs/decisions/0036-local-checkpoints.md.
"""

from __future__ import annotations

import hashlib
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from retro_mcore import distributed
from retro_mcore.checkpoint.arguments import completed
from retro_mcore.checkpoint.loading import LoadScope, check_parts, put_state, sharded_entries
from retro_mcore.checkpoint.local_runs import announce, new_name, runs_of, take_over
from retro_mcore.checkpoint.safe_loading import load_local_state
from retro_mcore.checkpoint.saving import progress_state
from retro_mcore.checkpoint.state import (
    FAILURES,
    TrainingParts,
    TrainingProgress,
    reason_of,
    state_dict,
)
from retro_mcore.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from retro_mcore.platform.local_files import Copies

# Entries beside the run's state.
_LAYOUT, _CONTENTS = "local_layout", "local_contents"


@dataclass(frozen=True)
class LocalState:
    """What a local checkpoint holds for this rank.

    Attributes:
        folder: Where this rank's files lie.
        iteration: Of the checkpoint.
        arguments: That the run was saved with.
        content: Megatron's state.
    """

    folder: Path
    iteration: int
    arguments: dict[str, Any]
    content: Any


class LocalCheckpoints:
    """The local checkpoints of a start of a run. All ranks make it and call its methods together.

    Args:
        directory: On each node.
        save: What --save names.
        algorithm: "fully_parallel" or "atomic".
        copies: Groups of ranks that keep copies, from `make_copies`.
        layout: The sizes and options by which the state is divided, which must be the same again.

    Attributes:
        name: Of this start, under which it saves.

    Raises:
        CheckpointError: the directory cannot be made.
    """

    def __init__(
        self,
        directory: str | Path,
        save: str | Path,
        algorithm: str,
        copies: Copies | None,
        layout: Mapping[str, Any],
    ) -> None:
        from retro_mcore.platform.local_files import LocalFiles

        self._directory, self._save = Path(directory), save
        with distributed.raise_together(), _naming(self._directory, "cannot be made"):
            self._directory.mkdir(parents=True, exist_ok=True)
        self.name = distributed.on_first_rank(new_name)
        self._files = LocalFiles(directory, self.name, read_file, copies)
        self._algorithm, self._layout = algorithm, {**layout, "algorithm": algorithm}
        self._distribution: Any = None
        self._has_saved = False

    def newest_after(self, run: str, iteration: int) -> tuple[LocalState | None, list[str]]:
        """The newest one after an iteration, if it is complete, and what is to be said of others.

        Args:
            run: The start that saved it, from `runs_of`.
            iteration: Of the checkpoint in --load.

        Raises:
            CheckpointError: it cannot be read.
        """
        from retro_mcore.platform.local_files import LocalFiles

        files = LocalFiles(self._directory, run, read_file)
        with distributed.raise_together(), _naming(files.folder, "cannot be read"):
            found = files.newest_after(iteration)
        notes = [f"a local checkpoint is damaged: {line}" for line in found.damaged]
        if found.lacking is not None:
            ranks = ", ".join(map(str, found.lacking[1]))
            notes.append(
                f"the local checkpoint of iteration {found.lacking[0]} is not used: there is none "
                f"of rank {ranks}"
            )
        if found.iteration is None:
            return None, notes
        with distributed.raise_together(), _naming(files.folder, "cannot be read"):
            content = files.read()
        common = content.common
        if distributed.any_rank(common[_LAYOUT] != self._layout):
            changes = [
                f"{name} {common[_LAYOUT].get(name)}, now {value}"
                for name, value in self._layout.items()
                if common[_LAYOUT].get(name) != value
            ]
            notes.append(
                f"the local checkpoint of iteration {found.iteration} is not used: it has another "
                f"layout ({'; '.join(changes)})"
            )
            return None, notes
        arguments = completed(vars(common["args"]), files.folder)
        return LocalState(files.folder, found.iteration, arguments, content), notes

    def load(self, found: LocalState, parts: TrainingParts, scope: LoadScope) -> TrainingProgress:
        """Put the state of one into the parts of a run.

        Raises:
            CheckpointError: it belongs to another model or optimizer; on every rank.
        """
        request = state_dict(parts, is_loading=True)
        with distributed.raise_together():
            if found.content.sharded_state_dict[_CONTENTS].data != _digest(request):
                raise CheckpointError(
                    found.folder,
                    f"holds a local checkpoint of iteration {found.iteration} of another model, "
                    "optimizer or precision",
                    "Give the flags as before, or leave --non-persistent-ckpt-type out, to go on "
                    "from the checkpoint in --load",
                )
        check_parts(parts, found.content.common, scope, found.folder)
        with distributed.raise_together(), _naming(found.folder, "cannot be loaded"):
            state = found.content.to_state_dict(
                request, algo=self._algorithm, parallelization_group=_ranks_with_the_same()
            )
        return put_state(parts, state, state, scope, scope.random_state, found.folder)

    def save(self, parts: TrainingParts, progress: TrainingProgress, args: Namespace) -> Path:
        """Save one, and remove those before it; returns where this rank's part lies.

        Raises:
            CheckpointError: a rank could not write it; the one before it is intact.
        """
        from megatron.core.dist_checkpointing.tensor_aware_state_dict import (
            MCoreTensorAwareStateDict,
        )

        if not self._has_saved:
            self._remove(*distributed.on_first_rank(lambda: announce(self._save, self.name)))
        with distributed.raise_together(), _naming(self._files.folder, "could not be written"):
            state = state_dict(parts, is_loading=False)
            digest = _digest(state)
            state.update(progress_state(parts, progress, args))
            state[_LAYOUT] = self._layout
            state[_CONTENTS] = _of_this_rank(digest)
        with distributed.raise_together(), _naming(self._files.folder, "could not be written"):
            content, self._distribution = MCoreTensorAwareStateDict.from_state_dict(
                state,
                algo=self._algorithm,
                parallelization_group=_ranks_with_the_same(),
                cached_metadata=self._distribution,
            )
        with _naming(self._files.folder, "could not be written"):
            self._files.write(content, progress.iteration)  # it raises on all ranks itself
        if not self._has_saved:
            self._remove(*distributed.on_first_rank(lambda: take_over(self._save, self.name)))
        self._has_saved = True
        return self._files.folder

    def remove(self) -> None:
        """Remove all from the nodes, after the run's last checkpoint in --save."""
        runs = distributed.on_first_rank(lambda: runs_of(self._save))
        if runs.run == self.name:
            self._remove(self.name, *runs.former)

    def _remove(self, *names: str) -> None:
        if distributed.is_first_on_host():
            for name in names:  # that one stays is no reason to end a run
                shutil.rmtree(self._directory / name, ignore_errors=True)


def read_file(path: Path, mapped: bool = False) -> Any:
    """Read what a rank saved, without running what the file holds.

    Args:
        path: The file.
        mapped: Map tensors into memory instead of reading them.

    Raises:
        CheckpointError: it is damaged, or holds something else.
    """
    from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict

    return load_local_state(path, (MCoreTensorAwareStateDict, ShardedObject, ShardedTensor), mapped)


def make_copies(jump: int, factor: int) -> Copies:
    """Groups of ranks that keep copies of one another's local checkpoints.

    Raises:
        ConfigurationError: the ranks cannot be divided so.
    """
    from retro_mcore.platform.local_files import Copies

    world_size = distributed.get_world_size()
    if world_size % (jump * factor):
        raise ConfigurationError(
            "--replication-jump",
            f"{jump}, with --replication-factor {factor} and {world_size} processes",
            "Choose them so that their product divides the number of processes",
        )
    return Copies(jump, factor)


def _ranks_with_the_same() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _of_this_rank(value: object) -> ShardedObject:
    """Megatron expects everything else to be the same on all ranks."""
    world_size, rank = distributed.get_world_size(), distributed.get_rank()
    return ShardedObject(_CONTENTS, value, (world_size,), (rank,))


def _digest(state: dict[str, Any]) -> str:
    """Of names, places, shapes and types of what a rank holds."""
    names = sorted(
        entry.unique_key
        if isinstance(entry, ShardedObject)
        else f"{entry.key} {entry.global_offset} {tuple(entry.local_shape)} "
        f"{tuple(entry.global_shape)} {entry.dtype}"
        for entry in sharded_entries(state)
    )
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


@contextmanager
def _naming(folder: Path, what: str) -> Iterator[None]:
    """Tell a failure as one of local checkpoints."""
    try:
        yield
    except CheckpointError:
        raise
    except FAILURES as error:
        raise CheckpointError(
            folder,
            f"{what} as a local checkpoint ({reason_of(error)})",
            "Check the node's disk (--non-persistent-local-ckpt-dir); earlier checkpoints are "
            "intact",
        ) from error
