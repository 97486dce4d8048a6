"""What a process's tensors take and what its collectives send, seen at PyTorch's dispatcher.

It sees real tensors and fake ones alike, so a simulated step is measured as a real one is. Memory
that an operation takes and frees inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

#: Kinds of memory. Activations are what a forward pass leaves for its backward pass; temporary is
#: everything else that no weight, gradient or optimizer holds.
KINDS = ("weights", "gradients", "optimizer", "activations", "temporary")

#: Megatron's descriptions of its groups begin with these.
_GROUPS = {
    "TENSOR_AND_": "tp",
    "TENSOR_MODEL": "tp",
    "PIPELINE": "pp",
    "CONTEXT": "cp",
    "HIERARCHICAL_CONTEXT": "cp",
    "EXPERT_TENSOR": "ep",
    "EXPERT_MODEL": "ep",
    "EXPERT_DATA": "dp",
    "DATA_PARALLEL": "dp",
    "INTRA_": "dp",
    "INTER_": "dp",
    "EMBEDDING": "embedding",
    "POSITION_EMBEDDING": "embedding",
}


class Tracker(TorchDispatchMode):
    """A mode that counts bytes of tensors and of collectives.

    Enter it before the first tensor is made: it takes every storage that it has not seen for new.

    Attributes:
        sent: Bytes that this rank has sent, by group: "tp", "pp", "cp", "dp", "ep", "embedding" or
            "all". Of ring algorithms: 2 (n - 1) / n of the tensor for an all-reduce, (n - 1) / n of
            the whole for a gather, a scatter, a broadcast or an exchange of all with all.
        flops: FLOPs of matrix products, those of recomputation included; causal attention is
            counted in full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.sent: Counter[str] = Counter()
        self._live: dict[int, tuple[int, weakref.ref]] = {}
        self._sizes: dict[int, int] = {}
        self._changes: list[tuple[int, int]] = []
        self._kept: set[int] = set()
        self._next = 0
        self._resize: Any = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count what it makes and sends."""
        if func.namespace == "c10d":
            self._count_sent(func, args)
        kwargs = kwargs or {}
        result = self.run(func, args, kwargs)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def run(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; a simulation answers some of them itself."""
        return func(*args, **kwargs)

    def write(self, tensor: Tensor, compute: Callable[[], Tensor]) -> None:
        """Give a tensor another value; a simulation computes it only if it is asked for.

        Args:
            tensor: The tensor.
            compute: Returns its value, on the CPU.
        """
        with torch.no_grad():
            tensor.copy_(compute())

    def __enter__(self) -> Tracker:
        # Modules free a storage without an operation: Megatron's recomputation of norms.
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._live:
                self._change(self._live[storage._cdata][0], size)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore
        super().__exit__(*error)

    def keep_activations(self) -> None:
        """Take what is in memory now for kept: a forward pass has just ended."""
        self._kept.update(number for number, _ in self._live.values())

    def start(self) -> None:
        """Begin a step: forget changes of memory, bytes sent and FLOPs before it."""
        self._changes = [(number, self._sizes[number]) for number, _ in self._live.values()]
        self._kept.clear()
        self.sent.clear()
        self.flops = 0

    def peak(self, held: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
        """Bytes in memory by kind, when they were most since `start`.

        Args:
            held: Tensors that last, by kind, as they are after the step; of several kinds of a
                tensor, the last one counts.
        """
        kinds = dict.fromkeys(self._kept, "activations")
        for kind, tensors in held.items():
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage._cdata in self._live:
                    kinds[self._live[storage._cdata][0]] = kind
        current, most = Counter[str](), Counter[str]()
        total = highest = 0
        for number, change in self._changes:
            current[kinds.get(number, "temporary")] += change
            total += change
            if total > highest:
                highest, most = total, current.copy()
        return {kind: most[kind] for kind in KINDS}

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        number, self._next = self._next, self._next + 1
        self._live[key] = number, weakref.ref(storage, lambda _: self._forget(key, number))
        self._sizes[number] = 0
        self._change(number, storage.nbytes())

    def _change(self, number: int, size: int) -> None:
        change = size - self._sizes[number]
        if change:
            self._sizes[number] = size
            self._changes.append((number, change))

    def _forget(self, key: int, number: int) -> None:
        del self._live[key]
        self._change(number, 0)
        del self._sizes[number]

    def _count_sent(self, func: Any, args: tuple) -> None:
        count = _SENT.get(func._opname)
        if count is None:
            return
        group = _group_of(func, args)
        kind = "pp" if func._opname == "send" else group_kind(group)
        self.sent[kind] += round(count(args, group.size()))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


#: PyTorch's counts leave out its attention on the CPU.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def group_kind(group: Any) -> str:
    """What a process group is for: "tp", "pp", "cp", "dp", "ep", "embedding" or "all"."""
    for beginning, kind in _GROUPS.items():
        if group.group_desc.startswith(beginning):
            return kind
    return "all"


def _group_of(func: Any, args: tuple) -> Any:
    from torch.distributed import ProcessGroup

    names = [argument.name for argument in func._schema.arguments]
    return ProcessGroup.unbox(args[names.index("process_group")])


def _bytes(tensors: Any) -> int:
    return sum(each.nbytes for each in tree_leaves(tensors) if isinstance(each, Tensor))


def _whole(place: int, rounds: int = 1) -> Callable[[tuple, int], float]:
    return lambda args, ranks: rounds * _bytes(args[place]) * (ranks - 1) / ranks


#: Bytes that a rank sends, by operation: the largest argument is the whole.
_SENT: dict[str, Callable[[tuple, int], float]] = {
    "allreduce_": _whole(0, 2),
    "allreduce_coalesced_": _whole(0, 2),
    "broadcast_": _whole(0),
    "reduce_": _whole(0),
    "_allgather_base_": _whole(0),
    "allgather_": _whole(0),
    "allgather_into_tensor_coalesced_": _whole(0),
    "_reduce_scatter_base_": _whole(1),
    "reduce_scatter_": _whole(1),
    "reduce_scatter_tensor_coalesced_": _whole(1),
    "alltoall_base_": _whole(1),
    "alltoall_": _whole(1),
    "send": lambda args, ranks: _bytes(args[0]),
}


@contextmanager
def marking_forward_passes(tracker: Tracker, stages: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Context in which the end of each stage's forward pass marks activations as kept."""
    handles = [
        stage.register_forward_hook(lambda *_: tracker.keep_activations()) for stage in stages
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
