"""What a section finds: figures, checks, aims, and parts that were skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


class Skipped(Exception):
    """The needs of a section are missing; the message is the reason."""


@dataclass
class Check:
    """A comparison with a bound.

    Attributes:
        name: What is compared.
        found: The value.
        bound: The bound, as text.
        passed: Whether the value meets it.
        decisive: Whether a miss fails the section; an aim of speed does not.
    """

    name: str
    found: Any
    bound: str
    passed: bool
    decisive: bool = True


@dataclass
class Findings:
    """Findings of one section, in the order they were made."""

    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def figure(self, name: str, value: Any) -> None:
        """Record a measurement or a fact."""
        self.figures[name] = value

    def at_most(self, name: str, found: float, bound: float) -> None:
        """Check that a value does not exceed a bound. NaN exceeds every bound."""
        self.checks.append(Check(name, found, f"<= {bound:g}", found <= bound))

    def equal(self, name: str, found: Any, expected: Any) -> None:
        """Check that a value is the expected one."""
        self.checks.append(Check(name, found, f"== {expected}", found == expected))

    def true(self, name: str, passed: bool, found: Any) -> None:
        """Check a condition; `found` is what it was about."""
        self.checks.append(Check(name, found, "holds", bool(passed)))

    def aim(
        self, name: str, found: float, at_most: float | None = None, at_least: float = 0.0
    ) -> None:
        """Compare a speed with its aim. A miss is shown, and does not fail the section."""
        passed = found >= at_least if at_most is None else found <= at_most
        bound = f">= {at_least:g}" if at_most is None else f"<= {at_most:g}"
        self.checks.append(Check(name, found, f"aim {bound}", passed, decisive=False))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a section that may be skipped alone."""
        try:
            yield
        except Skipped as reason:
            self.skipped[name] = str(reason)

    @property
    def status(self) -> str:
        """passed, failed or skipped."""
        if any(check.decisive and not check.passed for check in self.checks):
            return "failed"
        return "passed" if self.checks or self.figures else "skipped"

    def as_json(self) -> dict[str, Any]:
        """Findings as plain data."""
        return {**asdict(self), "status": self.status}
