"""Write results as JSON files, which are valid JSON even for NaN and infinities."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_mcore.errors import ConfigurationError
from retro_mcore.project.atomic import write_json


def perplexity_of(loss: float) -> float:
    """exp(loss), or infinity on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, with null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_results(path: Path, value: Any) -> None:
    """Write results atomically: an earlier file stays until the new one is complete.

    Raises:
        ProjectError: the disk is full.
        ConfigurationError: the file cannot be written.
    """
    try:
        write_json(path, finite(value))
    except OSError as error:
        raise _unwritable(path, error) from error


def require_writable(path: Path, flag: str = "--output") -> None:
    """Check that results can be written to `path`, before the work begins. Creates the folder.

    Raises:
        ConfigurationError: the file cannot be written. Names the flag.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error, flag) from error
    if path.is_dir():
        raise ConfigurationError(f"{flag} {path}", "a directory", "Name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"{flag} {path}", "no file can be written there", "Name another place"
        )


def _unwritable(path: Path, error: OSError, flag: str = "--output") -> ConfigurationError:
    reason = error.strerror or str(error)
    return ConfigurationError(
        f"{flag} {path}", f"cannot be written ({reason})", "Name another place"
    )
