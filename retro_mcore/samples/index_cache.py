"""Cache of sample indexes in a project's data/cache.

Cache names depend on the inputs (document lengths and settings), not on the project's location. So
a project that was moved, copied or linked finds its cache, and one whose tokens were replaced does
not use a stale one. Each file has a completion marker. If the cache cannot be written, the indexes
stay in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from retro_mcore.distributed import get_rank
from retro_mcore.errors import ProjectError
from retro_mcore.project.markers import FileState, marker_path, signed_write, state_of

Arrays = tuple[np.ndarray, ...]


class IndexCache:
    """Arrays on disk, by name. Rank 0 writes them before the other ranks read them.

    Args:
        directory: The cache directory; need not exist.
        digests: Digest of each dataset's .idx, by dataset path without suffix.

    Attributes:
        notes: Messages to report: damaged files, or a directory that cannot be written.
    """

    def __init__(self, directory: Path, digests: dict[str, str]) -> None:
        self._directory, self.digests = directory, digests
        self.notes: list[str] = []

    def arrays(self, name: str, parts: Sequence[str], build: Callable[[], Arrays]) -> Arrays:
        """The arrays of `name`: memory-mapped if they are or can be cached, else in memory.

        Args:
            name: Cache name, which covers everything the arrays depend on.
            parts: Name of each array.
            build: Builds the arrays.
        """
        paths = [self._directory / f"{name}-{part}.npy" for part in parts]
        if self._all_whole(paths):
            return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
        built = build()
        if get_rank() != 0:
            return built
        try:
            for path, array in zip(paths, built, strict=True):
                with signed_write(path) as temporary, temporary.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
        except (OSError, ProjectError) as error:  # read-only, or the disk is full
            reason = error.found if isinstance(error, ProjectError) else error.strerror or error
            self._note(
                f"sample indexes are not kept in {self._directory} ({reason}), but in memory"
            )
            for path in paths:  # the other ranks would read a damaged one
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            return built
        return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)

    def _all_whole(self, paths: Sequence[Path]) -> bool:
        # If possible, rank 0 rewrites damaged files before the others check them.
        thoroughly = get_rank() == 0 or not os.access(self._directory, os.W_OK)
        try:
            states = [state_of(path) if thoroughly else _quick_state_of(path) for path in paths]
        except OSError:  # no permission to read, or no directory
            return False
        if FileState.DAMAGED in states and get_rank() == 0:
            self._note(f"damaged sample indexes in {self._directory} are built again")
            for path in paths:
                with suppress(OSError):  # files without markers are ignored
                    marker_path(path).unlink(missing_ok=True)
        return all(state is FileState.COMPLETE for state in states)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _quick_state_of(path: Path) -> FileState:
    both = path.is_file() and marker_path(path).is_file()
    return FileState.COMPLETE if both else FileState.MISSING
