"""Metadata and tensor directory of a GGUF file, llama.cpp's model format.

Versions 2 and 3, little-endian, as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
The header is parsed here: the `gguf` package takes seconds for a large vocabulary, and reads past
the end of a truncated file. It is needed only to dequantize tensors.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.errors import CheckpointError

#: Elements per block and bytes per block of each type that can be read, by its number in the file.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}
#: Names of types that cannot be read, for error messages.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
READABLE_TYPES = tuple(name for name, *_ in _TYPES.values())

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays inside of arrays
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in a file.

    Attributes:
        name: llama.cpp's name.
        shape: Sizes, the longest stride first, as in NumPy (the file has the reverse order).
        type: Name of the element type or quantization.
        offset: First byte of the data in the file.
        num_bytes: Size of the data; None for a type that cannot be read.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int | None


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: Key-value pairs. A float32 value is the shortest decimal that rounds to it.
        tensors: Tensors by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def read_bytes(self, tensor: GgufTensor) -> np.ndarray:
        """The stored bytes of a tensor, one row of the result per row of the tensor.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        assert tensor.num_bytes is not None
        try:
            data = np.fromfile(self.path, np.uint8, tensor.num_bytes, offset=tensor.offset)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if data.size != tensor.num_bytes:
            raise _damaged(self.path, f"it ends inside of tensor {tensor.name!r}")
        return data.reshape(*tensor.shape[:-1], -1)


def is_gguf(path: Path | str) -> bool:
    """Whether a path names a GGUF file, by its suffix."""
    return Path(path).suffix.lower() == ".gguf"


def read_gguf_header(path: Path) -> GgufFile:
    """Read a file's metadata and tensor directory; no tensor data.

    Raises:
        CheckpointError: the file is missing, damaged, truncated, one part of a split model, or of
            an unsupported version or byte order.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            file = _Parser(path, m).parse()
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # mmap of an empty file
        raise _damaged(path, "it is empty") from error
    count = file.metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise CheckpointError(
            path,
            f"is one of {count} parts of a split GGUF model",
            "Join them: llama-gguf-split --merge FIRST_PART OUTPUT.gguf",
        )
    return file


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(path, f"cannot be read ({error.strerror})", "Name a .gguf file")


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(path, f"is not an intact GGUF file: {found}", "Download it again")


_Description = tuple[tuple[int, ...], int, int]  # shape, type, offset


class _Parser:
    """Reads a header from a mapped file; every length is compared with what is left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def parse(self) -> GgufFile:
        if self._data[:4] != b"GGUF":
            raise _damaged(self._path, "it does not begin with GGUF")
        self._at = 4
        self._check_version(self._scalar("I"))
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        metadata = self._entries(num_keys, self._pair, "key")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise _damaged(self._path, f"general.alignment is {alignment!r}")
        described = self._entries(num_tensors, self._description, "tensor")
        start = -(-self._at // alignment) * alignment
        tensors = {
            name: self._tensor(name, described[name], start, alignment) for name in described
        }
        self._check_overlap(tensors)
        return GgufFile(self._path, metadata, tensors)

    def _check_version(self, version: int) -> None:
        if version & 0xFFFF == 0 and version:
            raise CheckpointError(
                self._path, "is a big-endian GGUF file", "Take the little-endian one of the model"
            )
        if version not in (2, 3):
            raise CheckpointError(
                self._path,
                f"is a GGUF file of version {version}, and versions 2 and 3 are known",
                "Convert the model again with a current llama.cpp",
            )

    def _entries(self, count: int, read: Callable[[], tuple[str, Any]], kind: str) -> dict:
        self._require(count)  # each takes more than one byte
        found: dict[str, Any] = {}
        for _ in range(count):
            name, value = read()
            if name in found:
                raise _damaged(self._path, f"{kind} {name!r} occurs twice")
            found[name] = value
        return found

    def _pair(self) -> tuple[str, Any]:
        return self._string(), self._value(self._scalar("I"))

    def _description(self) -> tuple[str, _Description]:
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _damaged(self._path, f"tensor {name!r} has {dimensions} dimensions")
        sizes = tuple(self._scalar("Q") for _ in range(dimensions))
        return name, (sizes[::-1], self._scalar("I"), self._scalar("Q"))

    def _tensor(self, name: str, described: _Description, start: int, alignment: int) -> GgufTensor:
        shape, kind, offset = described
        if 0 in shape or offset % alignment:
            raise _damaged(self._path, f"tensor {name!r} has shape {shape} and offset {offset}")
        if kind not in _TYPES:
            other = _OTHER_TYPES.get(kind, f"number {kind}")
            return GgufTensor(name, shape, other, start + offset, None)
        type_name, block, size = _TYPES[kind]
        if shape[-1] % block:
            raise _damaged(self._path, f"tensor {name!r} has rows of {shape[-1]} in {type_name}")
        num_bytes = math.prod(shape) // block * size
        if start + offset + num_bytes > len(self._data):
            raise _damaged(
                self._path,
                f"tensor {name!r} ends at byte {start + offset + num_bytes}, and the file has "
                f"{len(self._data)} bytes",
            )
        return GgufTensor(name, shape, type_name, start + offset, num_bytes)

    def _check_overlap(self, tensors: Mapping[str, GgufTensor]) -> None:
        placed = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for one, other in pairwise(placed):
            if one.offset + (one.num_bytes or 1) > other.offset:
                raise _damaged(self._path, f"tensors {one.name!r} and {other.name!r} overlap")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < _DEEPEST:
            return self._array(depth)
        if kind not in _SCALARS:
            raise _damaged(self._path, f"a value of unknown type {kind} at byte {self._at}")
        return _plain(kind, self._scalar(_SCALARS[kind]))

    def _array(self, depth: int) -> list[Any]:
        kind, count = self._scalar("I"), self._scalar("Q")
        code = _SCALARS.get(kind)
        if code is None:
            self._require(count)
            return [self._value(kind, depth + 1) for _ in range(count)]
        self._require(count * struct.calcsize(code))
        values = struct.unpack_from(f"<{count}{code}", self._data, self._at)
        self._at += count * struct.calcsize(code)
        return [_plain(kind, value) for value in values]

    def _string(self) -> str:
        length = self._scalar("Q")
        self._require(length)
        text = self._data[self._at : self._at + length]
        self._at += length
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise _damaged(self._path, f"a text at byte {self._at - length} is no UTF-8") from error

    def _scalar(self, code: str) -> Any:
        size = struct.calcsize(code)
        self._require(size)
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += size
        return value

    def _require(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._at:
            raise _damaged(self._path, "its header is cut off, or has a wrong length")


def _plain(kind: int, value: Any) -> Any:
    """1e-05 for the float32 value 9.999999747e-06: both are the same number in float32."""
    return float(str(np.float32(value))) if kind == 6 else value
