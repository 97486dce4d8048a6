"""Datasets of HDF5 files as memory maps: contiguous datasets are plain bytes at an offset."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from retro_mcore.errors import CorruptFileError

#: What h5py raises on a file that is damaged, or that holds something else under a name.
_UNREADABLE = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError)
#: Bytes that a byte of a compressed file may stand for: deflate's utmost.
_DENSEST = 1032
_KINDS = {"f": "floating-point numbers", "i": "integers", "u": "integers"}
_MEND = "Build or restore it again"


def map_dataset(
    path: Path, name: str, kind: str | None = None, ndim: int | None = None, columns: int = 0
) -> np.ndarray:
    """The dataset `name` of an HDF5 file, read-only, without copying.

    A dataset that is not contiguous (another writer compressed it) is read whole.

    Args:
        path: The file.
        name: Of the dataset.
        kind: "f" for floating-point numbers, "i" for integers, signed or not; None: whatever.
        ndim: Axes that it must have; None: any.
        columns: Length of its last axis; 0: any.

    Raises:
        CorruptFileError: not an HDF5 file, truncated, without that dataset, or one of another type
            or shape.
    """
    try:
        with h5py.File(path, "r") as file:
            dataset = file[name]
            shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
            _check_type(path, name, shape, dtype, kind, ndim, columns)
            # Before anything of that size is allocated or mapped.
            size, needed = path.stat().st_size, dataset.size * dtype.itemsize
            if offset is None and needed <= _DENSEST * size:
                return dataset[:]
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptFileError(path, f"unreadable ({reason})", _MEND) from error
    if offset is None or offset + needed > size:
        raise CorruptFileError(path, f"{size} bytes, too few for {name!r} of shape {shape}", _MEND)
    # A plain array on the map: slices of numpy's own class cost ten times as much.
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


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
        raise CorruptFileError(path, f"{name!r} holds {dtype}, not {wanted}", _MEND)
    if (ndim is not None and len(shape) != ndim) or (columns and shape[-1] != columns):
        wanted = f"{ndim} axes" + (f", the last of {columns}" if columns else "")
        raise CorruptFileError(path, f"{name!r} has shape {list(shape)}, not {wanted}", _MEND)


def read_counts(path: Path) -> np.ndarray:
    """The small dataset "counts" of a file, i64; empty where its writer counted nothing.

    Raises:
        CorruptFileError: the file is unreadable.
    """
    try:
        with h5py.File(path, "r") as file:
            return file["counts"][:].astype(np.int64) if "counts" in file else np.empty(0, np.int64)
    except _UNREADABLE as error:
        raise CorruptFileError(path, f"unreadable ({error})", _MEND) from error
