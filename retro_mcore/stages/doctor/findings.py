"""What the checks find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "error"]
#: Levels from harmless to serious.
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """A result of one check.

    Attributes:
        area: What was checked: software, device, host, settings, network, clock, files or project.
        level: "ok"; "note": worth knowing; "warning": the run may be slow or fail; "error": it will
            fail.
        subject: The package, variable, file or rank.
        found: What was found.
        fix: What to do about it; empty for "ok" and "note".
    """

    area: str
    level: Level
    subject: str
    found: str
    fix: str = ""


def ok(area: str, subject: str, found: str) -> Finding:
    """A check that passed."""
    return Finding(area, "ok", subject, found)


def note(area: str, subject: str, found: str) -> Finding:
    """Something worth knowing."""
    return Finding(area, "note", subject, found)


def warning(area: str, subject: str, found: str, fix: str) -> Finding:
    """Something that may make a run slow, or fail."""
    return Finding(area, "warning", subject, found, fix)


def error(area: str, subject: str, found: str, fix: str) -> Finding:
    """Something that makes a run fail."""
    return Finding(area, "error", subject, found, fix)


@dataclass(frozen=True)
class Diagnosis:
    """The findings of all ranks.

    Attributes:
        findings: Each with the ranks that made it, the most serious last.
        world_size: Number of ranks that there should be.
    """

    findings: Sequence[tuple[Finding, tuple[int, ...]]]
    world_size: int

    @classmethod
    def of(cls, by_rank: Mapping[int, Sequence[Finding]], world_size: int) -> Diagnosis:
        """Join equal findings of several ranks."""
        ranks: dict[Finding, list[int]] = {}
        for rank, findings in sorted(by_rank.items()):
            for finding in findings:
                ranks.setdefault(finding, []).append(rank)
        ordered = sorted(ranks.items(), key=lambda item: LEVELS.index(item[0].level))
        return cls([(finding, tuple(where)) for finding, where in ordered], world_size)

    @property
    def exit_code(self) -> int:
        """0: nothing to fix; 1: warnings; 2: errors."""
        levels = {finding.level for finding, _ in self.findings}
        return 2 if "error" in levels else int("warning" in levels)

    def as_json(self) -> dict[str, Any]:
        """The diagnosis as plain data."""
        found = [{**asdict(finding), "ranks": list(ranks)} for finding, ranks in self.findings]
        return {"world_size": self.world_size, "exit_code": self.exit_code, "findings": found}
