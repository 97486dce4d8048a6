"""What each stage of a project was run with, so that another configuration is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import read_json_object
from retro_mcore.project.markers import digest_of, fingerprint_of, marker_path
from retro_mcore.project.paths import ProjectPaths


def check_stage(
    paths: ProjectPaths,
    stage: str,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    output: Path,
) -> str:
    """Compare a stage with how it was run when it finished, if it ever did.

    Args:
        paths: The project.
        stage: Name of the command.
        options: Flag to value, for each flag that changes what the stage writes.
        inputs: What it reads, to a digest of the content.
        output: Its final output; one without a completion marker is another writer's.

    Returns:
        A fingerprint of options and inputs, for the completion markers of what the stage writes.

    Raises:
        ProjectError: an option or an input differs, or the output is another writer's.
    """
    record = paths.stage_record(stage)
    if record.is_file():
        _compare(paths, stage, read_stage_record(record), options, inputs)
    elif output.exists() and not marker_path(output).exists():
        raise ProjectError(
            output,
            "exists, and another program wrote it",
            "Go on with the next stage, or use another --project-dir",
        )
    return fingerprint_of({"stage": stage, "options": dict(options), "inputs": dict(inputs)})


def finish_stage(
    paths: ProjectPaths,
    stage: str,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    report: Mapping[str, Any] | None = None,
) -> None:
    """Record how a stage was run, once it has finished. Rank 0 calls it.

    Args:
        paths: The project.
        stage: Name of the command.
        options: As given to `check_stage`.
        inputs: As given to `check_stage`.
        report: What the stage counted: what was read and written, and what was dropped, cut,
            replaced or repeated on the way (name to number). None keeps the report of the run
            that made the files.
    """
    record: dict[str, Any] = {"options": dict(options), "inputs": dict(inputs)}
    if report is None:
        report = stage_report(paths, stage)
    if report:
        record["report"] = dict(report)
    write_json(paths.stage_record(stage), record)


def read_stage_record(path: Path) -> dict[str, dict[str, Any]]:
    """What a finished stage recorded: `options`, `inputs`, and `report` where it counted.

    Raises:
        CorruptFileError: the file holds something else.
    """
    record = read_json_object(path)
    for name in ("options", "inputs", "report"):
        if not isinstance(record.get(name, {}), dict):
            raise CorruptFileError(path, f"its {name} are no object", "Restore the file")
    return record


def _recorded(paths: ProjectPaths, stage: str, name: str) -> dict[str, Any]:
    path = paths.stage_record(stage)
    return dict(read_stage_record(path).get(name, {})) if path.is_file() else {}


def stage_report(paths: ProjectPaths, stage: str) -> dict[str, Any]:
    """What a finished stage counted; empty where it has not finished, or counted nothing."""
    return _recorded(paths, stage, "report")


def recorded_inputs(paths: ProjectPaths, stage: str) -> dict[str, str]:
    """The input digests of a finished stage; empty where it has not finished."""
    return _recorded(paths, stage, "inputs")


def recorded_options(paths: ProjectPaths, stage: str) -> dict[str, Any]:
    """The flags that a finished stage was run with; empty where it has not finished."""
    return _recorded(paths, stage, "options")


def _compare(
    paths: ProjectPaths,
    stage: str,
    recorded: Mapping[str, Any],
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> None:
    mend = "Repeat the command as it was run before, or use another --project-dir"
    before = recorded.get("options", {})
    for option in sorted({*options, *before}):
        was, asked = before.get(option), options.get(option)
        if was != asked:
            raise ProjectError(
                option,
                f"{paths.root} was built by {stage} with {_show(was)}, asked for {_show(asked)}",
                mend,
            )
    recorded_inputs = recorded.get("inputs", {})
    for name in sorted({*inputs, *recorded_inputs}):
        if inputs.get(name) != recorded_inputs.get(name):
            raise ProjectError(
                name,
                f"is not what {stage} of {paths.root} was run on",
                "Restore it, or use another --project-dir",
            )


def _show(value: Any) -> str:
    return "the default" if value is None else repr(value)


def require_stage(paths: ProjectPaths, output: Path, command: str) -> None:
    """Refuse to go on without a previous stage's output.

    Raises:
        ProjectError: naming the command that makes it.
    """
    if not output.exists():
        raise ProjectError(
            output, "no such file", f"Run {command} --project-dir {paths.root} first"
        )


def input_digests(paths: ProjectPaths, files: list[Path]) -> dict[str, str]:
    """Project-relative name to digest, for `inputs` of `begin_stage`."""
    return {paths.relative(path): digest_of(path) for path in files}
