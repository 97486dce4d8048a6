"""The report as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_report.sections import SECTIONS


def markdown(machine: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: facts of the machine, one row per section, then figures and checks."""
    lines = ["# GPU report", ""]
    lines += [f"- {name}: {_shown(value)}" for name, value in machine.items()]
    lines += ["", "| section | result | seconds | checks | skipped |", "|---|---|---|---|---|"]
    lines += [_row(name, result) for name, result in results.items()]
    for name, result in results.items():
        lines += _details(name, result)
    return "\n".join(lines) + "\n"


def _row(name: str, result: Mapping[str, Any]) -> str:
    checks = result.get("checks", [])
    passed = sum(check["passed"] for check in checks)
    missed = [check["name"] for check in checks if not check["passed"] and not check["decisive"]]
    counted = f"{passed} of {len(checks)}" if checks else ""
    counted += f"; aims missed: {', '.join(missed)}" if missed else ""
    skipped = "; ".join(f"{part}: {why}" for part, why in result.get("skipped", {}).items())
    error = result.get("error")
    status = f"failed: {_cell(error)}" if error else result["status"]
    return f"| {name} | {status} | {result['seconds']:.0f} | {counted} | {_cell(skipped)} |"


def _details(name: str, result: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {_cell(check['name'])} | {_cell(_shown(check['found']))} | {_cell(check['bound'])} "
        f"| {'yes' if check['passed'] else 'NO'} |"
        for check in result.get("checks", [])
    ]
    rows += [
        f"| {_cell(figure)} | {_cell(_shown(value))} | | |"
        for figure, value in result.get("figures", {}).items()
    ]
    if not rows:
        return []
    title = SECTIONS[name].title if name in SECTIONS else name
    return ["", f"## {title}", "", "| | found | bound | met |", "|---|---|---|---|", *rows]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
