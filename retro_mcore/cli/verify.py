"""`verify`: whether a project's and a run's files are what was written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.checkpoint.checksums import CHECKSUMS_FILE, verify_checkpoint
from retro_mcore.checkpoint.tracker import existing_checkpoints
from retro_mcore.cli.command import print_summary, run_command
from retro_mcore.distributed import initialize, raise_together
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.integrity import COMMANDS, verify_project, verifying
from retro_mcore.project.paths import ProjectPaths

_MARKER = ".done"


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
    """What was compared, and was whole.

    Attributes:
        num_files: Files of the project with a completion marker.
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
        num_files = 0 if options.project_dir is None else _verify_project(options.project_dir)
        checked, unchecked = ([], []) if options.load is None else _verify_run(Path(options.load))
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


def _verify_project(directory: str) -> int:
    paths = ProjectPaths(directory)
    ProjectConfig.load(paths.root)
    ProjectSettings.load(paths.root)
    files = [path for path in _marked_files(paths.root) if path.is_file() or _is_lost(path)]
    verify_project(paths, files)
    return len(files)


def _marked_files(root: Path) -> Iterator[Path]:
    """What has a completion marker, there or not; folders that are linked are part of it."""
    seen = set()
    for folder, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
        else:
            seen.add(real)
            ends = (name.removesuffix(_MARKER) for name in names if name.endswith(_MARKER))
            yield from (Path(folder, name) for name in ends)


def _refuse(error: OSError) -> None:
    raise error


def _is_lost(path: Path) -> bool:
    """Whether a file that is not there was made by a stage that finished.

    A killed one leaves markers alone, too: they are written just before their files take their
    names. Sample indexes are made again.
    """
    for root in path.parents:
        paths = ProjectPaths(root)
        if paths.stages.is_dir():
            command = COMMANDS.get(path.relative_to(root).parts[0], "")
            finished = paths.stage_record(command).is_file()
            return finished and not path.is_relative_to(paths.data_cache)
    return False


def _verify_run(directory: Path) -> tuple[list[str], list[str]]:
    if not directory.is_dir():
        raise CheckpointError(f"--load {directory}", "no such directory", "Name a run's --save")
    checked: list[str] = []
    unchecked: list[str] = []
    for name in existing_checkpoints(directory):
        has_checksums = (directory / name / CHECKSUMS_FILE).is_file()
        (checked if has_checksums else unchecked).append(name)
        verify_checkpoint(directory / name)
    if not checked and not unchecked:
        raise CheckpointError(f"--load {directory}", "holds no checkpoint", "Name a run's --save")
    return checked, unchecked


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(VerifyOptions, verify, argv)


if __name__ == "__main__":
    sys.exit(main())
