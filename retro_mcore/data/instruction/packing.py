"""Pack examples of different lengths into samples of one length."""

from __future__ import annotations

from collections.abc import Iterable


def pack(
    sizes: Iterable[int], num_samples: int, room: int, step: int = 1, num_open: int = 1
) -> list[list[int]]:
    """Pack examples by best fit into the samples that are open.

    An example goes into the open sample in which it leaves the least room. If it fits into none, a
    new sample is opened, and the oldest of `num_open` is closed. Packing goes on until the last
    sample is closed, so samples do not depend on how many are wanted.

    Args:
        sizes: Number of tokens of each example, at most `room`, in the order of the data. As many
            are read as are needed to close the samples.
        num_samples: Number of samples.
        room: Number of tokens of a sample.
        step: Each example begins at a multiple of it.
        num_open: Number of samples that are open at the same time. 1 is next fit.

    Returns:
        The places in `sizes` of the examples of each sample.
    """
    samples: list[list[int]] = []
    used: list[int] = []
    for place, size in enumerate(sizes):
        opened = range(max(0, len(samples) - num_open), len(samples))
        fitting = [number for number in opened if used[number] + size <= room]
        if not fitting:
            if len(samples) == num_samples + num_open - 1:
                break
            fitting = [len(samples)]
            samples.append([])
            used.append(0)
        best = max(fitting, key=used.__getitem__)
        samples[best].append(place)
        used[best] += in_steps(size, step)
    return samples[:num_samples]


def in_steps(size: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `size`."""
    return -(-size // step) * step
