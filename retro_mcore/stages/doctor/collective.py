"""An all-reduce over all ranks, with its bandwidth and a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from retro_mcore.distributed import initialize_with_store, leave
from retro_mcore.platform import distributed_backend
from retro_mcore.stages.doctor.findings import Finding, error, ok
from retro_mcore.stages.doctor.peers import Peers

AREA = "network"
#: Bytes of the timed all-reduce.
_BYTES = {"nccl": 256 << 20, "gloo": 4 << 20}
_ROUNDS = 5
#: Steps that a rank reports, in order.
_STEPS = ("joining the group", "first all-reduce", "timed all-reduces", "done")


def check_collective(peers: Peers, device: torch.device) -> tuple[list[Finding], bool]:
    """All-reduce over all ranks.

    Args:
        peers: All ranks, none of which is missing.
        device: This rank's device.

    Returns:
        Findings (on rank 0: about all ranks), and whether this rank still hangs in a collective.
    """
    outcome: list[Finding] = []
    hangs = not ends_in_time(lambda: outcome.extend(_all_reduce(peers, device)), peers.seconds)
    if hangs:
        outcome = [_stuck(peers)] if peers.rank == 0 else []
    return outcome, hangs


def ends_in_time(action: Callable[[], object], seconds: float) -> bool:
    """Run an action in a thread of its own; whether it ends within the time."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _all_reduce(peers: Peers, device: torch.device) -> list[Finding]:
    backend = distributed_backend()
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the thread's own
        peers.put("collective", 0)
        # Longer than the thread is waited for: the watchdog of NCCL would end the process.
        initialize_with_store(
            backend, peers.store, peers.rank, peers.world_size, 2 * peers.seconds + 60
        )
        seconds, right = _timed(peers, device, _BYTES[backend])
        leave()
    except Exception as caught:  # NCCL and gloo raise their own types
        text = f"{type(caught).__name__}: {' '.join(str(caught).split())[:300]}"
        return [error(AREA, f"{backend} all-reduce", text, "Run with NCCL_DEBUG=INFO")]
    peers.put("collective", 3)
    return _judge(backend, peers, seconds, right)


def _timed(peers: Peers, device: torch.device, size: int) -> tuple[float, bool]:
    """Seconds of an all-reduce of `size` bytes, and whether its result was right."""
    peers.put("collective", 1)
    values = torch.full((size // 4,), float(peers.rank + 1), device=device)
    dist.all_reduce(values)
    expected = peers.world_size * (peers.world_size + 1) / 2
    right = bool((values == expected).all())
    peers.put("collective", 2)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(values.fill_(1.0))
    _synchronize(device)
    return (time.perf_counter() - start) / _ROUNDS, right


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _judge(backend: str, peers: Peers, seconds: float, right: bool) -> list[Finding]:
    if not right:
        found = "gave a wrong sum"
        return [error(AREA, f"{backend} all-reduce", found, "Leave out nodes until it is right")]
    if peers.rank != 0:
        return []
    size, ranks = _BYTES[backend], peers.world_size
    bus = 2 * (ranks - 1) / ranks * size / seconds / 1e9
    found = (
        f"{ranks} ranks, {size >> 20} MiB: {size / seconds / 1e9:.1f} GB/s, {bus:.1f} on the bus"
    )
    return [ok(AREA, f"{backend} all-reduce", found)]


def _stuck(peers: Peers) -> Finding:
    """Which ranks are furthest behind."""
    steps = {rank: peers.get("collective", rank, wait=False) for rank in range(peers.world_size)}
    reached = {rank: -1 if step is None else step for rank, step in steps.items()}
    least = min(reached.values())
    behind = [rank for rank, step in reached.items() if step == least]
    where = _STEPS[least] if least >= 0 else "the start"
    everyone = len(behind) == peers.world_size
    who = "all ranks" if everyone else f"ranks {', '.join(map(str, behind))}"
    return error(
        AREA,
        "all-reduce",
        f"no end after {peers.seconds:g} s: {who} did not get beyond '{where}'",
        "Check NCCL_SOCKET_IFNAME, firewalls and GPU links; NCCL_DEBUG=INFO tells more",
    )
