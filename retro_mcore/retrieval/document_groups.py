"""Groups of near-duplicate documents, none of which retrieves another of its group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_mcore.data.near_duplicates.files import groups_path, map_groups, read_groups
from retro_mcore.distributed import get_rank
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths


class DocumentGroups:
    """Group of each document of a project. Memory-mapped, picklable.

    Args:
        folder: Folder of the project's datasets.
        sizes: Number of documents of each dataset.

    Raises:
        CorruptFileError: the file is missing or damaged.
    """

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._folder, self._sizes = folder, list(sizes)
        #: Group of each document, numbered over all datasets, i64 [documents].
        self.numbers = map_groups(folder, sum(sizes))
        self._firsts = np.cumsum([0, *sizes])[:-1]

    @classmethod
    def open(cls, paths: ProjectPaths, sizes: Sequence[int]) -> DocumentGroups | None:
        """Open the groups of a project; None if near-duplicates may retrieve one another.

        Raises:
            CorruptFileError: the file is missing or damaged.
        """
        if not excludes_neighbors(paths):
            return None
        if get_rank() == 0:  # one rank reads all of it
            read_groups(paths.data, sum(sizes))
        return cls(paths.data, sizes)

    def __reduce__(self) -> tuple:
        return type(self), (self._folder, self._sizes)

    def of(self, dataset: np.ndarray | int, documents: np.ndarray) -> np.ndarray:
        """Group of documents, i64 of their shape."""
        return self.numbers[self._firsts[dataset] + np.asarray(documents, np.int64)]

    def extends(self, old: DocumentGroups) -> bool:
        """Whether the documents of `old`, which come first, are grouped as they were."""
        return bool(np.array_equal(self.numbers[: len(old.numbers)], old.numbers))


def excludes_neighbors(paths: ProjectPaths) -> bool:
    """Whether near-duplicates are kept out of each other's neighbors in a project."""
    return ProjectSettings.load(paths.root).near_duplicates == "exclude-neighbors"


def group_files(paths: ProjectPaths) -> list[Path]:
    """Files that decide which near-duplicates are left out of the neighbors."""
    return [groups_path(paths.data)] if excludes_neighbors(paths) else []
