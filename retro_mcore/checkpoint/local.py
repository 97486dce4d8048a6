"""Local checkpoints: what each rank holds, on the disk of its node, between those of --save.

    SAVE/local_checkpoints.json                         names the run
    DIRECTORY/RUN/RANK/iter_0000005_RANK_local.pt       of one rank, on its node

They hold what other checkpoints hold (`state.state_dict`), in this layout of ranks alone. Only the
latest stays. See docs/decisions/0036-local-checkpoints.md.
"""

from __future__ import annotations

import hashlib
import re
import uuid
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
from retro_mcore.checkpoint.loading import LoadScope, put_state, sharded_entries
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
from retro_mcore.json_text import parse_json
from retro_mcore.project.atomic import write_json

if TYPE_CHECKING:
    from retro_mcore.platform.local_files import Copies

RUN_FILE = "local_checkpoints.json"

# Entries beside the run's state.
_LAYOUT, _CONTENTS = "local_layout", "local_contents"


def run_of(directory: str | Path) -> str | None:
    """The name of the run that saves in a directory; None if it has no local checkpoints.

    Raises:
        CheckpointError: the file that names it is damaged.
    """
    path = Path(directory) / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = parse_json(path.read_bytes())["run"]
    except (ValueError, KeyError, TypeError):
        run = None
    if not isinstance(run, str) or not re.fullmatch(r"[0-9a-f]{32}", run):
        raise CheckpointError(path, "is damaged", "Remove it, to go on without local checkpoints")
    return run


def start_run(directory: str | Path) -> str:
    """Give the run that saves in a directory a name, under which no others have saved."""
    run = uuid.uuid4().hex
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_json(Path(directory) / RUN_FILE, {"run": run})
    return run


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
    """The local checkpoints of one run. All ranks make it and call its methods together.

    Args:
        directory: On each node.
        run: From `run_of` or `start_run`.
        algorithm: "fully_parallel" or "atomic".
        copies: Groups of ranks that keep copies, from `make_copies`.
        layout: The sizes and options by which the state is divided, which must be the same again.
    """

    def __init__(
        self,
        directory: str | Path,
        run: str,
        algorithm: str,
        copies: Copies | None,
        layout: Mapping[str, Any],
    ) -> None:
        from retro_mcore.platform.local_files import LocalFiles

        self._files = LocalFiles(directory, run, read_file, copies)
        self._algorithm, self._layout = algorithm, {**layout, "algorithm": algorithm}
        self._distribution: Any = None
        self._has_saved = False

    def newest_after(self, iteration: int) -> tuple[LocalState | None, list[str]]:
        """The newest one after an iteration, if it is complete, and what is to be said of others.

        Raises:
            CheckpointError: it cannot be read.
        """
        latest = self._files.latest()
        notes = [f"a local checkpoint is damaged: {line}" for line in self._files.told_damaged()]
        lacking = self._files.lacking()
        if lacking is not None and lacking[0] > iteration:
            ranks = ", ".join(map(str, lacking[1]))
            notes.append(
                f"the local checkpoint of iteration {lacking[0]} is not used: there is none of "
                f"rank {ranks}"
            )
        if latest is None or latest <= iteration:
            return None, notes
        with distributed.raise_together(), _naming(self._files.folder, "cannot be read"):
            content, _ = self._files.load()
        common = content.common
        if distributed.any_rank(common[_LAYOUT] != self._layout):
            changes = [
                f"{name} {common[_LAYOUT].get(name)}, now {value}"
                for name, value in self._layout.items()
                if common[_LAYOUT].get(name) != value
            ]
            notes.append(
                f"the local checkpoint of iteration {latest} is not used: it has another layout "
                f"({'; '.join(changes)})"
            )
            return None, notes
        arguments = completed(vars(common["args"]), self._files.folder)
        return LocalState(self._files.folder, latest, arguments, content), notes

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

        with distributed.raise_together(), _naming(self._files.folder, "could not be written"):
            if not self._has_saved:
                self._files.remove_from(progress.iteration)
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
            self._files.write(content, progress.iteration)
        self._has_saved = True
        return self._files.folder


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
