"""Warnings of other libraries that commands do not show."""

from __future__ import annotations

import warnings

import pytest

from retro_mcore.cli.quiet import ignore_unwanted

GRADIENT = "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed."
RENAMED = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another."


@pytest.mark.parametrize(
    ("message", "category", "module", "shown"),
    [
        (GRADIENT, UserWarning, "megatron.core.optimizer.optimizer", False),
        (GRADIENT, UserWarning, "retro_mcore.model.model", True),  # ours to know of
        (RENAMED, FutureWarning, "torch.distributed.c10d_logger", False),
        (RENAMED, FutureWarning, "somebody", True),
        ("gloo is slow here", UserWarning, "torch.distributed.c10d_logger", True),
    ],
)
def test_only_what_is_listed_is_left_out(message, category, module, shown):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ignore_unwanted()
        warnings.warn_explicit(message, category, "file.py", 1, module=module)
    assert bool(seen) == shown
