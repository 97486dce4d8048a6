"""Warnings of other libraries that tell a user nothing; commands do not show them.

Only texts that have been seen and understood are listed, each from the module that warns. Advice
about GPU packages on the CPU is left out by `platform.cpu`.
"""

from __future__ import annotations

import warnings

#: Patterns of the message's beginning, category, and pattern of the warning module.
WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    # Megatron's optimizer looks for gradients on views of its buffers, which have none of their
    # own, and handles that.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning, r"megatron\.core\."),
    # torch has renamed collectives that Megatron calls by their former names. They still work.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\."),
)


def ignore_unwanted() -> None:
    """Filter the warnings above, in this process, from now on."""
    for message, category, module in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
