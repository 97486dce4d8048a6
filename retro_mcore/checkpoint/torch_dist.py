"""Megatron's torch_dist checkpoints, read and written without a model and without its classes.

DIR/metadata.json     the format
DIR/.metadata         table of contents: tensors, their chunks, where each lies
DIR/common.pt         arguments and counters (from 0.19 on an entry of the table)
DIR/*.distcp          the chunks
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint

from retro_mcore.checkpoint.checksums import checksums_of_share, write_checksums
from retro_mcore.checkpoint.conversion.weights import Weight
from retro_mcore.checkpoint.safe_loading import check_common, is_file_name
from retro_mcore.checkpoint.safe_pickle import Record, load_dist_metadata, load_torch_file
from retro_mcore.errors import CheckpointError

# Everything else is the optimizer's, random states, and Transformer Engine's.
_MODEL = ("embedding.", "decoder.", "output_layer.", "neighbor_encoder.")
_HOMOGENEOUS = "decoder.layers."
_COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor in a file: where it begins in the tensor, its size, its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    position: int
    length: int


def is_torch_dist(directory: Path) -> bool:
    """Whether a directory is a torch_dist checkpoint."""
    return (directory / ".metadata").is_file() and (directory / "metadata.json").is_file()


def read_torch_dist(directory: Path) -> tuple[dict[str, Any], dict[str, Weight]]:
    """A checkpoint's common state and the model's weights, under the names that it stores.

    Layers that Megatron stored stacked (`decoder.layers.mlp.…`) are given one by one.

    Raises:
        CheckpointError: it is damaged, or holds more than plain data.
    """
    path = directory / ".metadata"
    table = load_dist_metadata(path)
    try:
        places = _places(directory, table)
        weights = _weights(path, table, places)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"is damaged ({error!r})", "Restore it") from error
    return _common_state(directory, places), weights


def _weights(path: Path, table: Record, places: Mapping) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for name, entry in table.state_dict_metadata.items():  # type: ignore[attr-defined]
        if not hasattr(entry, "chunks") or not name.startswith(_MODEL) or "_extra_state" in name:
            continue
        chunks = list(_chunks(name, entry, places))
        shape, dtype = tuple(entry.size), entry.properties.values[0]
        # What is said of a tensor must be in the files: then no more is taken than they hold.
        counted = sum(math.prod(chunk.sizes) for chunk in chunks)
        held = all(math.prod(c.sizes) * dtype.itemsize <= c.length for c in chunks)
        if counted != math.prod(shape) or not held:
            raise CheckpointError(path, f"its parts of {name} do not make it up", "Restore it")
        weights.update(_layers(name, shape, dtype, chunks))
    return weights


def _places(directory: Path, table: Record) -> dict[tuple[str, tuple | None], Any]:
    places = {}
    sizes: dict[Path, int] = {}
    for index, info in table.storage_data.items():  # type: ignore[attr-defined]
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                directory, "is compressed", "Save it without transforms (its writer's default)"
            )
        if not is_file_name(info.relative_path):
            raise CheckpointError(
                directory, f"refers to {info.relative_path!r}, outside of it", "Restore it"
            )
        file = directory / info.relative_path
        if file not in sizes:
            sizes[file] = file.stat().st_size if file.is_file() else -1
        if sizes[file] < info.offset + info.length or min(info.offset, info.length) < 0:
            found = "is missing" if sizes[file] < 0 else f"has only {sizes[file]} bytes"
            raise CheckpointError(file, found, "Restore it")
        offset = getattr(index, "offset", None)  # left out for what is no tensor
        where = (directory / info.relative_path, info.offset, info.length)
        places[index.fqn, None if offset is None else tuple(offset)] = where
    return places


def _chunks(name: str, entry: Any, places: Mapping) -> Iterator[_Chunk]:
    for chunk in entry.chunks:
        offsets = tuple(chunk.offsets)
        yield _Chunk(offsets, tuple(chunk.sizes), *places[name, offsets])


def _layers(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: list[_Chunk]
) -> dict[str, Weight]:
    inside = name.removeprefix(_HOMOGENEOUS)
    if inside == name or inside.split(".")[0].isdigit():
        return {name: Weight(shape, dtype, partial(_read, shape, dtype, chunks, None))}
    return {
        f"{_HOMOGENEOUS}{layer}.{inside}": Weight(
            shape[1:], dtype, partial(_read, shape, dtype, chunks, layer)
        )
        for layer in range(shape[0])
    }


def _read(
    shape: tuple[int, ...], dtype: torch.dtype, chunks: list[_Chunk], layer: int | None
) -> Tensor:
    """A whole tensor, or one layer of a stacked one, from its chunks."""
    first, count = (0, shape[0]) if layer is None else (layer, 1)
    whole = torch.empty((count, *shape[1:]), dtype=dtype)
    for chunk in chunks:
        start = max(chunk.offsets[0], first)
        stop = min(chunk.offsets[0] + chunk.sizes[0], first + count)
        if start >= stop:
            continue
        part = _read_chunk(chunk)[start - chunk.offsets[0] : stop - chunk.offsets[0]]
        where = [slice(start - first, stop - first)]
        where += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
        whole[tuple(where)] = part
    return whole if layer is None else whole[0]


def _read_chunk(chunk: _Chunk) -> Tensor:
    content = io.BytesIO(_bytes(chunk.file, chunk.position, chunk.length))
    tensor = load_torch_file(content, chunk.file)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.sizes:
        raise CheckpointError(chunk.file, "is damaged, or of another checkpoint", "Restore it")
    return tensor


def _bytes(file: Path, position: int, length: int) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(position)
            return stream.read(length)
    except OSError as error:
        raise CheckpointError(file, f"cannot be read ({error})", "Restore it") from error


def _common_state(directory: Path, places: Mapping) -> dict[str, Any]:
    path = directory / "common.pt"
    if path.is_file():
        return check_common(path, load_torch_file(path, path))
    if (_COMMON, None) not in places:
        return {}
    file, position, length = places[_COMMON, None]
    state = load_torch_file(io.BytesIO(_bytes(file, position, length)), file)
    return check_common(file, state[0] if isinstance(state, list) and state else state)


class _Writer(torch_checkpoint.FileSystemWriter):
    """Does not say where it wrote: a path is no plain value, which readers here refuse."""

    def storage_meta(self) -> None:
        """Nothing."""


def write_torch_dist(
    directory: Path, common: Mapping[str, Any], weights: Mapping[str, Weight]
) -> None:
    """Write a checkpoint that Megatron's `dist_checkpointing.load` reads, from one process.

    Args:
        directory: Made; must not exist.
        common: Arguments (`args`, a Namespace) and counters.
        weights: Under the names to store, layers unstacked.
    """
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state: dict[str, Any] = {name: weight.load().contiguous() for name, weight in weights.items()}
    state |= _extra_states(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that this is one process: it is
        writer = _Writer(str(temporary), thread_count=1)
        planner = torch_checkpoint.DefaultSavePlanner(flatten_state_dict=False)
        torch_checkpoint.save(state, storage_writer=writer, planner=planner, no_dist=True)
    args = common.get("args", Namespace())
    torch.save({**common, "args": args}, temporary / "common.pt")
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    form |= {"common_backend": "torch", "common_backend_version": 1}
    (temporary / "metadata.json").write_text(json.dumps(form), encoding="utf-8")
    write_checksums(temporary, [checksums_of_share(temporary)])
    temporary.replace(directory)


def _extra_states(weights: Mapping[str, Weight]) -> dict[str, list[None]]:
    """Megatron wants an entry for Transformer Engine's state of every linear layer, if an empty
    one."""
    linear = (re.match(r"(.*\.linear_\w+)\.weight$", name) for name in weights)
    return {f"{match[1]}._extra_state/shard_0_1": [None] for match in linear if match}
