"""Results as JSON files: valid JSON whatever was measured, and written where one can write."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_mcore.errors import ConfigurationError
from retro_mcore.project.atomic import write_json


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite where that is more than a number holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def finite(value: Any) -> Any:
    """A JSON value with null in the place of NaN and infinities, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_results(path: Path, value: Any) -> None:
    """Write results; an earlier file stays until the new one is complete.

    Raises:
        ProjectError: the disk is full.
        ConfigurationError: the file cannot be written.
    """
    try:
        write_json(path, finite(value))
    except OSError as error:
        raise _unwritable(path, error) from error


def require_writable(path: Path) -> None:
    """Refuse a place for results before the work is done, not after. Its folder is made.

    Raises:
        ConfigurationError: naming --output.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    if path.is_dir():
        raise ConfigurationError(f"--output {path}", "a directory", "Name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"--output {path}", "no file can be written there", "Name another place"
        )


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    reason = error.strerror or str(error)
    return ConfigurationError(
        f"--output {path}", f"cannot be written ({reason})", "Name another place"
    )
