"""`doctor`: whether a node, or all ranks of a job, are ready for a long run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.cli.command import run_command
from retro_mcore.cli.tables.doctor import print_diagnosis
from retro_mcore.evaluation.results import require_writable
from retro_mcore.project.atomic import write_json
from retro_mcore.stages.doctor import Diagnosis, DoctorConfig, run
from retro_mcore.stages.doctor.checkup import Outcome


@dataclass
class DoctorOptions(DoctorConfig):
    """Check a node before a long run: versions, GPUs, network, file systems, settings.

    Under torchrun, all ranks check themselves and each other. Exit code 0: nothing to fix; 1:
    warnings; 2: errors.
    """

    json: str | None = None
    """File to write the findings to."""


def doctor(options: DoctorOptions) -> Outcome:
    """Check, print what was found and how to fix it, and write it if a file is named.

    A process that hangs in a collective is ended here, with the exit code.

    Raises:
        ConfigurationError: a flag's value is invalid, or rank 0 cannot be reached.
    """
    if options.json is not None:
        require_writable(Path(options.json), "--json")
    outcome = run(options, lambda diagnosis: _render(diagnosis, options.json))
    if outcome.hangs:
        sys.stdout.flush()
        os._exit(outcome.exit_code)
    return outcome


def _render(diagnosis: Diagnosis, path: str | None) -> None:
    print_diagnosis(diagnosis)
    if path is not None:
        write_json(path, diagnosis.as_json())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(DoctorOptions, doctor, argv)


if __name__ == "__main__":
    sys.exit(main())
