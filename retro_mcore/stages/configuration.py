"""Helpers for the configurations of all stages: project, bounds of numbers, records."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from retro_mcore.errors import CorruptFileError, flag_of
from retro_mcore.project.fields import problems_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options

Config = TypeVar("Config")
#: A project directory, as every stage's `run` takes it.
Project = str | Path | ProjectPaths
#: Options by the name under which an older version recorded them.
_RENAMED = {"index_str": "index"}


def project_paths(project: Project) -> ProjectPaths:
    """Paths of a project that is given in any of the accepted forms."""
    return project if isinstance(project, ProjectPaths) else ProjectPaths(project)


def recorded_config(paths: ProjectPaths, stage: str, kind: type[Config]) -> Config | None:
    """Configuration with which a finished stage was run; None if the stage has no record.

    Options that are not in the record have their default values. Entries that are not flags are
    settings of other files.

    Args:
        paths: The project.
        stage: Name of the stage.
        kind: Its configuration.

    Raises:
        CorruptFileError: the record has an unknown option, or a value of the wrong type.
    """
    record = paths.stage_record(stage)
    if not record.is_file():
        return None
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for flag, value in recorded_options(paths, stage).items():
        # "--nprobe of build_index" is a setting of the index, recorded by query_neighbors.
        if flag.startswith("--") and " " not in flag:
            name = flag.removeprefix("--").replace("-", "_")
            if name not in _RENAMED:
                options[name] = value
            elif value is not None:
                options[_RENAMED[name]] = value
    found = [f"{flag_of(name)} is unknown to {stage}" for name in sorted(options.keys() - known)]
    wrong = problems_of(options, kind, {})
    found += [f"{flag_of(name)} {problem}" for name, problem in wrong.items()]
    if found:
        raise CorruptFileError(record, "; ".join(found), "Restore the file")
    return kind(**options)
