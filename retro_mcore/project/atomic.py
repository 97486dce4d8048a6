"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; move it there if the body succeeds, else remove it.

    Missing parent directories are made. A reader never sees a partial file, and whatever `path`
    held before stays until the new content is complete and on the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any, sort_keys: bool = False) -> None:
    """Write `value` as JSON, indented by 4, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=4, sort_keys=sort_keys), encoding="utf-8")
