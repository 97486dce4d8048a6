"""Ranks that keep the others waiting while their process lives: told by name, or ended.

In a stage of the data pipeline one rank may rightly work for hours, so that others wait is no
fault, and is told only. That a process does nothing at all is one: it computes nothing, moves no
bytes and counts no steps, as where a network file system is dead or a lock is never released. See
docs/decisions/0032-a-watch-over-ranks.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from retro_mcore.fault_report import places
from retro_mcore.rank_state import RUNS, RankState

#: Seconds between two looks at all ranks, and of waiting after which the late are named.
LOOK, LATE = 60.0, 600.0


class LateRanks:
    """What a rank tells about those that keep others waiting; one rank at a time looks at all.

    Args:
        stall_minutes: After so many minutes a rank that does nothing is a fault; 0: never.
    """

    def __init__(self, stall_minutes: float) -> None:
        self._stall = 60 * stall_minutes
        self.pause = min(LOOK, self._stall / 4) if stall_minutes else LOOK
        self._late = min(LATE, self._stall) if stall_minutes else LATE
        self._next, self._slept = self._late, 0.0

    def is_due(self, elapsed: float) -> bool:
        """Whether to look at all ranks now.

        Args:
            elapsed: Seconds since the last question.
        """
        self._slept += elapsed
        if self._slept < self.pause:
            return False
        self._slept = 0.0
        return True

    def stalled(self, states: Sequence[RankState]) -> list[str]:
        """What to say of ranks that do nothing for longer than they may."""
        return [
            (
                f"{state.name} has done nothing for {state.idle:.0f} s: it computed nothing, "
                f"moved no bytes and counted no steps in {state.doing}. A dead network file "
                "system? --stall-timeout-minutes sets the limit, 0 none"
            )
            for state in states
            if self._stall and state.idle >= self._stall and _works(state)
        ]

    def warnings(self, states: Sequence[RankState]) -> list[str]:
        """What to say now: after ten minutes of waiting, then after twice the time each."""
        waits = [state.unchanged for state in states if state.status == RUNS and state.waits]
        late = [state for state in states if _works(state)]
        longest = max(waits, default=0.0)
        if longest < self._late:
            self._next = self._late
            return []
        if longest < self._next:
            return []
        lines = [
            f"{state.name} keeps {len(waits)} of {len(states)} ranks waiting, for up to "
            f"{longest:.0f} s, and may well be at work: it counted its last step "
            f"{state.stepped:.0f} s ago, and for {state.unchanged:.0f} s it has been in "
            f"{state.doing}"
            for state in late[:8]
        ] or self._all_wait(states, waits)
        while lines and self._next <= longest:
            self._next *= 2
        return lines

    def _all_wait(self, states: Sequence[RankState], waits: Sequence[float]) -> list[str]:
        if min(waits) < self._late:  # the last has just come
            return []
        return [f"all ranks wait for one another, {min(waits):.0f} s or longer", *places(states)]


def _works(state: RankState) -> bool:
    return state.status == RUNS and not state.waits
