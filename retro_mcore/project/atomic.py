"""Atomic writes: files appear complete or not at all."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retro_mcore.project.space import refused_write, refused_write_error

#: Matches the temporary files of `atomic_write`, including those left by a killed process.
TEMPORARY = ".*.tmp"


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the body succeeds.

    If the body fails, the temporary file is removed. Missing parent directories are created.
    Readers never see a partial file: the old content of `path` stays until the new content is
    complete and on disk.

    Raises:
        ProjectError: the disk is full, or the system refuses the write for another reason.
    """
    path = Path(path)
    # Jobs on several hosts may share a project.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # writing through a link would change another file
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except Exception as error:
        if refused_write(error) is None:
            raise
        size = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)  # first, so that its space counts as free
        raise refused_write_error(path, error, size) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any, sort_keys: bool = False) -> None:
    """Write `value` as JSON, indented by 4, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=4, sort_keys=sort_keys), encoding="utf-8")
