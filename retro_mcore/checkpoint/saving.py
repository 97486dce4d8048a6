"""Writing a run's checkpoints: at once, or in the background while training goes on."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from retro_mcore import distributed
from retro_mcore.checkpoint.checksums import Checksums, checksums_of_share, write_checksums
from retro_mcore.checkpoint.files import (
    Retention,
    checkpoint_path,
    make_temporary,
    publish,
    temporary_path,
)
from retro_mcore.checkpoint.local_runs import take_over
from retro_mcore.checkpoint.state import (
    FAILURES,
    METADATA,
    TrainingParts,
    TrainingProgress,
    reason_of,
    state_dict,
)
from retro_mcore.errors import CheckpointError, RetroError
from retro_mcore.platform.compatibility import async_save_arguments, results_through_a_file


class CheckpointSaver:
    """Writes a run's checkpoints, one at a time, from all ranks together.

    As a context manager it finishes what is still being written: always when the body ends well,
    and if all ranks leave it by the same error. If one rank alone fails, its writer is stopped; the
    checkpoint before it stays the latest.

    Args:
        directory: What --save names.
        asynchronous: Write in a process of its own while training goes on; `finish` completes it.
        retention: Which checkpoints stay.
        alone: Whether no other run saves there, so that what crashes left over may be removed.
        local_run: The name under which this start has local checkpoints, if any.
    """

    def __init__(
        self,
        directory: str | Path,
        asynchronous: bool = False,
        retention: Retention | None = None,
        alone: bool = True,
        local_run: str | None = None,
    ) -> None:
        self._alone, self._local_run = alone, local_run
        self._directory, self._retention = Path(directory), retention or Retention()
        self._asynchronous, self._queue = asynchronous, AsyncCallsQueue()
        self._pending: int | None = None
        self._checksums: Future[Checksums] | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        together = error is None or (isinstance(error, RetroError) and error.raised_together)
        if together or distributed.get_world_size() == 1:
            self.finish()
        elif self._pending is not None:
            for call in self._queue.async_calls:
                call.async_caller.close(abort=True)

    def save(
        self, parts: TrainingParts, progress: TrainingProgress, args: Namespace
    ) -> Path | None:
        """Save; returns the checkpoint if it is complete, None if it is being written.

        Raises:
            CheckpointError: it could not be written.
        """
        self.finish()
        iteration = progress.iteration
        with distributed.raise_together():
            if distributed.get_rank() == 0:
                make_temporary(self._directory, iteration, self._alone)
        state = state_dict(parts, is_loading=False)
        state.update(progress_state(parts, progress, args))
        self._start(state, temporary_path(self._directory, iteration))
        self._pending, self._checksums = iteration, None
        return None if self._asynchronous else self.finish()

    def finish(self, wait: bool = True) -> Path | None:
        """Complete the checkpoint that is being written, and return it; None if there is none.

        Every rank calls it alike.

        Args:
            wait: For the writers. Otherwise a checkpoint that is still being written stays so.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is None:
            return None
        iteration, self._pending = self._pending, None
        temporary = temporary_path(self._directory, iteration)
        with distributed.raise_together(), _naming(temporary):
            self._queue.maybe_finalize_async_calls(blocking=wait)
        if self._queue.get_num_unfinalized_calls() or not self._is_read(temporary, wait):
            self._pending = iteration
            return None
        with distributed.raise_together(), _naming(temporary):
            assert self._checksums is not None
            share = self._checksums.result()
        shares = _on_all_ranks(share)
        with distributed.raise_together():
            if distributed.get_rank() == 0:
                write_checksums(temporary, shares)
                take_over(self._directory, self._local_run)
                publish(self._directory, iteration, self._retention)
        return checkpoint_path(self._directory, iteration)

    def _is_read(self, temporary: Path, wait: bool) -> bool:
        """Whether all ranks have the checksums of what they wrote, or wait for them.

        A thread reads the files, so that training goes on meanwhile.
        """
        if self._checksums is None:
            reader = ThreadPoolExecutor(1)
            self._checksums = reader.submit(checksums_of_share, temporary)
            reader.shutdown(wait=False)
        return wait or not distributed.any_rank(not self._checksums.done())

    def _start(self, state: dict[str, Any], temporary: Path) -> None:
        arguments = async_save_arguments() if self._asynchronous else {}
        metadata = dict(METADATA)
        with distributed.raise_together(), _naming(temporary), results_through_a_file():
            request = dist_checkpointing.save(
                state, str(temporary), content_metadata=metadata, **arguments
            )
            if request is not None:
                self._queue.schedule_async_request(request)


def progress_state(
    parts: TrainingParts, progress: TrainingProgress, args: Namespace
) -> dict[str, Any]:
    """What a checkpoint holds beside the sharded state."""
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "opt_param_scheduler": parts.scheduler.state_dict(),
    }


def save_checkpoint(
    directory: str | Path, parts: TrainingParts, progress: TrainingProgress, args: Namespace
) -> Path:
    """Write one checkpoint, from all ranks together; returns its directory.

    Raises:
        CheckpointError: it could not be written.
    """
    with CheckpointSaver(directory) as saver:
        saver.save(parts, progress, args)
    return checkpoint_path(directory, progress.iteration)


def _on_all_ranks(share: Checksums) -> list[Checksums]:
    shares = [share] * distributed.get_world_size()
    if len(shares) > 1:
        dist.all_gather_object(shares, share)
    return shares


@contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Tell a failed write as one, with its directory."""
    try:
        yield
    except FAILURES as error:
        raise CheckpointError(
            directory,
            f"could not be written ({reason_of(error)})",
            "Check the disk; the previous checkpoint is intact",
        ) from error
