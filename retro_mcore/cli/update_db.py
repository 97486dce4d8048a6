"""`update_db`: more or fewer documents to retrieve from, or another database."""

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
from retro_mcore.stages.removal import RemovalReport
from retro_mcore.stages.update_db import STAGE, StageReport, UpdateDbConfig, UpdateDbReport, run


@dataclass
class UpdateDbOptions(UpdateDbConfig, ProjectOptions):
    """Retrieve from more or fewer documents, or from another project's, with the same model.

    The neighbors of the samples are searched again, after --remove only where they were removed.
    The old ones stay in use until the new ones are complete, and on the disk after that. Rerun the
    command if it is interrupted.
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
        "retrieved from": _chunks(report),
        "database": report.project,
        **loss_rows(report.report),
        **_removal_rows(report.removal),
        "samples": "as they were; a model trained on them goes on",
    }
    print_summary(STAGE, rows)


def _chunks(report: UpdateDbReport) -> str:
    given = f"{report.num_chunks - report.num_removed} chunks"
    if report.num_removed:
        given += f" ({report.num_removed} more are removed, and stay until --compact)"
    return f"{given}, {report.num_before} before"


def _removal_rows(removal: RemovalReport | None) -> dict[str, object]:
    if removal is None:
        return {}
    rows: dict[str, object] = {
        "removed": f"{removal.num_removed} documents, {removal.num_chunks} chunks"
    }
    if removal.num_before:
        rows["removed before"] = f"{removal.num_before} documents"
    if removal.num_held_out:
        rows["not in the database"] = f"{removal.num_held_out} documents, which are held out"
    rows["training data"] = (
        f"{removal.num_train_samples} of {removal.all_train_samples} training samples contain text "
        "of these documents, and keep it"
    )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(UpdateDbOptions, update_db, argv)


if __name__ == "__main__":
    sys.exit(main())
