"""Records of the options and inputs of each stage, to reject a different configuration by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
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
    hints: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Compare a stage's options and inputs with those of its last finished run, if any.

    Args:
        paths: The project.
        stage: Name of the command.
        options: Values by flag, for every flag that changes what the stage writes.
        inputs: Content digests by input.
        output: The stage's final output; without a completion marker, another program wrote it.
        hints: What to do if an option differs, by flag, where it is not to repeat the command.

    Returns:
        Fingerprint of options and inputs, for the completion markers of the stage's files.

    Raises:
        ProjectError: an option or input differs, or another program wrote the output.
    """
    record = paths.stage_record(stage)
    if record.is_file():
        _compare(paths, stage, read_stage_record(record), options, inputs, hints)
    elif output.exists() and not marker_path(output).exists():
        raise ProjectError(
            output,
            "exists, and another program wrote it",
            "Continue with the next stage, or use another --project-dir",
        )
    return fingerprint_of({"stage": stage, "options": dict(options), "inputs": dict(inputs)})


def finish_stage(
    paths: ProjectPaths,
    stage: str,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    report: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
) -> None:
    """Record how a finished stage was run. Only rank 0 calls this.

    Args:
        paths: The project.
        stage: Name of the command.
        options: As given to `check_stage`.
        inputs: As given to `check_stage`.
        report: Counts by name of what was read, written, dropped, cut, replaced or repeated. None
            keeps the report of the run that wrote the files.
        fingerprint: Fingerprint of the stage's files, if it is not that of options and inputs.
    """
    record: dict[str, Any] = {"options": dict(options), "inputs": dict(inputs)}
    if report is None:
        report = stage_report(paths, stage)
    if report:
        record["report"] = dict(report)
    if fingerprint is not None:
        record["fingerprint"] = fingerprint
    write_json(paths.stage_record(stage), record)


def read_stage_record(path: Path) -> dict[str, dict[str, Any]]:
    """Read the record of a finished stage: `options`, `inputs`, and `report` if it has counts.

    Raises:
        CorruptFileError: the file holds something else.
    """
    record = read_json_object(path)
    for name in ("options", "inputs", "report"):
        if not isinstance(record.get(name, {}), dict):
            raise CorruptFileError(path, f"its {name} are not a JSON object", "Restore the file")
    return record


def _recorded(paths: ProjectPaths, stage: str, name: str) -> dict[str, Any]:
    path = paths.stage_record(stage)
    return dict(read_stage_record(path).get(name, {})) if path.is_file() else {}


def stage_report(paths: ProjectPaths, stage: str) -> dict[str, Any]:
    """Counts of a finished stage; empty if it has not finished or counted nothing."""
    return _recorded(paths, stage, "report")


def recorded_inputs(paths: ProjectPaths, stage: str) -> dict[str, str]:
    """Input digests of a finished stage; empty if it has not finished."""
    return _recorded(paths, stage, "inputs")


def recorded_fingerprint(paths: ProjectPaths, stage: str) -> str:
    """Fingerprint of a finished stage's files; empty if it has not finished."""
    path = paths.stage_record(stage)
    if not path.is_file():
        return ""
    record = read_stage_record(path)
    what = {"stage": stage, "options": record.get("options"), "inputs": record.get("inputs")}
    return str(record.get("fingerprint") or fingerprint_of(what))


def recorded_options(paths: ProjectPaths, stage: str) -> dict[str, Any]:
    """Flags of a finished stage; empty if it has not finished."""
    return _recorded(paths, stage, "options")


def _compare(
    paths: ProjectPaths,
    stage: str,
    recorded: Mapping[str, Any],
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    hints: Mapping[str, str],
) -> None:
    hint = "Repeat the command as it was run before, or use another --project-dir"
    before = recorded.get("options", {})
    for option in sorted({*options, *before}):
        was, asked = before.get(option), options.get(option)
        if was != asked:
            raise ProjectError(
                option,
                f"{paths.root} was built by {stage} with {_show(was)}, asked for {_show(asked)}",
                hints.get(option, hint),
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
    """Require the output of an earlier stage.

    Raises:
        ProjectError: it is missing. Names the command that writes it.
    """
    if not output.exists():
        raise ProjectError(
            output, "no such file", f"Run {command} --project-dir {paths.root} first"
        )


def input_digests(paths: ProjectPaths, files: list[Path]) -> dict[str, str]:
    """Digests by project-relative name, for `inputs` of `check_stage`."""
    return {paths.relative(path): digest_of(path) for path in files}
