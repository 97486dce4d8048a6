"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retro_mcore.project.space import refused_write, refused_write_error

#: Matches the temporary files of `atomic_write`, those that a killed process left included.
TEMPORARY = ".*.tmp"


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; move it there if the body succeeds, else remove it.

    Missing parent directories are made. A reader never sees a partial file, and whatever `path`
    held before stays until the new content is complete and on the disk.

    Raises:
        ProjectError: the disk is full, or the system refuses the write for another reason.
    """
    path = Path(path)
    # Jobs on several hosts may work on one project.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a link would lead what is written to another file
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except Exception as error:
        if refused_write(error) is None:
            raise
        size = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)  # first, so that the space it took counts as free
        raise refused_write_error(path, error, size) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any, sort_keys: bool = False) -> None:
    """Write `value` as JSON, indented by 4, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=4, sort_keys=sort_keys), encoding="utf-8")
