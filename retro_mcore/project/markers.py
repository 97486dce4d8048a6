"""Completion markers: a file counts as built only if its bytes are unchanged since writing.

The marker of `name` is `name.done`, a JSON object with the file's size, its checksum and the
fingerprint of its inputs. It reveals truncated, altered and foreign files before use. The marker is
written just before the file is renamed into place, so a file of ours always has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from retro_mcore.errors import CorruptFileError
from retro_mcore.json_text import parse_json
from retro_mcore.project.atomic import atomic_write, write_json
from retro_mcore.project.space import require_space


class FileState(Enum):
    """State of a file according to its marker."""

    MISSING = "missing"
    COMPLETE = "complete"
    DAMAGED = "damaged"


#: Checksums computed by this process, keyed by file metadata that changes with the content.
_computed: dict[tuple, str] = {}
#: Minimum age of a cached file, in nanoseconds. A file changed more recently may change again with
#: the same timestamp, since file system clocks tick only some hundred times a second.
_SETTLED = 2_000_000_000


def checksum(path: Path | str) -> str:
    """SHA-256 of a file's bytes, cached until the file changes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        status = os.fstat(file.fileno())
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key in _computed:
            return _computed[key]
        settled = time.time_ns() - changed > _SETTLED
        while block := file.read(1 << 20):
            digest.update(block)
    if settled:
        _computed[key] = digest.hexdigest()
    return digest.hexdigest()


def fingerprint_of(value: object) -> str:
    """A short digest of a JSON-serializable value, independent of key order."""
    encoded = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:32]


def marker_path(path: Path) -> Path:
    """Path of the marker of `path`."""
    return path.with_name(f"{path.name}.done")


@contextmanager
def signed_write(path: Path, fingerprint: str = "") -> Iterator[Path]:
    """`atomic_write` that also writes the completion marker."""
    with atomic_write(path) as temporary:
        yield temporary
        write_json(
            marker_path(path),
            {
                "bytes": temporary.stat().st_size,
                "sha256": checksum(temporary),
                "fingerprint": fingerprint,
            },
        )


def adopt(source: Path, target: Path, fingerprint: str) -> bool:
    """Adopt a complete file of another project, marked as built from `fingerprint`.

    Hard-links on the same file system, else copies.

    Returns:
        Whether `target` is complete now; False if `source` is missing or damaged.
    """
    if state_of(target, fingerprint) is FileState.COMPLETE:
        return True
    if state_of(source) is not FileState.COMPLETE:
        return False
    link_or_copy(source, target, fingerprint)
    return True


def link_or_copy(source: Path, target: Path, fingerprint: str) -> None:
    """Hard-link a file to `target` with a completion marker, or copy it across file systems."""
    with signed_write(target, fingerprint) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            require_space(target.parent, source.stat().st_size, source.name)
            shutil.copyfile(source, temporary)


def read_marker(path: Path) -> dict | None:
    """Read the marker of `path`: empty if damaged, None if there is no marker."""
    try:
        marker = parse_json(marker_path(path).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return marker if isinstance(marker, dict) else {}


def state_of(path: Path, fingerprint: str | None = None) -> FileState:
    """Compare `path` with its marker, reading all of its bytes.

    A file without a marker is not ours, and counts as missing. If `fingerprint` is given, a file
    built from other inputs counts as damaged.
    """
    marker = read_marker(path)
    if marker is None or not path.is_file():
        return FileState.MISSING
    if path.stat().st_size != marker.get("bytes"):
        return FileState.DAMAGED
    if fingerprint is not None and marker.get("fingerprint") != fingerprint:
        return FileState.DAMAGED
    return FileState.COMPLETE if checksum(path) == marker.get("sha256") else FileState.DAMAGED


def verify(path: Path, hint: str) -> None:
    """Reject a file that is missing or differs from its marker.

    A file without a marker is trusted, since other programs write none.

    Raises:
        CorruptFileError: the file is missing or differs; `hint` is the hint.
    """
    if not path.is_file():
        raise CorruptFileError(path, "no such file", hint)
    if marker_path(path).exists() and state_of(path) is not FileState.COMPLETE:
        raise CorruptFileError(path, "its bytes differ from its completion marker", hint)


def verify_size(path: Path, hint: str) -> None:
    """Reject a file whose size differs from its marker: truncated or partly replaced.

    Raises:
        CorruptFileError: the size differs; `hint` is the hint.
    """
    marker, size = read_marker(path), path.stat().st_size
    if marker is not None and marker.get("bytes") != size:
        raise CorruptFileError(
            path, f"is damaged: {size} bytes, {marker.get('bytes')} were written", hint
        )


def digest_of(path: Path) -> str:
    """Checksum of `path`: from the marker if the size matches, else computed."""
    marker = read_marker(path)
    if marker and path.stat().st_size == marker.get("bytes") and "sha256" in marker:
        return str(marker["sha256"])
    return checksum(path)
