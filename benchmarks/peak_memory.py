"""The most memory that tensors take during a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object]) -> int:
    """Bytes of tensors on the CPU beyond those before the step, at the highest point of it.

    The process's own memory shows the heap's fragmentation more than the model's need.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    in_order = sorted(changes, key=lambda change: change[0])
    return max(itertools.accumulate(size for _, size in in_order))
