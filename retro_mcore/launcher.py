"""What a launcher (torchrun, Slurm, Kubernetes) tells a process by its environment.

All of it is read here, so that a wrong value is one error with the variable's name, wherever it is
first needed. Only the standard library is used, so that every layer can ask.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from retro_mcore.errors import ConfigurationError, RetroError

_FIX = "Start with torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
#: Least value of each variable.
_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
#: Each must be less than the other.
_BELOW = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}


@dataclass(frozen=True)
class Launch:
    """This process among those of its job; None is what the launcher does not tell.

    Attributes:
        rank: Its number in the job.
        world_size: Number of processes of the job.
        local_rank: Its number on its node.
        local_world_size: Number of processes on its node.
    """

    rank: int | None
    world_size: int | None
    local_rank: int | None
    local_world_size: int | None

    @property
    def in_job(self) -> bool:
        """Whether a launcher has started this process as one of a job, maybe of one process."""
        return self.rank is not None and self.world_size is not None


def read() -> Launch:
    """Read the launcher's variables.

    Raises:
        ConfigurationError: one is no number or out of range, or a rank is given without the number
            of ranks, or the other way around: each process would take itself for the whole job.
    """
    found = {name: _number(name, least) for name, least in _LEAST.items()}
    for name, limit in _BELOW.items():
        number, count = found[name], found[limit]
        if number is not None and count is not None and number >= count:
            raise ConfigurationError(name, f"{number}, and {limit} is {count}", _FIX)
    rank, world_size = found["RANK"], found["WORLD_SIZE"]
    if rank and world_size is None:
        raise ConfigurationError("RANK", f"{rank}, and WORLD_SIZE is not set", _FIX)
    if rank is None and (world_size or 1) > 1:
        raise ConfigurationError("WORLD_SIZE", f"{world_size}, and RANK is not set", _FIX)
    return Launch(rank, world_size, found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"])


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        raise ConfigurationError(name, f"{text!r} is not a number", _FIX) from None
    if number < least:
        raise ConfigurationError(name, f"{text}, less than {least}", _FIX)
    return number


def shown_rank() -> int:
    """This process's rank for log lines; 0 if it is alone, or the variables are wrong.

    So their error is shown.
    """
    try:
        return read().rank or 0
    except RetroError:
        return 0


def local_rank() -> int:
    """This process's rank on its node, 0 if the launcher does not say.

    Raises:
        ConfigurationError: see `read`.
    """
    return read().local_rank or 0


def local_world_size(unknown: int = 1) -> int:
    """Number of processes on this node.

    Args:
        unknown: The answer if the launcher does not say.

    Raises:
        ConfigurationError: see `read`.
    """
    return read().local_world_size or unknown


def meeting_place() -> tuple[str, int]:
    """Host and port where the ranks meet.

    Raises:
        ConfigurationError: a variable is not set, or the port is none.
    """
    host, text = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host:
        raise ConfigurationError("MASTER_ADDR", "is not set", "Name the node of rank 0")
    port = int(text) if text.isascii() and text.isdecimal() else 0
    if not 0 < port < 1 << 16:
        raise ConfigurationError(
            "MASTER_PORT", f"{text!r} is no port", "Give a free port of rank 0"
        )
    return host, port
