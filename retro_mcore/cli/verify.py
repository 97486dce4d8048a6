"""`verify`: whether a project's and a run's files are what was written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.checkpoint.verification import verify_run
from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.distributed import initialize, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.project.integrity import verifying
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.verification import verify_whole_project
from retro_mcore.retrieval.removed import verify_removed


@dataclass
class VerifyOptions:
    """Compare all files of a project, or of a run's checkpoints, with their checksums.

    Damaged files are named, and the exit code is 2. Under torchrun the processes share the files.
    """

    project_dir: str | None = None
    """The project directory; its updates are part of it."""
    load: str | None = None
    """Directory of a run: all of its checkpoints."""


@dataclass(frozen=True)
class Verified:
    """Files that were compared, and were whole.

    Attributes:
        num_files: Number of the project's files that have a completion marker.
        checkpoints: Names of the checkpoints that have checksums.
        without_checksums: Names of those that have none: older ones, or Megatron's own.
    """

    num_files: int
    checkpoints: list[str]
    without_checksums: list[str]


def verify(options: VerifyOptions) -> Verified:
    """Compare, and print what was compared.

    Raises:
        RetroError: files are damaged; all that a process finds are named.
        ConfigurationError: neither a project nor a run is given.
    """
    if options.project_dir is None and options.load is None:
        raise ConfigurationError("--project-dir and --load", "neither given", "Give one, or both")
    initialize()
    with raise_together(), verifying(True):
        num_files = 0
        if options.project_dir is not None:
            num_files = verify_whole_project(options.project_dir)
            num_files += verify_removed(ProjectPaths(options.project_dir))
        checked, unchecked = ([], []) if options.load is None else verify_run(Path(options.load))
    result = Verified(num_files, checked, unchecked)
    rows: dict[str, object] = {}
    if options.project_dir is not None:
        rows["project"] = f"{num_files} files are whole"
    if checked:
        rows["checkpoints"] = f"{', '.join(checked)} are whole"
    if unchecked:
        rows["without checksums"] = f"{', '.join(unchecked)} (not compared)"
    print_summary("verify", rows)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(VerifyOptions, verify, argv)


if __name__ == "__main__":
    sys.exit(main())
