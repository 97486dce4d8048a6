"""Origins of documents: a side file of ids beside an indexed dataset.

`<prefix>.ids.hdf5` holds `utf8`, u8, all ids concatenated, and `offsets`, u64 [documents + 1].
Other readers of indexed datasets ignore it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from retro_mcore.errors import CorruptFileError
from retro_mcore.project.hdf5 import map_dataset
from retro_mcore.project.integrity import signed_file, verify_files

#: Ids whose lengths are compared in one call.
_BATCH = 1 << 20


def ids_path(prefix: Path) -> Path:
    """The side file of the dataset `prefix` (a path without .bin and .idx)."""
    return prefix.with_name(f"{prefix.name}.ids.hdf5")


def pack_ids(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated UTF-8 of the ids, u8, and the length of each in bytes, i64."""
    # An id from a JSON line may hold a lone surrogate.
    encoded = [value.encode("utf-8", "replace") for value in ids]
    lengths = np.array([len(value) for value in encoded], np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), lengths


def write_ids(path: Path, lengths: np.ndarray, parts: Iterator[np.ndarray]) -> None:
    """Write the side file from packed ids, with one part in memory at a time.

    Args:
        path: The side file.
        lengths: Bytes of every id, i64 [documents].
        parts: The bytes of consecutive ids, u8, in any number of pieces.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    with h5py.File(path, "w") as file:
        file["offsets"] = offsets
        text = file.create_dataset("utf8", (int(offsets[-1]),), np.uint8)
        start = 0
        for part in parts:
            text[start : start + len(part)] = part
            start += len(part)


class DocumentIds:
    """Memory-mapped ids of a dataset's documents. Picklable.

    Args:
        prefix: Path of the dataset, without .bin and .idx.

    Raises:
        CorruptFileError: the side file is damaged.
    """

    def __init__(self, prefix: Path) -> None:
        self._prefix, path = prefix, ids_path(prefix)
        self._offsets, self._text = map_dataset(path, "offsets"), map_dataset(path, "utf8")
        if not len(self._offsets) or int(self._offsets[-1]) != len(self._text):
            raise CorruptFileError(path, "its offsets do not fit its text", "Restore the file")

    @classmethod
    def find(cls, prefix: Path) -> DocumentIds | None:
        """The ids of a dataset; None if it has none (another program tokenized it)."""
        return cls(prefix) if ids_path(prefix).is_file() else None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, document: int) -> str:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        start, end = self._offsets[document : document + 2].tolist()
        return self._text[start:end].tobytes().decode("utf-8")

    def matching(self, wanted: Sequence[bytes]) -> list[int]:
        """Documents whose id is one of `wanted` (UTF-8), ascending."""
        by_length: dict[int, set[bytes]] = {}
        for value in wanted:
            by_length.setdefault(len(value), set()).add(value)
        found = []
        for first in range(0, len(self), _BATCH):
            # Most ids differ in length already, and are not read.
            offsets = self._offsets[first : first + _BATCH + 1].astype(np.int64)
            same = np.flatnonzero(np.isin(np.diff(offsets), list(by_length)))
            for place in same.tolist():
                value = self._text[offsets[place] : offsets[place + 1]].tobytes()
                if value in by_length[len(value)]:
                    found.append(first + place)
        return found

    def __reduce__(self) -> tuple:
        return type(self), (self._prefix,)


class DocumentNames:
    """Readable names of documents, by dataset and document number. Picklable.

    Args:
        prefixes: Paths of the datasets, without .bin and .idx, in dataset order.

    Raises:
        CorruptFileError: a side file is damaged.
    """

    def __init__(self, prefixes: Sequence[Path]) -> None:
        self._prefixes = list(prefixes)
        signed = [file for prefix in prefixes if (file := signed_file(ids_path(prefix)))]
        verify_files(signed, lambda path: "Run preprocess_corpus again, or restore the file")
        self._ids = [DocumentIds.find(prefix) for prefix in prefixes]

    def __reduce__(self) -> tuple:
        return type(self), (self._prefixes,)

    def id_of(self, dataset: int, document: int) -> str | None:
        """The document's id; None if its dataset has no ids."""
        ids = self._ids[dataset]
        return None if ids is None else ids[document]

    def describe(self, dataset: int, document: int) -> str:
        """`ID (document N of DATASET)`, or without the id if there is none."""
        place = f"document {document} of {self._prefixes[dataset].name}"
        found = self.id_of(dataset, document)
        return place if found is None else f"{found} ({place})"
