"""Flags of checkpoints on the nodes' own disks, with Megatron's names and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.model.option_traits import at_least, needs

_KIND = "non_persistent_ckpt_type"
_PACKAGE = "nvidia_resiliency_ext"
_OTHERS = {
    "global": (
        "but what it adds is a second --save-interval for the same kind of checkpoint",
        "Use --async-save with a smaller --save-interval and --keep-last-n",
    ),
    "in_memory": ("which Megatron-LM names and does not have", "Use local, in a RAM disk"),
}


@dataclass(kw_only=True)
class LocalCheckpointOptions:
    """Checkpoints between those of --save, on the disks of the nodes."""

    non_persistent_ckpt_type: Literal["global", "local", "in_memory"] | None = field(
        default=None, metadata=needs("save")
    )
    """local: also save on each node's disk what its ranks hold, and resume from there if that is
    newer than the checkpoint in --load. Needs the package nvidia-resiliency-ext. The other types
    are not supported."""
    non_persistent_save_interval: int | None = field(
        default=None, metadata=at_least(1) | needs(_KIND)
    )
    """Iterations between local checkpoints."""
    non_persistent_local_ckpt_dir: str | None = field(default=None, metadata=needs(_KIND))
    """Directory on each node's disk (or RAM disk) for local checkpoints. One is kept for a run."""
    non_persistent_local_ckpt_algo: Literal["fully_parallel", "atomic"] = "fully_parallel"
    """fully_parallel: ranks that hold the same divide it among them. atomic: each saves all that it
    holds, so that resuming needs no exchange."""
    replication: bool = field(default=False, metadata=needs(_KIND))
    """Also keep copies of a rank's local checkpoint with other ranks, so that a node may be
    lost."""
    replication_jump: int | None = field(default=None, metadata=at_least(1) | needs(_KIND))
    """Distance between ranks that keep copies of one another; the number of ranks per node keeps
    them on different nodes."""
    replication_factor: int = field(default=2, metadata=at_least(2))
    """Number of ranks that keep the same local checkpoints."""

    def refused_local_checkpoints(self) -> Iterator[ConfigurationError]:
        """A problem for each of these options that cannot be honored."""
        kind = self.non_persistent_ckpt_type
        if kind is None:
            if self.non_persistent_local_ckpt_algo != "fully_parallel":
                yield _useless("non_persistent_local_ckpt_algo", _KIND)
        elif kind != "local":
            reason, hint = _OTHERS[kind]
            yield ConfigurationError(flag_of(_KIND), f"{kind}, {reason}", hint)
        else:
            yield from self._incomplete()
        if not self.replication and self.replication_factor != 2:
            yield _useless("replication_factor", "replication")
        if not self.replication and self.replication_jump is not None:
            yield _useless("replication_jump", "replication")

    def _incomplete(self) -> Iterator[ConfigurationError]:
        for name in ("non_persistent_save_interval", "non_persistent_local_ckpt_dir"):
            if getattr(self, name) is None:
                yield ConfigurationError(
                    flag_of(_KIND), f"local without {flag_of(name)}", f"Add {flag_of(name)}"
                )
        if self.replication and self.replication_jump is None:
            yield ConfigurationError(
                "--replication",
                "given without --replication-jump",
                "Add --replication-jump with the number of ranks per node",
            )
        if find_spec(_PACKAGE) is None:
            yield ConfigurationError(
                flag_of(_KIND),
                "local, but the package nvidia-resiliency-ext is missing",
                "pip install 'nvidia-resiliency-ext>=0.4.1,<0.5' (megatron-core 0.16; from 0.17 on "
                "megatron-core needs 0.6 or later, from github.com/NVIDIA/nvidia-resiliency-ext)",
            )


def _useless(name: str, needed: str) -> ConfigurationError:
    return ConfigurationError(
        flag_of(name), f"given without {flag_of(needed)}", f"Add {flag_of(needed)}"
    )
