"""Completion markers: a file counts as built only while its bytes are those that were written.

Beside `name` lies `name.done`, a JSON object with its size, checksum and the fingerprint of what
it was built from. So a truncated, altered or foreign file is found before it is used. The marker is
written just before the file takes its name: a file of ours is never without one.
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
    """What a marker says about its file."""

    MISSING = "missing"
    COMPLETE = "complete"
    DAMAGED = "damaged"


#: Checksums that this process has computed, by what a change of the file would change.
_computed: dict[tuple, str] = {}
#: Nanoseconds: a file that was changed later than this before it was read may change again without
#: another time of change (clocks of file systems tick some hundred times a second).
_SETTLED = 2_000_000_000


def checksum(path: Path | str) -> str:
    """SHA-256 of a file's bytes. A file that has not changed since is not read again."""
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
    """A short digest of a JSON-able value, independent of the order of keys."""
    encoded = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:32]


def marker_path(path: Path) -> Path:
    """Where the marker of `path` lies."""
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
    """Take over a complete file of another project as one built from `fingerprint`.

    A hard link on the same file system, else a copy.

    Returns:
        Whether `target` is complete now; not where `source` is missing or damaged.
    """
    if state_of(target, fingerprint) is FileState.COMPLETE:
        return True
    if state_of(source) is not FileState.COMPLETE:
        return False
    with signed_write(target, fingerprint) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            require_space(target.parent, source.stat().st_size, source.name)
            shutil.copyfile(source, temporary)
    return True


def read_marker(path: Path) -> dict | None:
    """What the marker of `path` holds: nothing if it is damaged; None if there is no marker."""
    try:
        marker = parse_json(marker_path(path).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return marker if isinstance(marker, dict) else {}


def state_of(path: Path, fingerprint: str | None = None) -> FileState:
    """Compare `path` with its marker, reading all of its bytes.

    A file without a marker is not ours, and counts as missing. With `fingerprint`, a file built
    from something else counts as damaged.
    """
    marker = read_marker(path)
    if marker is None or not path.is_file():
        return FileState.MISSING
    if path.stat().st_size != marker.get("bytes"):
        return FileState.DAMAGED
    if fingerprint is not None and marker.get("fingerprint") != fingerprint:
        return FileState.DAMAGED
    return FileState.COMPLETE if checksum(path) == marker.get("sha256") else FileState.DAMAGED


def verify(path: Path, mend: str) -> None:
    """Refuse a file that is missing or differs from its marker; one without a marker is trusted.

    Directories of other writers have no markers.

    Raises:
        CorruptFileError: with `mend` as the way out.
    """
    if not path.is_file():
        raise CorruptFileError(path, "no such file", mend)
    if marker_path(path).exists() and state_of(path) is not FileState.COMPLETE:
        raise CorruptFileError(path, "its bytes differ from its completion marker", mend)


def verify_size(path: Path, mend: str) -> None:
    """Refuse a file of another size than its marker says: truncated, or half exchanged.

    Raises:
        CorruptFileError: with `mend` as the way out.
    """
    marker, size = read_marker(path), path.stat().st_size
    if marker is not None and marker.get("bytes") != size:
        raise CorruptFileError(
            path, f"is damaged: {size} bytes, {marker.get('bytes')} were written", mend
        )


def digest_of(path: Path) -> str:
    """Checksum of `path`: the marker's where the size agrees, else computed."""
    marker = read_marker(path)
    if marker and path.stat().st_size == marker.get("bytes") and "sha256" in marker:
        return str(marker["sha256"])
    return checksum(path)
