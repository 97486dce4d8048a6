"""What a torch_dist checkpoint holds, read and checked before anything is loaded from it.

DIR/metadata.json     the format; written last
DIR/.metadata         table of contents: tensors and objects, and where each lies
DIR/common.pt         arguments and counters (from megatron-core 0.19 on an entry of the table)
DIR/*.distcp          tensors and objects
DIR/run_config.yaml   Megatron-Bridge's configuration, which stands for the arguments
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from retro_mcore.checkpoint.bridge_config import bridge_arguments
from retro_mcore.checkpoint.checksums import verify_small_file
from retro_mcore.checkpoint.safe_loading import Record, load_contents, load_torch_file
from retro_mcore.checkpoint.tracker import RELEASE
from retro_mcore.errors import CheckpointError

#: In a complete torch_dist checkpoint; written last.
CONFIG_FILE = "metadata.json"
CONTENTS_FILE = ".metadata"
COMMON_FILE = "common.pt"

_COMMON_ENTRY = MetadataIndex("common_state/shard_0_1")
_RESTORE = "Restore the file, or load an earlier checkpoint (--ckpt-step)"


def is_torch_dist(directory: Path) -> bool:
    """Whether a directory is a torch_dist checkpoint."""
    return (directory / CONTENTS_FILE).is_file() and (directory / CONFIG_FILE).is_file()


def read_metadata(checkpoint: Path, other_releases: bool = False) -> Metadata:
    """Read a torch_dist checkpoint's table of contents.

    Args:
        checkpoint: Its directory.
        other_releases: Also read classes that the installed releases lack, as plain records. Not
            for a checkpoint that megatron reads next.

    Raises:
        CheckpointError: it is incomplete, or its metadata names types that it should not.
    """
    for name in (CONFIG_FILE, CONTENTS_FILE):
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                checkpoint,
                f"has no {name}, so it is not a complete torch_dist checkpoint",
                "Name a checkpoint whose save was completed",
            )
    path = checkpoint / CONTENTS_FILE
    metadata = load_contents(path, other_releases)
    try:
        _check_places(metadata)
    except ValueError as error:
        raise CheckpointError(path, f"cannot be read safely ({error})", _RESTORE) from error
    except (AttributeError, TypeError) as error:
        raise CheckpointError(path, f"is damaged ({error!r})", _RESTORE) from error
    return metadata


def _check_places(metadata: Metadata | Record) -> None:
    """Refuse a table of contents that is damaged, or that leads out of the checkpoint."""
    if not isinstance(metadata, Metadata | Record):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    if not isinstance(metadata.state_dict_metadata, dict):  # type: ignore[union-attr]
        raise ValueError("it lists no tensors")
    for index, place in (metadata.storage_data or {}).items():  # type: ignore[union-attr]
        if not _is_file_name(place.relative_path):
            raise ValueError(f"it refers to {place.relative_path!r}, outside of the checkpoint")
        if not (_is_count(place.offset) and _is_count(place.length)):
            raise ValueError(f"it has no place for {getattr(index, 'fqn', index)}")


def _is_file_name(name: object) -> bool:
    """Whether it names a file of the same directory: no path, absolute or climbing."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def check_files(checkpoint: Path, metadata: Metadata) -> None:
    """Refuse a checkpoint of which a file is missing or cut short.

    Raises:
        CheckpointError: naming the file.
    """
    ends: dict[str, int] = {}
    for entry in (metadata.storage_data or {}).values():
        end = entry.offset + entry.length
        ends[entry.relative_path] = max(end, ends.get(entry.relative_path, 0))
    for name, expected in ends.items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < expected:
            found = "is missing" if size is None else f"has {size} bytes, not {expected}"
            raise CheckpointError(path, found, _RESTORE)


def read_common(checkpoint: Path) -> Mapping[str, Any]:
    """Read what a checkpoint holds beside tensors: arguments, iteration, schedule, …

    Raises:
        CheckpointError: it is incomplete, damaged, or holds objects that may run code.
    """
    metadata = read_metadata(checkpoint)
    common = common_state(checkpoint, metadata)
    if common is None:
        raise CheckpointError(
            checkpoint,
            "holds no arguments and no iteration",
            "Name a checkpoint that Megatron or pretrain_retro.py wrote",
        )
    return common


def common_state(checkpoint: Path, metadata: Metadata) -> dict[str, Any] | None:
    """The state that `read_common` reads; None where the checkpoint has none.

    Raises:
        CheckpointError: it is damaged, or holds objects that may run code.
    """
    state = _common_state(checkpoint, metadata)
    if state is None or "args" in state:
        return state
    recorded = bridge_arguments(checkpoint)
    return state if recorded is None else {**state, "args": recorded}


def _common_state(checkpoint: Path, metadata: Metadata) -> dict[str, Any] | None:
    path = checkpoint / COMMON_FILE
    if path.is_file():
        verify_small_file(path)
        return check_common(path, load_torch_file(path, path))
    entry = (metadata.storage_data or {}).get(_COMMON_ENTRY)
    if entry is None:
        return None
    check_files(checkpoint, metadata)
    path = checkpoint / entry.relative_path
    state = load_torch_file(io.BytesIO(read_bytes(path, entry.offset, entry.length)), path)
    return check_common(path, state[0] if isinstance(state, list) and state else state)


def check_common(path: Path, common: Any) -> dict[str, Any]:
    """Refuse what is not arguments and counters.

    Raises:
        CheckpointError: naming `path`, which it was read from.
    """
    sound = isinstance(common, dict) and isinstance(common.get("args", Namespace()), Namespace)
    iteration = common.get("iteration") if sound else None
    if not sound or not (iteration in (None, RELEASE) or _is_count(iteration)):
        raise CheckpointError(path, "holds data other than arguments and counters", _RESTORE)
    return common


def read_bytes(file: Path, position: int, length: int) -> bytes:
    """Read a part of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(position)
            return stream.read(length)
    except OSError as error:
        raise CheckpointError(file, f"cannot be read ({error})", _RESTORE) from error
