"""The store of torchrun's agent, without what earlier ranks have left in it.

The agent keeps its store when it starts ranks again (`--max-restarts`), and PyTorch's process
groups then read the addresses of ranks that have ended (pytorch/pytorch issue 135712). The number
of restarts does not tell attempts apart, because agents of several nodes count on their own.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from retro_mcore import launcher

_PREFIX = "retro_mcore/meeting"
_PAUSE = 0.05


def is_kept_by_agent() -> bool:
    """Whether the launcher's agent keeps the store where the ranks meet, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_part(rank: int, world_size: int, timeout: timedelta) -> tuple[dist.Store, str]:
    """Connect to the agent's store, and agree on a part of it that no other ranks have used.

    Each rank tells a new name of its own, and rank 0 answers under that name. So nothing that is
    read is of an earlier attempt, whose ranks have all ended.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        timeout: Longest time until all have come.

    Returns:
        The part, and its name.

    Raises:
        TimeoutError: some ranks have not come in time.
        ConfigurationError: the address is missing or wrong.
    """
    address, port = launcher.meeting_place()
    whole = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    store = dist.PrefixStore(_PREFIX, whole)
    name = uuid.uuid4().hex
    if rank == 0:
        _answer_all(store, name, world_size, timeout)
    else:
        name = _ask(store, rank, name, timeout)
    return dist.PrefixStore(f"{_PREFIX}/{name}", whole), name


def _ask(store: dist.Store, rank: int, own: str, timeout: timedelta) -> str:
    store.set(f"rank/{rank}", own)
    try:
        store.wait([f"answer/{own}"], timeout)
    except dist.DistStoreError as error:
        raise _not_come("rank 0", timeout) from error
    name = store.get(f"answer/{own}").decode()
    store.set(f"came/{name}/{rank}", own)
    return name


def _answer_all(store: dist.Store, name: str, world_size: int, timeout: timedelta) -> None:
    """Answer every name until all ranks have read theirs: first ones may be of earlier ranks."""
    answered: dict[int, str] = {}
    end = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            if not store.check([f"rank/{rank}"]):
                continue
            asked = store.get(f"rank/{rank}").decode()
            if answered.get(rank) != asked:
                store.set(f"answer/{asked}", name)
                answered[rank] = asked
        missing = [rank for rank in missing if not store.check([f"came/{name}/{rank}"])]
        if missing and time.monotonic() > end:
            ranks = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
            raise _not_come(f"{len(missing)} of {world_size} ranks ({ranks})", timeout)
        if missing:
            time.sleep(_PAUSE)


def _not_come(who: str, timeout: timedelta) -> TimeoutError:
    return TimeoutError(
        f"{who} did not come to the start within {timeout.total_seconds():.0f} s. See their logs; "
        "--distributed-timeout-minutes is how long ranks wait for one another"
    )
