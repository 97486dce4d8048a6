"""Causal attention on the CPU: in two halves ÷ by PyTorch's causal kernel, by length.

    python -m benchmarks.causal_halves
    python -m benchmarks.causal_halves --threads 2 --heads 8

Forward and backward in fp32, in turns. Where the ratio is below 1, SDPAttention takes halves.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.platform.attention import attend, attend_in_halves


@dataclass
class Options:
    """Measure causal attention in two halves beside PyTorch's causal kernel."""

    length: list[int] = field(
        default_factory=lambda: [256, 320, 384, 448, 512, 576, 640, 704, 1024]
    )
    """Sequence lengths, in tokens."""

    batch: int = 2
    """Samples."""

    heads: int = 4
    """Attention heads, of 64 channels."""

    rounds: int = 15
    """Timed pairs, of which the median ratio counts; two more go before them."""

    threads: int = 1
    """Of PyTorch."""


def measure(options: Options) -> dict[int, float]:
    """The ratio by length; prints a table."""
    torch.set_num_threads(options.threads)
    ratios = {length: _ratio(length, options) for length in options.length}
    rows: dict[str, object] = {f"S {length}": f"{ratio:.2f}" for length, ratio in ratios.items()}
    print_summary("halves ÷ causal kernel", rows)
    return ratios


def _ratio(length: int, options: Options) -> float:
    shape = (length, options.batch, options.heads, 64)
    inputs: Any = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape)

    def seconds(function: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        function().backward(gradient)
        return time.perf_counter() - start

    pairs = [
        (
            seconds(lambda: attend_in_halves(attend, *inputs)),
            seconds(lambda: attend(*inputs, is_causal=True)),
        )
        for _ in range(options.rounds + 2)
    ]
    return statistics.median(halves / whole for halves, whole in pairs[2:])


def main() -> int:
    """The command line."""
    return run_command(Options, measure)


if __name__ == "__main__":
    sys.exit(main())
