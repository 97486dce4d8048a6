"""Files about near-duplicates beside the datasets of a project.

`<prefix>.minhash.hdf5` holds `keys`, u64 [bands, documents], and `digests`, u64 [documents].
`near_duplicates.hdf5` holds `groups`, i64 [documents of all datasets]: the number of the first
document of each document's group.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from retro_mcore.errors import CorruptFileError
from retro_mcore.project.hdf5 import map_dataset
from retro_mcore.project.markers import signed_write, verify

_REPAIR = "Run preprocess_corpus or update_db again"


def keys_path(prefix: Path) -> Path:
    """File of the keys of the dataset `prefix` (a path without .bin and .idx)."""
    return prefix.with_name(f"{prefix.name}.minhash.hdf5")


def groups_path(folder: Path) -> Path:
    """File of the groups of the documents of all datasets in a folder."""
    return folder / "near_duplicates.hdf5"


@dataclass(frozen=True)
class DocumentKeys:
    """Keys of a dataset's documents.

    Attributes:
        keys: u64 [bands, documents].
        digests: u64 [documents].
    """

    keys: np.ndarray
    digests: np.ndarray

    @classmethod
    def read(cls, prefix: Path) -> DocumentKeys:
        """Map the keys of a dataset.

        Raises:
            CorruptFileError: the file is missing or damaged.
        """
        path = keys_path(prefix)
        verify(path, _REPAIR)
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> DocumentKeys:
        """Map a file of keys, which has been verified.

        Raises:
            CorruptFileError: the file is damaged.
        """
        found = cls(map_dataset(path, "keys", "u", 2), map_dataset(path, "digests", "u", 1))
        if found.keys.shape[1] != len(found.digests):
            raise CorruptFileError(path, "its keys do not fit its digests", _REPAIR)
        return found

    def write(self, path: Path) -> None:
        """Write the keys."""
        with h5py.File(path, "w") as file:
            file["keys"], file["digests"] = self.keys, self.digests

    def of(self, kept: np.ndarray) -> DocumentKeys:
        """Keys of some documents, given as bool [documents]."""
        return DocumentKeys(self.keys[:, kept], self.digests[kept])


def read_groups(folder: Path, num_documents: int) -> np.ndarray:
    """Map the groups of all documents after verifying them, i64 [documents].

    Raises:
        CorruptFileError: the file is missing or damaged, or holds those of other documents.
    """
    path = groups_path(folder)
    verify(path, _REPAIR)
    groups = map_groups(folder, num_documents)
    if (groups < 0).any() or (groups > np.arange(len(groups))).any():
        raise CorruptFileError(path, "holds impossible numbers", _REPAIR)
    return groups


def map_groups(folder: Path, num_documents: int) -> np.ndarray:
    """Map the groups of all documents, i64 [documents].

    Raises:
        CorruptFileError: the file is unreadable, or holds those of other documents.
    """
    path = groups_path(folder)
    groups = map_dataset(path, "groups", "i", 1)
    if len(groups) != num_documents:
        raise CorruptFileError(
            path, f"holds groups of {len(groups)} documents, not {num_documents}", _REPAIR
        )
    return groups


def write_groups(folder: Path, groups: np.ndarray, fingerprint: str) -> None:
    """Write the groups of all documents, on rank 0."""
    path = groups_path(folder)
    with signed_write(path, fingerprint) as temporary, h5py.File(temporary, "w") as file:
        file["groups"] = groups
