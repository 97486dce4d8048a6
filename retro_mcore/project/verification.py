"""Verify all files of a project against their checksums."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.integrity import COMMANDS, verify_project
from retro_mcore.project.paths import ProjectPaths

_MARKER = ".done"


def verify_whole_project(directory: str | Path) -> int:
    """Verify a project's files and return their number.

    Raises:
        RetroError: files are damaged or missing; all of them are named.
    """
    paths, files = _files_of(directory)
    verify_project(paths, files)
    return len(files)


def compare_sizes(directory: str | Path) -> int:
    """Compare the sizes of a project's files, and return their number. No file is read.

    Raises:
        RetroError: files are missing or have another size; all of them are named.
    """
    paths, files = _files_of(directory)
    verify_project(paths, files, sizes_only=True)
    return len(files)


def _files_of(directory: str | Path) -> tuple[ProjectPaths, list[Path]]:
    """A project with its marked files, missing ones included."""
    paths = ProjectPaths(directory)
    ProjectConfig.load(paths.root)
    ProjectSettings.load(paths.root)
    files = [path for path in _marked_files(paths.root) if path.is_file() or _is_lost(path)]
    return paths, files


def _marked_files(root: Path) -> Iterator[Path]:
    """Paths with a completion marker, whether the file exists or not; follows linked folders."""
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
    """Whether a missing file was written by a finished stage.

    A killed stage also leaves markers without files, since a marker is written just before its
    file is renamed into place. Missing sample indexes are not lost, since they are rebuilt.
    """
    for root in path.parents:
        paths = ProjectPaths(root)
        if paths.stages.is_dir():
            command = COMMANDS.get(path.relative_to(root).parts[0], "")
            finished = paths.stage_record(command).is_file()
            return finished and not path.is_relative_to(paths.data_cache)
    return False
