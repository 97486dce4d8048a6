"""Memory-mapped tokens of a Megatron indexed dataset (.bin and .idx), read without megatron.

docs/data_formats.md describes the layout. Sequences are addressed by number. All tokens form one
flat array, so many chunks can be gathered in one call.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.paths import ProjectPaths

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
#: Sequences checked in one call.
_CHECKED = 1 << 20
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}


class TokenSource(Protocol):
    """The tokenized dataset as the chunk database reads it.

    Attributes:
        tokens: All tokens, flat.
        starts: i64 [sequences], position of each sequence's first token in `tokens`.
        lengths: i32 [sequences], number of tokens of each sequence.
        num_documents: Number of documents (equal to sequences if each document is one sequence).
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    num_documents: int


class TokenFile:
    """An indexed dataset on disk, memory-mapped; see `TokenSource`. Picklable.

    Args:
        prefix: Path without .bin and .idx.

    Raises:
        ProjectError: a file is missing.
        CorruptFileError: a file has another format or is truncated.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        idx, binary = idx_path(self.prefix), bin_path(self.prefix)
        for path in (idx, binary):
            if not path.is_file():
                raise ProjectError(path, "no such file", "Run preprocess_corpus first")
        dtype, num_sequences, num_indices = self._read_header(idx)
        layout = (("<i4", num_sequences), ("<i8", num_sequences), ("<i8", num_indices))
        arrays, offset = [], _HEADER.size
        for code, count in layout:
            array = np.memmap(idx, code, "r", offset, (count,)) if count else np.empty(0, code)
            arrays.append(np.asarray(array))  # slicing np.memmap is ten times as slow
            offset += array.nbytes
        self.lengths, pointers, document_indices = arrays
        self.starts = pointers // dtype.itemsize
        self.num_documents = len(document_indices) - 1
        self._check(idx, pointers, document_indices, dtype.itemsize)
        needed = int(self.lengths.sum(dtype=np.int64)) * dtype.itemsize
        if binary.stat().st_size != needed:
            raise CorruptFileError(
                binary,
                f"{binary.stat().st_size} bytes, not {needed}",
                "Run preprocess_corpus again",
            )
        self.tokens = np.asarray(np.memmap(binary, dtype, "r") if needed else np.empty(0, dtype))

    def _check(self, idx: Path, pointers: np.ndarray, documents: np.ndarray, itemsize: int) -> None:
        """Reject an index whose sequences are not contiguous."""
        found, position = None, 0
        for first in range(0, len(self), _CHECKED):
            lengths = self.lengths[first : first + _CHECKED].astype(np.int64)
            ends = position + np.cumsum(lengths) * itemsize
            begins = pointers[first : first + _CHECKED]
            wrong = np.flatnonzero((lengths < 0) | (begins != ends - lengths * itemsize))
            if len(wrong):
                row = int(wrong[0])
                where = f"of {lengths[row]} tokens, at byte {begins[row]}"
                found = f"places sequence {first + row}, {where}"
                break
            position = int(ends[-1])
        if not found and (
            not len(documents)
            or documents[0] != 0
            or documents[-1] != len(self)
            or (documents[1:] < documents[:-1]).any()
        ):
            found = f"its documents do not cover its {len(self)} sequences"
        if found:
            raise CorruptFileError(idx, found, "Restore the file, or run preprocess_corpus again")

    @staticmethod
    def _read_header(idx: Path) -> tuple[np.dtype, int, int]:
        with idx.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise CorruptFileError(idx, "not a Megatron index", "Restore the file")
        _, version, code, num_sequences, num_indices = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise CorruptFileError(idx, f"version {version}, dtype code {code}", "Restore the file")
        needed = _HEADER.size + num_sequences * 12 + num_indices * 8
        if idx.stat().st_size < needed:
            raise CorruptFileError(
                idx, f"{idx.stat().st_size} bytes, not {needed}", "Restore the file"
            )
        return np.dtype(_DTYPES[code]).newbyteorder("<"), num_sequences, num_indices

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple:
        return type(self), (self.prefix,)

    def sequence(self, index: int) -> np.ndarray:
        """The tokens of one sequence."""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]


def bin_path(prefix: Path) -> Path:
    """Path of the token file."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    """Path of the index file."""
    return prefix.with_name(f"{prefix.name}.idx")


def open_token_files(config: ProjectConfig, paths: ProjectPaths) -> Sequence[TokenFile]:
    """Open the project's datasets, in the order of `retro_gpt_data_path`.

    All ranks must call this inside `raise_together`: each verifies the checksums of its share of
    the files.

    Raises:
        ProjectError: a file is missing.
        CorruptFileError: a file is damaged.
    """
    prefixes = [paths.data / prefix for prefix in config.blend[1]]
    verify_project(paths, [path(prefix) for prefix in prefixes for path in (bin_path, idx_path)])
    return [TokenFile(prefix) for prefix in prefixes]
