"""Datasets of HDF5 files as memory maps: contiguous datasets are plain bytes at an offset."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from retro_mcore.errors import CorruptFileError


def map_dataset(path: Path, name: str) -> np.ndarray:
    """The dataset `name` of an HDF5 file, read-only, without copying.

    A dataset that is not contiguous (another writer compressed it) is read whole.

    Raises:
        CorruptFileError: not an HDF5 file, truncated, or without that dataset.
    """
    try:
        with h5py.File(path, "r") as file:
            dataset = file[name]
            offset = dataset.id.get_offset()
            if offset is None:
                return dataset[:]
            shape, dtype = dataset.shape, dataset.dtype
    except (OSError, KeyError) as error:
        raise CorruptFileError(
            path, f"unreadable ({error})", "Build or restore it again"
        ) from error
    # A plain array on the map: slices of numpy's own class cost ten times as much.
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))
