"""Megatron's torch_dist checkpoints, read and written without a model and without its classes.

`contents` describes their files.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from retro_mcore.checkpoint.checksums import checksums_of_share, write_checksums
from retro_mcore.checkpoint.contents import (
    COMMON_FILE,
    CONFIG_FILE,
    CONTENTS_FILE,
    check_files,
    common_state,
    read_bytes,
    read_metadata,
)
from retro_mcore.checkpoint.conversion.names import STACKED_EXPERTS, expert_name
from retro_mcore.checkpoint.conversion.weights import Weight, stack_experts
from retro_mcore.checkpoint.safe_loading import load_torch_file
from retro_mcore.errors import CheckpointError

# Everything else is the optimizer's, random states, and Transformer Engine's.
_MODEL = ("embedding.", "decoder.", "output_layer.", "neighbor_encoder.")
_HOMOGENEOUS = "decoder.layers."
_FILE = "__0_0.distcp"  # torch's name for the first file of the first rank

Places = Mapping[tuple[str, tuple[int, ...]], tuple[Path, int, int]]


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    position: int
    length: int


def read_torch_dist(directory: Path) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Read a checkpoint's common state, and the model's weights under the names that it stores.

    Layers that Megatron stored stacked (`decoder.layers.mlp.…`) are given one by one.

    Raises:
        CheckpointError: it is damaged, or holds more than plain data.
    """
    path = directory / CONTENTS_FILE
    table = read_metadata(directory, other_releases=True)
    check_files(directory, table)
    try:
        weights = _weights(path, table, _places(directory, table))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"is damaged ({error!r})", "Restore it") from error
    return common_state(directory, table) or {}, weights


def _weights(path: Path, table: Metadata, places: Places) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for name, entry in table.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or not name.startswith(_MODEL):
            continue
        if "_extra_state" in name:
            continue
        chunks = list(_chunks(name, entry, places))
        shape, dtype = tuple(entry.size), entry.properties.dtype
        # The files must hold what the table declares: then no more memory is taken than they fill.
        counted = sum(math.prod(chunk.sizes) for chunk in chunks)
        held = all(math.prod(c.sizes) * dtype.itemsize <= c.length for c in chunks)
        if counted != math.prod(shape) or not held:
            raise CheckpointError(
                path, f"the parts of {name} do not make up the whole tensor", "Restore it"
            )
        weights.update(_layers(name, shape, dtype, chunks))
    return weights


def _places(directory: Path, table: Metadata) -> Places:
    """Where the chunks of tensors lie, by name and offsets in the tensor."""
    places = {}
    for index, info in (table.storage_data or {}).items():
        # Earlier releases of torch have no transforms.
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                directory, "is compressed", "Save it without transforms (its writer's default)"
            )
        if index.offset is not None:  # that of an object
            where = (directory / info.relative_path, info.offset, info.length)
            places[index.fqn, tuple(index.offset)] = where
    return places


def _chunks(name: str, entry: Any, places: Places) -> Iterator[_Chunk]:
    for chunk in entry.chunks:
        offsets = tuple(chunk.offsets)
        yield _Chunk(offsets, tuple(chunk.sizes), *places[name, offsets])


def _layers(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: list[_Chunk]
) -> dict[str, Weight]:
    """A tensor by its name, or the layers and experts that it stacks, each by its own."""
    inside = name.removeprefix(_HOMOGENEOUS)
    names: dict[tuple[int, ...], str] = {(): name}
    if inside != name and not inside.split(".")[0].isdigit():
        names = {(layer,): f"{_HOMOGENEOUS}{layer}.{inside}" for layer in range(shape[0])}
    if STACKED_EXPERTS in name:
        size = shape[len(next(iter(names)))]
        names = {
            (*index, expert): expert_name(each, expert)
            for index, each in names.items()
            for expert in range(size)
        }
    return {
        each: Weight(shape[len(index) :], dtype, partial(_read, shape, dtype, chunks, index))
        for index, each in names.items()
    }


