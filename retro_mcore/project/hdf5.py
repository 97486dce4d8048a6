"""Memory-map datasets in HDF5 files: a contiguous dataset is plain bytes at an offset."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from retro_mcore.errors import CorruptFileError

#: Exceptions that h5py raises for damaged files, or if a name refers to something else.
_UNREADABLE = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError)
#: Maximum expansion of a compressed byte: the limit of deflate.
_DENSEST = 1032
_KINDS = {"f": "floating-point numbers", "i": "integers", "u": "integers"}
_REPAIR = "Build or restore it again"


def map_dataset(
    path: Path, name: str, kind: str | None = None, ndim: int | None = None, columns: int = 0
) -> np.ndarray:
    """Map the dataset `name` of an HDF5 file, read-only and without copying.

    A dataset that is not contiguous (compressed by another program) is read into memory.

    Args:
        path: The file.
        name: Name of the dataset.
        kind: "f" for floating-point numbers, "i" for integers, signed or not; None: any.
        ndim: Required number of axes; None: any.
        columns: Required length of the last axis; 0: any.

    Raises:
        CorruptFileError: the file is not HDF5 or is truncated, or the dataset is missing or has
            another type or shape.
    """
    try:
        with h5py.File(path, "r") as file:
            dataset = file[name]
            _check_is_inside(path, name, file, dataset)
            shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
            _check_type(path, name, shape, dtype, kind, ndim, columns)
            # Checked before anything of that size is allocated or mapped.
            size, needed = path.stat().st_size, dataset.size * dtype.itemsize
            if offset is None and needed <= _DENSEST * size:
                return dataset[:]
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptFileError(path, f"unreadable ({reason})", _REPAIR) from error
    if offset is None or offset + needed > size:
        raise CorruptFileError(
            path, f"{size} bytes, too few for {name!r} of shape {shape}", _REPAIR
        )
    # A plain array on the map, since slicing np.memmap is ten times as slow.
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


def release_pages(rows: np.ndarray) -> None:
    """Take what was read of a mapped dataset out of this process's memory.

    The system keeps it as cached file pages, from which it is mapped again when it is needed. A
    dataset that is not mapped stays as it is.
    """
    owner: Any = rows
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def _check_is_inside(path: Path, name: str, file: h5py.File, dataset: h5py.Dataset) -> None:
    """Reject a dataset whose numbers are in another file, at offsets of that file."""
    if dataset.file != file or dataset.external or dataset.is_virtual:
        raise CorruptFileError(path, f"{name!r} refers to another file", _REPAIR)


def _check_type(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    kind: str | None,
    ndim: int | None,
    columns: int,
) -> None:
    numbers = {"f": "f", "i": "iu", "u": "iu", None: "biuf"}[kind]
    if dtype.kind not in numbers:
        wanted = _KINDS.get(kind or "", "numbers")
        raise CorruptFileError(path, f"{name!r} holds {dtype}, not {wanted}", _REPAIR)
    if (ndim is not None and len(shape) != ndim) or (columns and shape[-1] != columns):
        wanted = f"{ndim} axes" + (f", the last of {columns}" if columns else "")
        raise CorruptFileError(path, f"{name!r} has shape {list(shape)}, not {wanted}", _REPAIR)


def read_counts(path: Path) -> np.ndarray:
    """Read the small dataset "counts" of a file, i64; empty if the writer counted nothing.

    Raises:
        CorruptFileError: the file is unreadable.
    """
    try:
        with h5py.File(path, "r") as file:
            return file["counts"][:].astype(np.int64) if "counts" in file else np.empty(0, np.int64)
    except _UNREADABLE as error:
        raise CorruptFileError(path, f"unreadable ({error})", _REPAIR) from error
