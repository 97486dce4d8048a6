"""Texts about ranks that are gone: what a failed collective tells, and where all ranks are."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from retro_mcore.rank_state import RUNS, RankState

#: How gloo's errors begin or name themselves. NCCL's have a type of their own.
_GLOO = re.compile(r"gloo/\S+\.(cc|h):\d+|\bGloo connectFullMesh failed")
_TIMED_OUT = re.compile(r"timed out|timeout", re.I)


def lost_contact(error: BaseException) -> str | None:
    """The message of a collective that failed because of another rank; None for other errors."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        known = isinstance(current, dist.DistBackendError)
        if known or (isinstance(current, RuntimeError) and _GLOO.search(str(current))):
            return str(current)
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
    return None


def places(states: Sequence[RankState]) -> Iterator[str]:
    """Where the ranks are, those in one place together."""
    together: dict[str, list[int]] = {}
    for state in states:
        if state.status == RUNS:
            where = f"{'waiting' if state.waits else 'working'} in {state.doing}"
            together.setdefault(where, []).append(state.rank)
    for where, ranks in sorted(together.items(), key=lambda item: len(item[1]))[:8]:
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        yield f"{where}: rank {', '.join(map(str, ranks[:8]))}{more}"


def stacks() -> str:
    """The stacks of all threads but this one's, the main thread last."""
    frames = {
        thread.ident: thread.name
        for thread in threading.enumerate()
        if thread is not threading.current_thread() or thread is threading.main_thread()
    }
    main = threading.main_thread().ident
    current = sys._current_frames()
    order = sorted((ident for ident in frames if ident in current), key=lambda each: each == main)
    return "\n".join(
        f"thread {frames[ident]}:\n{''.join(traceback.format_stack(current[ident]))}"
        for ident in order
    )


def timed_out(message: str) -> bool:
    """Whether a collective's error says that others did not come in time."""
    return bool(_TIMED_OUT.search(message))
