"""Reading torch_dist checkpoints without running code that they might hold.

PyTorch's reader unpickles a checkpoint's `.metadata` file and its objects unguarded. Here the
metadata may name a fixed list of types only, and objects are loaded with `weights_only=True`.
"""

from __future__ import annotations

import io
import os
import pickle
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from retro_mcore.checkpoint.tracker import RELEASE
from retro_mcore.errors import CheckpointError

#: In a complete torch_dist checkpoint; written last.
CONFIG_FILE = "metadata.json"
_COMMON_FILE = "common.pt"  # megatron-core up to 0.18; later it is an entry like any other
_COMMON_ENTRY = "common_state/shard_0_1"

_METADATA_TYPES = {
    "builtins": {"set", "frozenset", "slice"},
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _METADATA_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which may run code")
        return super().find_class(module, name)


def read_metadata(checkpoint: Path) -> Metadata:
    """What a torch_dist checkpoint says that it holds, and where.

    Raises:
        CheckpointError: it is incomplete, or its metadata names types that it should not.
    """
    for name in (CONFIG_FILE, ".metadata"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                checkpoint,
                f"has no {name}, so it is not a complete torch_dist checkpoint",
                "Name a checkpoint that was saved to its end",
            )
    with _refusing(checkpoint, ".metadata"), (checkpoint / ".metadata").open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        _check_places(metadata)
    return metadata


def _check_places(metadata: Metadata) -> None:
    """Refuse a table of contents that is damaged, or that leads out of the checkpoint."""
    if not isinstance(metadata.state_dict_metadata, dict):
        raise pickle.UnpicklingError("it lists no tensors")
    for index, place in (metadata.storage_data or {}).items():
        name = place.relative_path
        if not is_file_name(name):
            raise pickle.UnpicklingError(f"it refers to {str(name)!r}, outside of the checkpoint")
        if not (_is_count(place.offset) and _is_count(place.length)):
            raise pickle.UnpicklingError(f"it has no place for {getattr(index, 'fqn', index)}")


def is_file_name(name: object) -> bool:
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
            raise CheckpointError(
                path, found, "Restore the file, or load an earlier checkpoint (--ckpt-step)"
            )


def read_common(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint holds beside tensors: arguments, iteration, schedule, parameter groups.

    Raises:
        CheckpointError: it is incomplete, damaged, or holds objects that may run code.
    """
    metadata = read_metadata(checkpoint)
    if (checkpoint / _COMMON_FILE).is_file():
        with (checkpoint / _COMMON_FILE).open("rb") as file:
            return check_common(
                checkpoint / _COMMON_FILE, _load_object(checkpoint, _COMMON_FILE, file)
            )
    entry = (metadata.storage_data or {}).get(MetadataIndex(_COMMON_ENTRY))
    if entry is None:
        raise CheckpointError(
            checkpoint,
            "holds no arguments and no iteration",
            "Name a checkpoint that Megatron or pretrain_retro.py wrote",
        )
    check_files(checkpoint, metadata)
    with (checkpoint / entry.relative_path).open("rb") as file:
        file.seek(entry.offset)
        content = io.BytesIO(file.read(entry.length))
    state = _load_object(checkpoint, entry.relative_path, content)
    path = checkpoint / entry.relative_path
    return check_common(path, state[0] if isinstance(state, list) and state else state)


def check_common(path: Path, common: Any) -> dict[str, Any]:
    """Refuse what is not arguments and counters.

    Raises:
        CheckpointError: naming `path`, which it was read from.
    """
    sound = isinstance(common, dict) and isinstance(common.get("args", Namespace()), Namespace)
    iteration = common.get("iteration") if sound else None
    if not sound or not (iteration in (None, RELEASE) or _is_count(iteration)):
        raise CheckpointError(
            path,
            "holds something else than arguments and counters",
            "Restore the file, or load an earlier checkpoint (--ckpt-step)",
        )
    return common


@contextmanager
def weights_only() -> Iterator[None]:
    """Meanwhile `torch.load` builds tensors and plain values only, whatever its caller says."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    previous = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def _load_object(checkpoint: Path, name: str, file: IO[bytes]) -> Any:
    # Megatron keeps its arguments in a Namespace, and registers it when it is imported. What is
    # registered already must not be given here: it would be removed in the end.
    allowed = {Namespace} - set(torch.serialization.get_safe_globals())
    with _refusing(checkpoint, name), torch.serialization.safe_globals(list(allowed)):
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def _refusing(checkpoint: Path, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # unpickling what is not a pickle raises many kinds
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            checkpoint / name,
            f"cannot be read safely ({type(error).__name__}: {reason})",
            "Restore the file, or load an earlier checkpoint (--ckpt-step)",
        ) from error
