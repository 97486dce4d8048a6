"""What results were made with, so that a rerun does not mix them with others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.sections import NEEDS, SECTIONS
from benchmarks.gpu_report.worker import save
from retro_mcore.errors import ConfigurationError

#: Facts that may differ. Of two commits with the same code, the digest is the same.
_NOT_COMPARED = ("date", "commit")
#: What may be installed between two calls: without it, something was skipped.
_MAY_BE_ADDED = frozenset(name for need in NEEDS for name in need.packages)
_NAME = "setting"


def check_same(
    folder: Path, setting: Setting, machine: Mapping[str, Any], rerun: Iterable[str]
) -> None:
    """Check that a folder's results were made with the same, except those that run again.

    Args:
        folder: Folder of the results.
        setting: What sections run with.
        machine: Facts of `machine.describe`.
        rerun: Sections whose results are replaced.

    Raises:
        ConfigurationError: results that stay were made with something else. Names it.
    """
    path = folder / f"{_NAME}.json"
    kept = [name for name in SECTIONS if (folder / f"{name}.json").is_file()]
    kept = [name for name in kept if name not in set(rerun)]
    if not path.is_file() or not kept:
        return
    differences = _differences(
        json.loads(path.read_text(encoding="utf-8")), _as_json(setting, machine)
    )
    if differences:
        raise ConfigurationError(
            f"--output {folder}",
            f"holds results ({', '.join(kept)}) of other than now: {'; '.join(differences)}",
            "Name another folder, or give --repeat, and no --sections that leave these out",
        )


def write(folder: Path, setting: Setting, machine: Mapping[str, Any]) -> None:
    """Record what the results of a folder are made with."""
    save(folder, _NAME, _as_json(setting, machine))


def _as_json(setting: Setting, machine: Mapping[str, Any]) -> dict[str, Any]:
    return {"device": setting.device, "small": setting.small, "machine": dict(machine)}


def _differences(found: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, as "name found, not now"."""
    differences = [
        f"{flag} {found[name]}, not {now[name]}"
        for name, flag in (("device", "--device"), ("small", "--small"))
        if found[name] != now[name]
    ]
    if "machine" not in found:
        return [*differences, "machine and versions are not recorded"]
    before, after = found["machine"], now["machine"]
    return differences + [
        f"{name} {before.get(name, 'none')}, not {after.get(name, 'none')}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
        and name not in _NOT_COMPARED
        and not (name in _MAY_BE_ADDED and name not in before)
    ]
