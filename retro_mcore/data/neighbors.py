"""The saved neighbors of every sample's chunks, in upstream's files.

Row `sample · L + chunk` of a split holds chunk ids of the retrieval database, best first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retro_mcore.data.hdf5 import map_dataset
from retro_mcore.errors import CorruptFileError, ProjectError


class SavedNeighbors:
    """The neighbors of a split, memory-mapped. Picklable.

    Args:
        directory: A directory under `query/`.

    Raises:
        ProjectError: it is missing or empty.
        CorruptFileError: a file is unreadable, or rows are missing.
    """

    _dataset = "neighbors"

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        paths = sorted(self.directory.glob("*.hdf5"))
        if not paths:
            raise ProjectError(self.directory, "holds no neighbors", "Run query_neighbors first")
        bounds = [tuple(int(part) for part in path.stem.split("-")) for path in paths]
        self._files = []
        expected = 0
        for path, (start, end) in zip(paths, bounds, strict=True):
            rows = map_dataset(path, self._dataset)
            if start != expected or rows.ndim != 2 or len(rows) != end - start:
                raise CorruptFileError(
                    path, f"holds {len(rows)} rows from {start}", "Run query_neighbors again"
                )
            self._files.append(rows)
            expected = end
        self._ends = np.array([end for _, end in bounds])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple:
        return type(self), (self.directory,)

    @property
    def num_saved(self) -> int:
        """Neighbors saved per row."""
        return int(self._files[0].shape[1])

    def rows(self, start: int, end: int) -> np.ndarray:
        """i64 [end - start, num_saved] (distances: f32)."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < end:
            offset = int(self._ends[first - 1]) if first else 0
            stop = min(end, int(self._ends[first]))
            parts.append(self._files[first][start - offset : stop - offset])
            start, first = stop, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class SavedDistances(SavedNeighbors):
    """The distances of a split's neighbors as the index gave them, NaN where there is none.

    Squared for an L2 index, and approximate for one that compresses. Directories of other writers
    have none.

    Args:
        directory: The directory of the neighbors, under `query/`.

    Raises:
        ProjectError: no distances were saved.
        CorruptFileError: a file is unreadable, or rows are missing.
    """

    _dataset = "distances"

    def __init__(self, directory: Path | str) -> None:
        super().__init__(Path(directory) / "distances")

    def __reduce__(self) -> tuple:
        return type(self), (self.directory.parent,)
