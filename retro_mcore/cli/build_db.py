"""`build_db`: the chunk database of a project."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.cli.project_options import ProjectOptions
from retro_mcore.stages.build_db import STAGE, BuildDbConfig, BuildDbReport, run


@dataclass
class BuildDbOptions(BuildDbConfig, ProjectOptions):
    """Cut the training documents into the chunks that are retrieved from."""

    project_dir: str
    """Project directory, made by preprocess_corpus."""


def build_db(options: BuildDbOptions) -> BuildDbReport:
    """Run the stage and print its summary; see `retro_mcore.stages.build_db.run`."""
    report = run(options.project_dir, options)
    print_report(report)
    return report


def print_report(report: BuildDbReport) -> None:
    """Print the summary of a run."""
    reused = " (reused)" if report.merged_reused else ""
    rows = {
        "files of chunks": "; ".join(str(shards) for shards in report.shards),
        "retrieval database": f"{report.num_train_chunks} chunks of training documents{reused}",
        "held-out chunks": report.num_held_out_chunks,
        "chunks without words": f"{report.num_invalid_chunks} (left out)",
    }
    print_summary(STAGE, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(BuildDbOptions, build_db, argv)


if __name__ == "__main__":
    sys.exit(main())
