"""Weights written as safetensors, in shards, one tensor in memory at a time.

The format: the length of a header in 8 bytes, the header (JSON: dtype, shape and place of every
tensor), the tensors' bytes. The library's own writer needs a whole shard in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from retro_mcore.checkpoint.conversion.weights import Weight, Weights
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.project.atomic import write_json

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def bytes_of(size: str) -> int:
    """A size as transformers writes it: `5GB`, `300MB`.

    Raises:
        ConfigurationError: it is none.
    """
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", size.strip().upper())
    if match is None or not int(match[1]):
        raise ConfigurationError("--max-shard-size", repr(size), "Give a size such as 5GB")
    return int(match[1]) * _UNITS[match[2]]


def write_safetensors(directory: Path, weights: Weights, max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards and their index.

    Args:
        directory: It must exist.
        weights: Under the names to store.
        max_shard_bytes: Most bytes of a shard; a larger tensor has one for itself.

    Raises:
        CheckpointError: a weight is not what was announced.
    """
    for old in (*directory.glob("model*.safetensors"), directory / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)  # of an interrupted conversion: readers would take it first
    shards = list(_shards(weights, max_shard_bytes))
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard)
    if len(shards) > 1:
        total = sum(_size(weight) for weight in weights.values())
        places = {w: name for name, shard in zip(names, shards, strict=True) for w in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(directory / "model.safetensors.index.json", index)


def _shards(weights: Weights, largest: int) -> Iterator[dict[str, Weight]]:
    shard: dict[str, Weight] = {}
    held = 0
    for name, weight in weights.items():
        if shard and held + _size(weight) > largest:
            yield shard
            shard, held = {}, 0
        shard[name] = weight
        held += _size(weight)
    yield shard


def _size(weight: Weight) -> int:
    return weight.numel * weight.dtype.itemsize


def _write_shard(file: Path, shard: Mapping[str, Weight]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, weight in shard.items():
        end = place + _size(weight)
        header[name] = {
            "dtype": _DTYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name, weight in shard.items():
            tensor = weight.load()
            if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
                found = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
                raise CheckpointError(file, found, f"Expected {weight.dtype} {weight.shape}")
            data = tensor.detach().contiguous().flatten().view(torch.uint8)
            data.numpy().tofile(stream)
