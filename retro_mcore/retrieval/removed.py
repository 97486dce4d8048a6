"""Documents that were removed from a chunk database (`update_db --remove`).

The database keeps their chunks until it is compacted. The files of db/removed/ name the documents,
and everything that opens the database leaves their chunks out. They only ever shrink what is
retrieved, so they are right with any saved neighbors, old or new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retro_mcore.errors import CorruptFileError
from retro_mcore.project.arrays import load_array, save_array
from retro_mcore.project.atomic import atomic_write
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.markers import FileState, signed_write, state_of, verify
from retro_mcore.project.paths import ProjectPaths

#: Name of the removed documents among the inputs of a search.
INPUT = "removed documents"
_HINT = "Restore the files, or remove the documents again"


@dataclass(frozen=True)
class RemovedChunks:
    """The rows of a chunk database that must not be retrieved. Picklable.

    Attributes:
        starts: First row of each removed document, i64 [documents], ascending.
        ends: Row after its last one, i64 [documents].
    """

    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        """Number of removed chunks."""
        return int((self.ends - self.starts).sum())

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Mark the removed ones among chunk ids of any shape, bool; NO_NEIGHBOR is not removed."""
        place = np.searchsorted(self.starts, ids, side="right") - 1
        return (place >= 0) & (np.asarray(ids) < self.ends[place])

    def before(self, rows: np.ndarray) -> np.ndarray:
        """Number of removed chunks before each row, i64 of the shape of `rows`."""
        sizes = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        place = np.searchsorted(self.starts, rows, side="left")
        inside = np.where(place > 0, self.ends[np.maximum(place - 1, 0)] - rows, 0)
        return sizes[place] - np.maximum(inside, 0)

    def kept_rows(self, places: np.ndarray) -> np.ndarray:
        """Rows of the n-th chunks that are left, i64 of the shape of `places`."""
        sizes = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        return places + sizes[np.searchsorted(self.starts - sizes[:-1], places, side="right")]

    def kept(self, count: int) -> np.ndarray:
        """The other rows of a database of `count` chunks, i64, ascending."""
        return np.flatnonzero(~self.of(np.arange(count)))


def find_removed(chunks: np.ndarray, documents: np.ndarray) -> RemovedChunks | None:
    """The rows of some documents; None if the database holds none of their chunks.

    Args:
        chunks: Rows of the database, u32 [rows, 5], in order of dataset and document.
        documents: Dataset and document, i64 [documents, 2], sorted.
    """
    starts = _first_rows(chunks, documents)
    ends = _first_rows(chunks, documents + np.array([0, 1]))
    held = starts < ends
    return RemovedChunks(starts[held], ends[held]) if held.any() else None


def _first_rows(chunks: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """First row at or after each document, by binary search, i64 [documents]."""
    low = np.zeros(len(documents), np.int64)
    high = np.full(len(documents), len(chunks), np.int64)
    for _ in range(len(chunks).bit_length()):
        middle = (low + high) // 2
        found = chunks[np.minimum(middle, len(chunks) - 1), :2].astype(np.int64)
        before = found[:, 0] < documents[:, 0]
        before |= (found[:, 0] == documents[:, 0]) & (found[:, 1] < documents[:, 1])
        before &= middle < high
        low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
    return low


def lineage(paths: ProjectPaths) -> Iterator[ProjectPaths]:
    """A project, the project that its database was extended or compacted from, and so on.

    Datasets keep their numbers from one to the next. A project that is gone ends the line.
    """
    seen: set[Path] = set()
    while paths.root not in seen and (not seen or paths.written_config.is_file()):
        seen.add(paths.root)
        yield paths
        settings = ProjectSettings.load(paths.root)
        base = settings.grown_from or settings.compacted_from
        if base is None:
            return
        paths = ProjectPaths((paths.root / base).resolve())


def removed_documents(paths: ProjectPaths) -> np.ndarray:
    """All documents that a project's database must not give, i64 [documents, 2], sorted.

    They were removed from it, or from a database that it was made from.

    Raises:
        CorruptFileError: a file is missing or damaged.
    """
    return union(*(_recorded(each) for each in lineage(paths)))


def verify_removed(paths: ProjectPaths) -> int:
    """Verify the files of removed documents of a project and its updates; returns their number.

    Raises:
        CorruptFileError: a file is missing or damaged.
    """
    updates = [ProjectPaths(path) for path in sorted(paths.grown("").glob("*"))]
    projects = [each for each in (paths, *updates) if each.written_config.is_file()]
    for each in projects:
        _recorded(each)
    return sum(len(list(each.removed_documents.glob("*.npy"))) for each in projects)


def left_out_documents(paths: ProjectPaths) -> np.ndarray:
    """Documents that build_db leaves out, i64 [documents, 2], sorted.

    Raises:
        CorruptFileError: the file is damaged.
    """
    path = paths.left_out_documents
    if not path.is_file():
        return _NONE
    verify(path, _HINT)
    return _read(path)


def save_left_out(paths: ProjectPaths, documents: np.ndarray) -> None:
    """Write the documents that build_db leaves out. Only rank 0 calls this, before build_db."""
    if state_of(paths.left_out_documents) is not FileState.COMPLETE:
        with signed_write(paths.left_out_documents) as temporary:
            save_array(temporary, documents.astype(np.int64))


def add_removed(paths: ProjectPaths, documents: np.ndarray) -> None:
    """Add documents to those that a project's database must not give. Only rank 0 calls this.

    One rename removes all of them. The settings, which make older versions refuse the project, are
    written after it.
    """
    before = _recorded(paths)
    now = union(before, documents)
    if len(now) > len(before):
        # A new file with a name of its own, since replacing a signed one takes two renames.
        path = paths.removed_documents / f"{digest_of_documents(documents)}.npy"
        with atomic_write(path) as temporary:
            save_array(temporary, documents.astype(np.int64))
    settings = ProjectSettings.load(paths.root)
    if settings.removed_documents != len(now):
        replace(settings, removed_documents=len(now)).save(paths.root)


def union(*documents: np.ndarray) -> np.ndarray:
    """All documents of several lists, i64 [documents, 2], sorted, each once."""
    return np.unique(np.concatenate([_NONE, *documents]), axis=0)


def digest_of_documents(documents: np.ndarray) -> str:
    """Digest of a sorted list of documents."""
    encoded = np.ascontiguousarray(documents, "<i8").tobytes()
    return hashlib.sha256(encoded).hexdigest()[:32]


_NONE = np.empty((0, 2), np.int64)


def _recorded(paths: ProjectPaths) -> np.ndarray:
    """The documents in a project's own files."""
    # The count is written after the file, so it is read before.
    count = ProjectSettings.load(paths.root).removed_documents
    files = sorted(paths.removed_documents.glob("*.npy"))
    documents = union(*map(_read_named, files))
    if len(documents) < count:
        raise CorruptFileError(
            paths.removed_documents,
            f"names {len(documents)} documents, but {count} were removed",
            _HINT,
        )
    return documents


def _read_named(path: Path) -> np.ndarray:
    """Read a file whose name is the digest of its documents."""
    documents = _read(path)
    if digest_of_documents(documents) != path.stem:
        raise CorruptFileError(path, "its documents differ from its name: it is damaged", _HINT)
    return documents


def _read(path: Path) -> np.ndarray:
    documents = load_array(path, (None, 2), "i", _HINT)
    if not np.array_equal(documents, union(documents)) or (documents < 0).any():
        raise CorruptFileError(path, "does not name documents in their order", _HINT)
    return documents
