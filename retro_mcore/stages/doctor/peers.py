"""The other ranks of a job, met through the launcher's key-value store.

No process group is needed, so ranks that are missing can be named instead of waited for.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from retro_mcore import launcher
from retro_mcore.agent_store import is_kept_by_agent
from retro_mcore.distributed import launched_by_torchrun
from retro_mcore.errors import ConfigurationError
from retro_mcore.stages.doctor.findings import Finding, error, ok, warning

#: Clocks further apart than this, in seconds, are a problem for logs and for file times.
_APART = 1.0
_ROUNDS = 5


class Peers:
    """All ranks of a job.

    Args:
        store: A store that all ranks share.
        rank: This rank.
        world_size: Number of ranks that there should be.
        seconds: How long to wait for others.
    """

    def __init__(self, store: Any, rank: int, world_size: int, seconds: float) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.seconds = seconds
        self.local_rank = launcher.local_rank() if world_size > 1 else 0
        self.local_world_size = launcher.local_world_size()
        self.host = socket.gethostname()

    @property
    def leads(self) -> bool:
        """Whether this is its node's first rank."""
        return self.local_rank == 0

    def meet(self, step: str) -> list[int]:
        """Wait for all ranks at a step; returns those that did not come in time."""
        self.store.set(f"{step}/{self.rank}", "")
        if self.store.add(f"{step}/count", 1) == self.world_size:
            self.store.set(f"{step}/all", "")
        if self._comes(f"{step}/all"):
            return []
        return [rank for rank in range(self.world_size) if not self._is_set(f"{step}/{rank}")]

    def put(self, name: str, value: Any) -> None:
        """Give this rank's value to the others."""
        self.store.set(f"{name}={self.rank}", json.dumps(value))

    def get(self, name: str, rank: int, wait: bool = True) -> Any:
        """The value of a rank; None if it does not come in time."""
        key = f"{name}={rank}"
        if not (self._comes(key) if wait else self._is_set(key)):
            return None
        return json.loads(self.store.get(key))

    def gather(self, name: str, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """The values of ranks (default: all), as far as they come in time."""
        ranks = range(self.world_size) if ranks is None else ranks
        end = time.monotonic() + self.seconds
        found = {rank: self.get(name, rank, time.monotonic() < end) for rank in ranks}
        return {rank: value for rank, value in found.items() if value is not None}

    def _comes(self, key: str) -> bool:
        try:
            self.store.wait([key], timedelta(seconds=self.seconds))
        except (RuntimeError, ValueError):  # stores differ in the error of a timeout
            return False
        return True

    def _is_set(self, key: str) -> bool:
        return bool(self.store.check([key]))


def join(seconds: float) -> Peers:
    """Reach the other ranks through the store of torchrun, or through one on rank 0.

    Raises:
        ConfigurationError: the address cannot be reached, or the launcher's variables are wrong.
    """
    if not launched_by_torchrun():
        return Peers(dist.HashStore(), 0, 1, seconds)
    place = launcher.read()
    rank, world_size = cast(int, place.rank), cast(int, place.world_size)
    host, port = launcher.meeting_place()
    by_agent = is_kept_by_agent()
    try:
        store = dist.TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0 and not by_agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as failure:
        raise ConfigurationError(
            f"MASTER_ADDR={host} MASTER_PORT={port}",
            f"rank {rank} on {socket.gethostname()} does not reach rank 0 in {seconds:g} s "
            f"({' '.join(str(failure).split())[:150]})",
            "Check that rank 0 runs, the name resolves to its node, and the port is open",
        ) from failure
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives one
    return Peers(dist.PrefixStore(f"doctor {attempt}", store), rank, world_size, seconds)


def missing(step: str, ranks: Sequence[int], hosts: dict[int, str]) -> Finding:
    """The finding for ranks that did not come."""
    named = ", ".join(f"{rank} ({hosts[rank]})" if rank in hosts else f"{rank}" for rank in ranks)
    return error(
        "network", f"ranks {named}", f"did not come to '{step}'", "See their nodes and logs"
    )


def compare_clocks(peers: Peers, leaders: Sequence[int]) -> list[Finding]:
    """Compare each node's clock with rank 0's, as NTP does. Ranks that lead and rank 0 call it.

    Returns:
        Findings, on rank 0.
    """
    if peers.rank != 0:
        if peers.leads:
            _ask_for_time(peers)
        return []
    findings: list[Finding] = []
    for rank in leaders:
        if rank != 0:
            findings += _serve_time(peers, rank)
    others = len([rank for rank in leaders if rank])
    if others and not findings:
        findings = [ok("clock", "clocks", f"of {others} nodes are within {_APART:g} s of rank 0's")]
    return findings


def _ask_for_time(peers: Peers) -> None:
    """Measure this node's offset to rank 0 several times; give the one of the shortest trip."""
    if peers.get(f"clock/{peers.rank}/go", 0) is None:
        return
    trips = []
    for turn in range(_ROUNDS):
        sent = time.time()
        peers.put(f"clock/{turn}", sent)
        told = peers.get(f"clock/{peers.rank}/{turn}", 0)
        if told is None:
            return
        received = time.time()
        trips.append((received - sent, (sent + received) / 2 - told))
    peers.put("clock/offset", min(trips))


def _serve_time(peers: Peers, rank: int) -> list[Finding]:
    """Answer a node with rank 0's time, and judge its offset."""
    peers.put(f"clock/{rank}/go", True)
    for turn in range(_ROUNDS):
        if peers.get(f"clock/{turn}", rank) is None:
            return [missing("comparing clocks", [rank], {})]
        peers.put(f"clock/{rank}/{turn}", time.time())
    found = peers.get("clock/offset", rank)
    if found is None:
        return [missing("comparing clocks", [rank], {})]
    trip, offset = found
    if abs(offset) - trip / 2 <= _APART:
        return []
    ahead = "ahead of" if offset > 0 else "behind"
    return [
        warning(
            "clock",
            f"rank {rank}",
            f"{abs(offset):.1f} s {ahead} rank 0 (± {trip / 2:.1g} s)",
            "Synchronize the nodes' clocks (chronyc tracking)",
        )
    ]
