"""Helpers for torch.distributed that take a process group and also work without one."""

from __future__ import annotations

import atexit
import gc
import logging
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from retro_mcore import agent_store, launcher, watch
from retro_mcore.errors import RetroError, system_refusal
from retro_mcore.time_limit import DATA_MINUTES, check_minutes, check_stall

_LOG = logging.getLogger(__name__)

Value = TypeVar("Value")


def launched_by_torchrun() -> bool:
    """Whether torchrun (or a scheduler with its environment variables) started this process.

    Raises:
        ConfigurationError: the variables are wrong; see `launcher.read`.
    """
    return launcher.read().in_job


def initialize(
    backend: str = "gloo",
    timeout_minutes: float = DATA_MINUTES,
    stall_minutes: float | None = None,
) -> None:
    """Join the default process group; a process launched alone becomes a world of size one.

    Does nothing if the group exists. A world of size one uses an in-memory store, so it needs no
    port. In a larger one the ranks watch one another from then on (`retro_mcore.watch`). The group
    is destroyed when the interpreter exits (`leave`).

    Args:
        backend: "gloo" or "nccl".
        timeout_minutes: Most minutes that a collective may take.
        stall_minutes: Most minutes for which a rank may do nothing (0: any); ranks that keep others
            waiting are then told by name, too. None: neither, where ranks wait for requests.

    Raises:
        ConfigurationError: a time is out of range, or the launcher's variables are wrong.
    """
    check_minutes(timeout_minutes)
    check_stall(stall_minutes)
    if dist.is_initialized():
        return
    atexit.unregister(_leave_at_exit)
    atexit.register(_leave_at_exit)
    global _timeout
    timeout = _timeout = timedelta(minutes=timeout_minutes)
    if launched_by_torchrun():
        name = _join(backend, timeout)
        if dist.get_world_size() > 1:
            _start_watch(timeout_minutes, stall_minutes, name)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def _join(backend: str, timeout: timedelta) -> str:
    """Join by the launcher's environment variables; a name that these ranks alone have."""
    launcher.meeting_place()  # else PyTorch's own error
    if agent_store.is_kept_by_agent():
        place = launcher.read()
        rank, world_size = cast(int, place.rank), cast(int, place.world_size)
        store, name = agent_store.fresh_part(rank, world_size, timeout)
        initialize_with_store(backend, store, rank, world_size, timeout.total_seconds())
        return name
    dist.init_process_group(backend, timeout=timeout)  # rank 0 of these ranks keeps the store
    own = uuid.uuid4().hex
    if "gloo" in backend:
        return str(broadcast_object(own))
    store = _get_default_store()  # NCCL's first collective takes memory
    if get_rank() == 0:
        store.set("retro_mcore/watch", own)
    return str(store.get("retro_mcore/watch").decode())


def _start_watch(timeout_minutes: float, stall_minutes: float | None, name: str) -> None:
    """Let the ranks watch one another, under a name in the store that no other ranks have had."""
    try:
        watch.start(get_rank(), get_world_size(), timeout_minutes, stall_minutes, name)
    except Exception:  # a watch that is broken is no reason to end a job
        _LOG.warning("the watch over ranks does not work", exc_info=True)
    # Processes of multiprocessing end without atexit's functions, while their error is handled.
    Finalize(None, lambda: _end_watch(sys.exc_info()[1]), exitpriority=100)


def _end_watch(error: BaseException | None) -> None:
    if error is None:
        watch.leave()
    else:
        watch.end(error)


#: The limit of the default group, if it was joined here.
_timeout: timedelta | None = None


def group_timeout() -> timedelta | None:
    """Longest time of a collective, for further groups; None if others made the default group."""
    return _timeout


def initialize_with_store(
    backend: str, store: dist.Store, rank: int, world_size: int, timeout_seconds: float
) -> None:
    """Join the default process group through a store that the ranks already share.

    Args:
        backend: "gloo" or "nccl".
        store: The store.
        rank: This rank.
        world_size: Number of ranks.
        timeout_seconds: Most seconds that a collective may take.
    """
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


