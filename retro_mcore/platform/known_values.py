"""Values of fake tensors, where they follow from what is known: whole numbers and truth values.

A value is computed when it is asked for. Until then only the operations are remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

_ATTRIBUTE = "_retro_known_value"
#: Larger values are computed again, and not kept.
_KEPT_NUMEL = 2**16


class _Value:
    """A value that is computed when it is needed."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._value: Tensor | None = None

    def get(self) -> Tensor:
        if self._value is not None:
            return self._value
        with unset_fake_temporarily():
            value = self._compute()
        if value.numel() <= _KEPT_NUMEL:
            self._value = value
        return value


def set_value(tensor: Tensor, compute: Callable[[], Tensor]) -> None:
    """Know a fake tensor's value from now on, until it is written to.

    Args:
        tensor: The fake tensor.
        compute: Returns a real tensor of its shape, on the CPU.
    """
    setattr(tensor, _ATTRIBUTE, (_Value(compute), tensor._version))


def value_of(tensor: Tensor) -> Callable[[], Tensor] | None:
    """Computes the value, on the CPU; None if it is not known."""
    known = _known(tensor)
    return None if known is None else known.get


def sum_of(tensor: Tensor) -> int | None:
    """The sum of the value; None if it is not known."""
    known = _known(tensor)
    if known is None:
        return None
    with unset_fake_temporarily():
        return int(known.get().sum())


def forget_value(tensor: Tensor) -> None:
    """Stop knowing the value of a tensor that was written to without an operation of its own."""
    if hasattr(tensor, _ATTRIBUTE):
        delattr(tensor, _ATTRIBUTE)


def pass_on(func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
    """Remember how an operation's results follow from values that are known.

    Args:
        func: The operation, which was run on fake tensors.
        args, kwargs: What it was run with.
        result: What it returned.
    """
    results = tree_leaves(result)
    numbers = [place for place, each in enumerate(results) if _is_exact(each)]
    if not numbers or func._schema.is_mutable or "empty" in func._opname:
        return
    if torch.Tag.nondeterministic_seeded in func.tags:
        for place in numbers:  # one draw is as good as another
            shape, dtype = results[place].shape, results[place].dtype
            set_value(results[place], partial(torch.ones, shape, dtype=dtype))
        return
    if func._opname.startswith("lift_fresh"):  # of torch.tensor's real numbers
        set_value(results[0], lambda: args[0])
        return
    known = {id(each): _known(each) for each in tree_leaves((args, kwargs)) if _is_tensor(each)}
    if None in known.values():
        return
    given = tree_map(lambda each: known[id(each)] if _is_tensor(each) else each, (args, kwargs))

    def compute(place: int) -> Tensor:
        real_args, real_kwargs = tree_map(_real, given)
        return tree_leaves(func(*real_args, **real_kwargs))[place]

    for place in numbers:
        set_value(results[place], partial(compute, place))


def _known(tensor: Tensor) -> _Value | None:
    value, version = getattr(tensor, _ATTRIBUTE, (None, None))
    return value if version == tensor._version else None


def _is_tensor(each: Any) -> bool:
    return isinstance(each, Tensor)


def _is_exact(result: Any) -> bool:
    is_fake = isinstance(result, FakeTensor)
    return is_fake and not result.dtype.is_floating_point and not result.dtype.is_complex


def _real(each: Any) -> Any:
    if isinstance(each, _Value):
        return each.get()
    return torch.device("cpu") if isinstance(each, torch.device) else each
