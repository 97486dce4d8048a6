"""Loading megatron's torch_dist checkpoints without unpickling their objects unguarded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import default_planner


def load_sharded_state(
    request: dict[str, Any], checkpoint: Path, load_object: Callable[[IO[bytes]], Any]
) -> dict[str, Any]:
    """Fill megatron's sharded state from a checkpoint.

    Megatron unpickles the checkpoint's `.metadata` and `common.pt` itself: check them first.

    Args:
        request: Megatron's sharded tensors and objects; must all be in the checkpoint.
        checkpoint: Its directory.
        load_object: Unpickles one object from its bytes.
    """
    with warnings.catch_warnings(), _unpickling_with(load_object):
        warnings.simplefilter("ignore", FutureWarning)  # megatron's use of torch
        return dist_checkpointing.load(request, str(checkpoint), strict="raise_unexpected")


@contextmanager
def _unpickling_with(load_object: Callable[[IO[bytes]], Any]) -> Iterator[None]:
    """Replace how torch's planner, from which megatron's derives, unpickles objects.

    It calls `torch.load(…, weights_only=False)` and has no argument for it. Torch reads tensors
    with weights_only=True anyway.
    """
    planner: Any = default_planner.DefaultLoadPlanner
    previous = planner.load_bytes

    def load_bytes(self: Any, read_item: Any, value: IO[bytes]) -> None:
        name, content = read_item.dest_index.fqn, load_object(value)
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[name], content)
        else:
            self.state_dict[name] = content

    planner.load_bytes = load_bytes
    try:
        yield
    finally:
        planner.load_bytes = previous
