"""Activations of the first layers wait for the backward pass in the CPU's memory.

Megatron's block enters a context around each layer, which is Transformer Engine's where that is
installed. This one needs plain torch only, and it also moves what the neighbor encoder saves inside
a layer. Copies are not overlapped with computing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

#: A tensor's device and shape, and its copy.
Moved = tuple[torch.device, torch.Size, Tensor]


class ActivationOffloading:
    """Context for Megatron's `TransformerBlock.offload_context`: entered once for each layer.

    Args:
        num_layers: Number of layers, from the first, whose saved tensors are moved.

    Attributes:
        moved_bytes: Bytes moved since the forward pass began.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.moved_bytes = 0
        self._layer = 0
        self._hooks = saved_tensors_hooks(self._move, _move_back)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Context around a forward pass through the block; layers are counted from its start."""
        self._layer = self.moved_bytes = 0
        yield

    def __enter__(self) -> None:
        self._layer += 1
        if self._layer <= self.num_layers:
            self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._layer <= self.num_layers:
            self._hooks.__exit__(*error)

    def _move(self, tensor: Tensor) -> Tensor | Moved:
        if _is_weight(tensor):
            return tensor
        once = _without_repetition(tensor)
        self.moved_bytes += once.nbytes
        copy = torch.empty_like(once, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, tensor.shape, copy.copy_(once)


def _move_back(kept: Tensor | Moved) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, shape, copy = kept
    return copy.to(device, non_blocking=True).expand(shape)


def _without_repetition(tensor: Tensor) -> Tensor:
    """The tensor with one entry along expanded dimensions, as masks of attention have them."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _is_weight(tensor: Tensor) -> bool:
    """Whether the tensor is a weight or a view of one; weights stay where they are."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
