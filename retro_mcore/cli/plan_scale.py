"""`plan_scale`: chunks, disk, memory and hours of a database that is not built yet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from retro_mcore.cli.command import run_command
from retro_mcore.cli.tables.scale import print_plan
from retro_mcore.evaluation.results import require_writable
from retro_mcore.project.atomic import write_json
from retro_mcore.retrieval.scale import ScalePlan
from retro_mcore.stages.plan_scale import PlanScaleConfig, run


@dataclass
class PlanScaleOptions(PlanScaleConfig):
    """Plan a database: chunks, disk, memory, index, hours and ranks of every stage.

    Rates are published ones unless given or measured; docs/scaling.md names the sources.
    """

    json: str | None = None
    """File to write the plan to."""


def plan_scale(options: PlanScaleOptions) -> ScalePlan:
    """Print the plan, and write it if a file is named.

    Raises:
        ConfigurationError: a number is out of range.
        ProjectError: the project has no database to measure with.
    """
    if options.json is not None:
        require_writable(Path(options.json), "--json")
    planned = run(options)
    plan, work, rates, node = planned.plan, planned.workload, planned.rates, planned.node
    print_plan(plan, work, rates, node)
    if options.json is not None:
        parts = {"workload": asdict(work), "rates": asdict(rates), "node": asdict(node)}
        write_json(options.json, {**parts, "plan": {**asdict(plan), "disk": plan.disk}})
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PlanScaleOptions, plan_scale, argv)


if __name__ == "__main__":
    sys.exit(main())