_before_leaving: list[Callable[[], None]] = []


def before_leaving(function: Callable[[], None]) -> None:
    """Register a function that `leave` calls first, to release its references to groups."""
    if function not in _before_leaving:
        _before_leaving.append(function)


def leave() -> None:
    """Destroy all process groups, and wait for the threads of those without other references.

    A gloo thread may hold the last reference to a collective's tensors and their Python objects. If
    it releases them while the interpreter exits, Python ends the thread inside a C++ destructor,
    which aborts the process (SIGABRT) after its work is done. So no such thread may remain when the
    interpreter exits.
    """
    watch.leave()
    for function in _before_leaving:
        function()
    if dist.is_initialized():
        dist.destroy_process_group()
    global _timeout
    _timeout = None
    gc.collect()  # models and optimizers hold groups and contain reference cycles


def _leave_at_exit() -> None:
    # After an uncaught exception the exit code shows a failure anyway, and NCCL groups may
    # wait for ranks that never arrive.
    error = getattr(sys, "last_value", None)
    _end_watch(error)
    if error is None:
        leave()


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """Rank in `group` (default: the world); 0 without torch.distributed."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def is_first_on_host() -> bool:
    """Whether this rank is the first of those that torchrun started on its host."""
    return launcher.local_rank() == 0


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Size of `group` (default: the world); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for every rank of `group`; no-op in a world of size one."""
    if get_world_size(group) > 1:
        dist.barrier(group)


def broadcast_object(
    value: object, group: dist.ProcessGroup | None = None, source_rank: int = 0
) -> object:
    """Broadcast the `value` of a rank of `group`, by default its first, to every rank."""
    if get_world_size(group) == 1:
        return value
    box = [value]
    source = source_rank if group is None else dist.get_global_rank(group, source_rank)
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def on_first_rank(compute: Callable[[], Value]) -> Value:
    """Run `compute` on rank 0 and return its result, or raise its error, on every rank."""
    value = None
    with raise_together():
        if get_rank() == 0:
            value = compute()
    return cast(Value, broadcast_object(value))


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether `flag` is set on any rank of `group`."""
    return any(gather(flag, group))


def gather(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Gather the value of every rank of `group` on all of its ranks."""
    values = [value] * get_world_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


class PeerError(RuntimeError):
    """Another rank failed with an error that the user cannot fix."""

    raised_together = True


@contextmanager
def raise_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the body on every rank. If it raises on any rank, raise on all, so no rank hangs.

    The body must not use collectives of `group` after a point where only some ranks may raise.

    Raises:
        RetroError: the first user error, by rank.
        PeerError: another rank raised some other exception; that rank re-raises its own.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:  # re-raised below, on every rank
        error = caught
    if get_world_size(group) == 1:
        if error is not None:
            raise error
        return
    if error is not None and (refusal := system_refusal(error)) is not None:
        refusal.__cause__, error = error, refusal
    report: RetroError | str | None = error if isinstance(error, RetroError) else None
    if error is not None and report is None:
        report = f"{type(error).__name__}: {error}"
    reports: list[RetroError | str | None] = [None] * get_world_size(group)
    dist.all_gather_object(reports, report, group=group)
    users = [other for other in reports if isinstance(other, RetroError)]
    if users:
        first = error if isinstance(error, RetroError) else users[0]
        first.raised_together = True
        raise first
    if error is not None:
        raise error
    for rank, other in enumerate(reports):
        if other is not None:
            raise PeerError(f"rank {rank} failed: {other}")


def print_error(error: RetroError) -> None:
    """Print an error and its problems to stderr, one line each.

    If every rank raises the error, only the first rank prints it.
    """
    rank = launcher.shown_rank()
    everywhere = error.raised_together or not dist.is_initialized()
    if rank == 0 or not everywhere:
        where = "" if everywhere or get_world_size() == 1 else f"[rank {rank}] "
        for problem in error.problems:
            print(f"{where}error: {problem}", file=sys.stderr, flush=True)
