"""Printing what `doctor` found."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retro_mcore.stages.doctor import Diagnosis

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
#: A file or a pipe has no width to keep to.
_UNLIMITED = 10_000


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print a row per finding, the most serious last, and a line that sums up."""
    several = diagnosis.world_size > 1
    table = Table(title="doctor", title_justify="left", title_style="bold", show_header=False)
    for _ in range(5 if several else 4):
        table.add_column(overflow="fold")
    for finding, ranks in diagnosis.findings:
        found = f"{finding.found}. {finding.fix}" if finding.fix else finding.found
        where = [show_ranks(ranks)] if several else []
        level = Text(finding.level, style=_STYLES[finding.level])
        table.add_row(level, finding.area, finding.subject, *where, found)
    width = None if sys.stdout.isatty() else _UNLIMITED
    console = Console(width=width, markup=False, emoji=False)  # [gpu] is an extra
    console.print(table)
    levels = [finding.level for finding, _ in diagnosis.findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    console.print(f"{errors} errors, {warnings} warnings")


def show_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-3, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    told = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {told}"
