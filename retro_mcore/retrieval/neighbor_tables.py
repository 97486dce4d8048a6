"""The saved neighbors of every sample's chunks, in upstream's files.

Row `sample · L + chunk` of a split holds chunk ids of the retrieval database, best first.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.host import most_mapped_files
from retro_mcore.project.hdf5 import map_dataset
from retro_mcore.retrieval.removed import RemovedChunks

#: Name of a file with rows [start, end); other files, such as renamed copies, are not read.
_ROWS = re.compile(r"(\d+)-(\d+)")
#: Number of rows whose ids are checked when opening; all others are checked when read.
_LOOKED_AT = 1 << 16
_REPAIR = "Run query_neighbors again"


class SavedNeighbors:
    """The neighbors of a split, memory-mapped. Picklable.

    Args:
        directory: A directory under `query/`.
        num_chunks: Number of chunks in the database, an upper bound of the ids; None: not checked.
        removed: Chunks that are left out of every row that holds them; None: there are none.

    Raises:
        ProjectError: the directory is missing or empty.
        CorruptFileError: a file is unreadable or of the wrong type, rows are missing, or an id is
            not
            in the database.
    """

    _dataset, _kind = "neighbors", "i"
    #: Value of a column without a neighbor.
    _missing: float = NO_NEIGHBOR

    def __init__(
        self,
        directory: Path | str,
        num_chunks: int | None = None,
        removed: RemovedChunks | None = None,
    ) -> None:
        self.directory, self._num_chunks = Path(directory), num_chunks
        self.removed = removed
        found = [(path, _ROWS.fullmatch(path.stem)) for path in self.directory.glob("*.hdf5")]
        bounds = sorted((int(m[1]), int(m[2]), path) for path, m in found if m)
        if not bounds:
            raise ProjectError(self.directory, "holds no neighbors", "Run query_neighbors first")
        self._paths = [path for _, _, path in bounds]
        self._starts, self._ends = np.array([(start, end) for start, end, _ in bounds]).T
        # Shared by all files, since every process opens all of them, and there may be thousands.
        self._looked_at = max(_LOOKED_AT // len(bounds), 1)
        self._width: int | None = None
        self._file = lru_cache(most_mapped_files())(self._open)
        expected = 0
        for number, (start, end, path) in enumerate(bounds):
            if start != expected:
                what = f"begins with row {start}, the files before it end with {expected}"
                raise CorruptFileError(path, what, _REPAIR)
            self._file(number)
            expected = end

    def _open(self, number: int) -> np.ndarray:
        path, start = self._paths[number], self._starts[number]
        rows = map_dataset(path, self._dataset, self._kind, 2)
        if len(rows) != self._ends[number] - start:
            raise CorruptFileError(path, f"holds {len(rows)} rows from {start}", _REPAIR)
        self._width = self._width or rows.shape[1]
        if not rows.shape[1] or rows.shape[1] != self._width:
            raise CorruptFileError(path, f"holds {rows.shape[1]} neighbors per row", _REPAIR)
        self._check(path, rows[: self._looked_at])
        return rows

    def _check(self, path: Path, rows: np.ndarray) -> None:
        if self._num_chunks is None:
            return
        wrong = (rows < NO_NEIGHBOR) | (rows >= self._num_chunks)
        if wrong.any():
            raise CorruptFileError(
                path,
                f"names chunk {rows[wrong][0]}, the database has {self._num_chunks}",
                f"{_REPAIR}, or restore the database",
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple:
        return type(self), (self.directory, self._num_chunks, self.removed)

    @property
    def directories(self) -> list[Path]:
        """Directories under `query/` with the files."""
        return [self.directory]

    def distances(self) -> SavedDistances | None:
        """The distances of these neighbors; None if none were saved.

        Raises:
            CorruptFileError: a file is unreadable, or they belong to other rows.
        """
        saved = (self.directory / "distances").is_dir()
        return SavedDistances(self.directory).of(self) if saved else None

    @property
    def num_saved(self) -> int:
        """Neighbors saved per row."""
        return int(self._file(0).shape[1])

    def searched(self) -> np.ndarray:
        """Whether neighbors were searched for each chunk, bool [rows]: here for all."""
        return np.ones(len(self), bool)

    def rows(self, start: int, end: int) -> np.ndarray:
        """Read rows [start, end), i64 [end - start, num_saved] (distances: f32)."""
        found, removed = self.saved_rows(start, end), self._neighbors.removed
        if removed is None:
            return found
        return self._kept(found, removed.of(self._neighbors.saved_rows(start, end)))

    @property
    def _neighbors(self) -> SavedNeighbors:
        """The neighbors that say which columns of a row are left out."""
        return self

    def _kept(self, found: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """Rows without the marked columns; the columns after them move up."""
        if not gone.any():
            return found
        order = np.argsort(gone, axis=1, kind="stable")
        found = np.take_along_axis(found, order, axis=1)
        found[np.take_along_axis(gone, order, axis=1)] = self._missing
        return found

    def saved_rows(self, start: int, end: int) -> np.ndarray:
        """Rows [start, end) as they were saved, removed neighbors included."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        parts: list[np.ndarray] = []
        while start < end:
            offset = int(self._starts[first])
            stop = min(end, int(self._ends[first]))
            rows = self._file(first)[start - offset : stop - offset]
            self._check(self._paths[first], rows)
            if not parts and stop == end:
                return rows
            parts.append(rows.copy())  # a part of the map would keep its file open
            start, first = stop, first + 1
        return np.concatenate(parts)

    def rows_at(self, rows: np.ndarray) -> np.ndarray:
        """Read rows in any order, i64 [n, num_saved] (distances: f32).

        Args:
            rows: Row numbers [n]; repeated ones are allowed.

        Raises:
            ProjectError: a row does not exist.
            CorruptFileError: an id is not in the database.
        """
        found, removed = self._saved_rows_at(rows), self._neighbors.removed
        if removed is None:
            return found
        return self._kept(found, removed.of(self._neighbors._saved_rows_at(rows)))

    def _saved_rows_at(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        outside = rows[(rows < 0) | (rows >= len(self))]
        if len(outside):
            raise ProjectError(self.directory, f"has no row {outside[0]}", f"It has {len(self)}")
        result = np.empty((len(rows), self.num_saved), self._file(0).dtype)
        of_file = np.searchsorted(self._ends, rows, side="right")
        for file in np.unique(of_file).tolist():
            mine = of_file == file
            found = self._file(file)[rows[mine] - self._starts[file]]
            self._check(self._paths[file], found)
            result[mine] = found
        return result


class SavedDistances(SavedNeighbors):
    """The distances of a split's neighbors as the index returned them, NaN for missing neighbors.

    An L2 index returns squared distances, and a compressing index approximate ones. Directories
    from other programs have no distances.

    Args:
        directory: The directory of the neighbors, under `query/`.
        neighbors: The neighbors, of which removed ones are left out; None: all are kept.

    Raises:
        ProjectError: no distances were saved.
        CorruptFileError: a file is unreadable, or rows are missing.
    """

    _dataset, _kind = "distances", "f"
    _missing = float("nan")

    def __init__(self, directory: Path | str, neighbors: SavedNeighbors | None = None) -> None:
        super().__init__(Path(directory) / "distances")
        self._of = neighbors

    @property
    def _neighbors(self) -> SavedNeighbors:
        return self if self._of is None else self._of

    def of(self, neighbors: SavedNeighbors) -> SavedDistances:
        """Check that these distances belong to `neighbors`, and return them.

        Raises:
            CorruptFileError: they belong to other rows.
        """
        sizes = [(len(saved), saved.num_saved) for saved in (self, neighbors)]
        if sizes[0] != sizes[1]:
            raise CorruptFileError(
                self.directory,
                f"holds {sizes[0]} rows and columns, its neighbors {sizes[1]}",
                "Run query_neighbors again, or remove it",
            )
        self._of = neighbors
        return self

    def __reduce__(self) -> tuple:
        return type(self), (self.directory.parent, self._of)
