"""`update_db`: more documents to retrieve from, or another database, for the same samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from retro_mcore.cli import build_db, build_index, query_neighbors
from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.cli.project_options import ProjectOptions
from retro_mcore.data.corpus.counts import loss_rows
from retro_mcore.stages.build_db import BuildDbReport
from retro_mcore.stages.build_index import BuildIndexReport
from retro_mcore.stages.update_db import STAGE, StageReport, UpdateDbConfig, UpdateDbReport, run


@dataclass
class UpdateDbOptions(UpdateDbConfig, ProjectOptions):
    """Retrieve from more documents, or from another project's, without touching the model.

    The neighbors of every sample are searched again. The old ones stay in use until the new ones
    are complete, and on the disk after that. Rerun the command if it is interrupted.
    """

    project_dir: str
    """Project directory, after query_neighbors."""


def update_db(options: UpdateDbOptions) -> UpdateDbReport:
    """Run the stage and print summaries; see `retro_mcore.stages.update_db.run`."""
    report = run(options.project_dir, options, on_stage=print_stage)
    print_report(report)
    return report


def print_stage(report: StageReport) -> None:
    """Print the summary of a stage that has finished."""
    if isinstance(report, BuildDbReport):
        build_db.print_report(report)
    elif isinstance(report, BuildIndexReport):
        build_index.print_report(report)
    else:
        query_neighbors.print_report(report)


def print_report(report: UpdateDbReport) -> None:
    """Print the summary of the whole run."""
    rows = {
        "retrieved from": f"{report.num_chunks} chunks, {report.num_before} before",
        "database": report.project,
        **loss_rows(report.report),
        "samples": "as they were; a model trained on them goes on",
    }
    print_summary(STAGE, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(UpdateDbOptions, update_db, argv)


if __name__ == "__main__":
    sys.exit(main())
