"""A checkpoint's checksums: `checksums.json` beside its files.

    {"files": {"__0_0.distcp": {"bytes": 1234, "sha256": "…"}, …}, "sha256": "…"}

The last is that of the others, so that damage of this file is told as such. Checkpoints of other
writers have none, and are trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retro_mcore.distributed import get_rank, get_world_size
from retro_mcore.errors import CheckpointError
from retro_mcore.json_text import parse_json
from retro_mcore.project.atomic import write_json
from retro_mcore.project.integrity import SignedFile, verify_files
from retro_mcore.project.markers import checksum

CHECKSUMS_FILE = "checksums.json"

_RESTORE = "Restore the file, or load an earlier checkpoint (--ckpt-step)"

#: torch_dist's files name the rank that wrote them.
_WRITTEN_BY = re.compile(r"__(\d+)_")

Checksums = dict[str, dict[str, Any]]


def checksums_of_share(checkpoint: Path) -> Checksums:
    """Size and SHA-256 of the files that this rank wrote; of all others, on rank 0.

    Reading its own files, a rank need not wait for what others wrote to appear on its host.
    """
    world, rank = get_world_size(), get_rank()
    return {
        name: {"bytes": path.stat().st_size, "sha256": checksum(path)}
        for name, path in _files(checkpoint)
        if _owner(name) % world == rank
    }


def write_checksums(checkpoint: Path, shares: Sequence[Mapping[str, Any]]) -> None:
    """Write what the ranks computed, from one of them.

    Raises:
        CheckpointError: a file is in none of the shares.
    """
    files = {name: entry for share in shares for name, entry in share.items()}
    for name, path in _files(checkpoint):
        if name not in files:
            raise CheckpointError(path, "was not written by any rank", "Save again")
    write_json(checkpoint / CHECKSUMS_FILE, {"files": files, "sha256": _digest(files)})


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare a checkpoint's files with its checksums, if it has some.

    All ranks call it, inside `raise_together`; each reads a share of the files.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    path = checkpoint / CHECKSUMS_FILE
    if not path.is_file():
        return
    files = [
        SignedFile(checkpoint / name, entry["bytes"], entry["sha256"])
        for name, entry in _read(path).items()
    ]
    verify_files(files, lambda _: _RESTORE, CheckpointError)


def verify_small_file(file: Path) -> None:
    """Compare one file of a checkpoint with its checksum, if it has one, before it is used.

    Raises:
        CheckpointError: it is damaged.
    """
    path = file.parent / CHECKSUMS_FILE
    entry = _read(path).get(file.name) if path.is_file() else None
    if entry is not None and checksum(file) != entry["sha256"]:
        raise CheckpointError(file, "is damaged: its checksum differs", _RESTORE)


def _read(path: Path) -> Checksums:
    try:
        content = parse_json(path.read_bytes())
        files, digest = content["files"], content["sha256"]
    except (ValueError, KeyError, TypeError):
        files = digest = None
    if digest is None or digest != _digest(files) or not _is_sound(files):
        raise CheckpointError(
            path, "is damaged", "Restore it, or load an earlier checkpoint (--ckpt-step)"
        )
    return files


def _is_sound(files: Any) -> bool:
    """Whether it is what `write_checksums` writes."""
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and ".." not in Path(name).parts
        and not Path(name).is_absolute()
        for name, entry in files.items()
    )


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _files(checkpoint: Path) -> list[tuple[str, Path]]:
    found = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return [
        (path.relative_to(checkpoint).as_posix(), path)
        for path in found
        if path.name != CHECKSUMS_FILE and path.suffix != ".tmp"
    ]


def _owner(name: str) -> int:
    match = _WRITTEN_BY.match(name)
    return int(match[1]) if match else 0