def _read(
    shape: tuple[int, ...], dtype: torch.dtype, chunks: list[_Chunk], index: tuple[int, ...]
) -> Tensor:
    """A tensor, or the part of it at an index of its first dimensions, from its chunks."""
    begin = [*index, *(0 for _ in shape[len(index) :])]
    end = [*(number + 1 for number in index), *shape[len(index) :]]
    part = torch.empty([stop - start for start, stop in zip(begin, end, strict=True)], dtype=dtype)
    for chunk in chunks:
        starts = list(map(max, chunk.offsets, begin))
        ends = [o + size for o, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        stops = list(map(min, ends, end))
        if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
            continue
        whole = starts == list(chunk.offsets) and stops == ends
        read = _read_chunk(chunk) if whole else _read_shared_chunk(chunk)
        part[_slices(starts, stops, begin)] = read[_slices(starts, stops, chunk.offsets)]
    return part[(0,) * len(index)]


def _slices(
    starts: Sequence[int], stops: Sequence[int], origin: Sequence[int]
) -> tuple[slice, ...]:
    bounds = zip(starts, stops, origin, strict=True)
    return tuple(slice(start - zero, stop - zero) for start, stop, zero in bounds)


def _read_chunk(chunk: _Chunk) -> Tensor:
    content = io.BytesIO(read_bytes(chunk.file, chunk.position, chunk.length))
    tensor = load_torch_file(content, chunk.file)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.sizes:
        raise CheckpointError(
            chunk.file, "is damaged, or belongs to another checkpoint", "Restore it"
        )
    return tensor


@lru_cache(maxsize=2)  # the two layers of an MLP take turns
def _read_shared_chunk(chunk: _Chunk) -> Tensor:
    """A chunk of several experts' or layers' weights, which are read one after the other."""
    return _read_chunk(chunk)


class _Writer(torch_checkpoint.FileSystemWriter):
    """Writes one file, with one tensor in memory at a time.

    (torch's own keeps every tensor of a file until the file is written.) It leaves its path out of
    the table of contents: readers here refuse paths.
    """

    def storage_meta(self) -> None:
        """Nothing."""

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        """Write the items of a plan, objects first, as torch does."""
        items = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)
        with (Path(self.path) / _FILE).open("wb") as stream:
            results = [_write_item(stream, item, planner) for item in items]
            stream.flush()
            os.fsync(stream.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _write_item(stream: Any, item: Any, planner: Any) -> WriteResult:
    start, data = stream.tell(), planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
    else:
        whole = data.untyped_storage().nbytes() == data.nbytes
        torch.save(data if whole else data.clone(), stream)  # else of a larger storage: all of it
    length = stream.tell() - start
    return WriteResult(item.index, length, _StorageInfo(_FILE, start, length))


class _Planner(torch_checkpoint.DefaultSavePlanner):
    """Reads each weight when it is written, so that one is in memory at a time.

    Args:
        weights: Under the names to store. The state to save has tensors without content for them.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        super().__init__(flatten_state_dict=False)
        self._weights = weights

    def resolve_data(self, write_item: Any) -> Any:
        """The content of an item."""
        weight = self._weights.get(write_item.index.fqn)
        if weight is None:
            return super().resolve_data(write_item)
        tensor = weight.load().detach().contiguous()
        if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
            found = f"{write_item.index.fqn} is {tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(
                "the model", found, f"Expected {weight.dtype} {tuple(weight.shape)}"
            )
        return tensor


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
    weights = stack_experts(weights)
    state: dict[str, Any] = {
        name: torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        for name, weight in weights.items()
    }
    state |= _extra_states(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that this is one process: it is
        writer = _Writer(str(temporary), thread_count=1)
        planner = _Planner(weights)
        torch_checkpoint.save(state, storage_writer=writer, planner=planner, no_dist=True)
    args = common.get("args", Namespace())
    torch.save({**common, "args": args}, temporary / COMMON_FILE)
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    form |= {"common_backend": "torch", "common_backend_version": 1}
    (temporary / CONFIG_FILE).write_text(json.dumps(form), encoding="utf-8")
    write_checksums(temporary, [checksums_of_share(temporary)])
    temporary.replace(directory)


def _extra_states(weights: Mapping[str, Weight]) -> dict[str, list[None]]:
    """Empty entries for Transformer Engine's state of every linear layer: Megatron expects them."""
    states: dict[str, list[None]] = {}
    for name, weight in weights.items():
        if match := re.match(r"(.*\.linear_\w+)\.weight$", name):
            count = weight.shape[0] if STACKED_EXPERTS in name else 1
            names = [f"{match[1]}._extra_state/shard_{part}_{count}" for part in range(count)]
            states |= {each: [None] for each in names}
    return states
