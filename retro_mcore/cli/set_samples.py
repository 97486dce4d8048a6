"""`set_samples`: other samples of a project's documents, without a new search."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.cli.project_options import ProjectOptions
from retro_mcore.stages.set_samples import STAGE, SetSamplesConfig, SetSamplesReport, run


@dataclass
class SetSamplesOptions(SetSamplesConfig, ProjectOptions):
    """Change the length, number, order or batch size of a project's samples.

    Neighbors stay valid in an aligned project. A packed one is refused after query_neighbors.
    """

    project_dir: str
    """Project directory, after preprocess_corpus."""


def set_samples(options: SetSamplesOptions) -> SetSamplesReport:
    """Run the stage and print its summary; see `retro_mcore.stages.set_samples.run`."""
    report = run(options.project_dir, options)
    print_report(report)
    return report


def print_report(report: SetSamplesReport) -> None:
    """Print the summary of a run."""
    rows: dict[str, object] = {
        key: f"{before} before, now {after}" for key, (before, after) in report.changed.items()
    }
    rows["changed"] = f"{len(report.changed)} settings of the samples"
    rows["samples"] = ", ".join(split.samples_text for split in report.passes)
    warnings = {split.name: split.warning for split in report.passes if split.warning}
    rows |= {f"warning, {name}": text for name, text in warnings.items()}
    rows["chunks per sample"] = report.config.chunks_per_sample
    print_summary(STAGE, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(SetSamplesOptions, set_samples, argv)


if __name__ == "__main__":
    sys.exit(main())
