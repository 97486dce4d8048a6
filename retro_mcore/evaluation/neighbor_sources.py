"""Replacements for a chunk's own neighbors: those of another text, random ones, or none.

Each depends only on the saved neighbors, the database and a seed, so all ranks get the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.distributed import get_rank
from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.removed import RemovedChunks

if TYPE_CHECKING:
    from retro_mcore.samples.retro_dataset import RetroDataset

_LOG = logging.getLogger(__name__)

NeighborKind = Literal["real", "shuffled", "random", "none"]
NEIGHBOR_KINDS: tuple[NeighborKind, ...] = ("real", "shuffled", "random", "none")


class NeighborRows(Protocol):
    """Neighbors of consecutive chunks: `retrieval.neighbor_tables.SavedNeighbors`, or derived from
    it."""

    def __len__(self) -> int: ...

    @property
    def num_saved(self) -> int: ...

    def searched(self) -> NDArray[np.bool_]:
        """Whether neighbors were searched for each chunk, bool [rows]. The others hold no text."""

    def rows(self, start: int, end: int) -> np.ndarray:
        """Chunk ids i64 [end - start, num_saved]."""


@dataclass(frozen=True)
class ShuffledNeighbors:
    """Gives each chunk the neighbors of another chunk.

    Attributes:
        neighbors: The chunks' own neighbors.
        donors: int64 [rows]: the row whose neighbors each row gets; -1: none.
    """

    neighbors: NeighborRows
    donors: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.donors)

    @property
    def num_saved(self) -> int:
        """Number of neighbors per chunk."""
        return self.neighbors.num_saved

    def rows(self, start: int, end: int) -> np.ndarray:
        """Neighbors i64 [end - start, num_saved] of the chunks' donors."""
        none = np.full((1, self.num_saved), NO_NEIGHBOR, np.int64)
        donors = self.donors[start:end].tolist()
        return np.concatenate(
            [none if row < 0 else self.neighbors.rows(row, row + 1) for row in donors]
        )

    def searched(self) -> NDArray[np.bool_]:
        """See `NeighborRows.searched`."""
        return self.donors >= 0


@dataclass(frozen=True)
class RandomNeighbors:
    """Gives each chunk uniformly random chunks of the database.

    Attributes:
        has_neighbors: bool [rows]: whether a chunk gets neighbors.
        num_saved: Number of neighbors per chunk.
        database_size: Number of chunks to draw from.
        seed: Seed of the draws.
        removed: Chunks that are not drawn; None: all are.
    """

    has_neighbors: NDArray[np.bool_]
    num_saved: int
    database_size: int
    seed: int
    removed: RemovedChunks | None = None

    def __len__(self) -> int:
        return len(self.has_neighbors)

    def searched(self) -> NDArray[np.bool_]:
        """See `NeighborRows.searched`."""
        return self.has_neighbors

    def rows(self, start: int, end: int) -> np.ndarray:
        """Neighbors i64 [end - start, num_saved]. A row is the same for any range."""
        # Philox depends only on its counter, so a row is drawn without the rows before it.
        size = self.database_size - (0 if self.removed is None else len(self.removed))
        drawn = np.stack(
            [
                np.random.Generator(np.random.Philox(key=self.seed, counter=[0, row, 0, 0]))
                .integers(size, size=self.num_saved)
                for row in range(start, end)
            ]
        )  # fmt: skip
        if self.removed is not None:
            drawn = self.removed.kept_rows(drawn)
        return np.where(self.has_neighbors[start:end, None], drawn, NO_NEIGHBOR)


def change_neighbors(
    neighbors: NeighborRows,
    kind: NeighborKind,
    owners: NDArray[np.int64],
    database_size: int,
    seed: int,
    removed: RemovedChunks | None = None,
) -> NeighborRows:
    """Choose the neighbors to evaluate with.

    Chunks that were not searched stay without neighbors: they hold no words, or only padding.

    Args:
        neighbors: The chunks' own neighbors.
        kind: "shuffled": those of a chunk of another owner. "random": random chunks of the
            database. Otherwise the chunks' own.
        owners: int64 [rows]: the sample or document of each chunk, ascending from 0.
        database_size: Number of chunks in the database.
        seed: Seed of shuffling and random draws.
        removed: Chunks of removed documents, which are not drawn; None: there are none.

    Raises:
        ConfigurationError: no shuffling can give every chunk the neighbors of another owner.
    """
    if kind == "shuffled":
        (rows,) = np.nonzero(neighbors.searched())
        donors = np.full(len(owners), -1, np.int64)
        donors[rows] = rows[shuffled_rows(owners[rows], seed)]
        return ShuffledNeighbors(neighbors, donors)
    if kind == "random":
        searched, saved = neighbors.searched(), neighbors.num_saved
        return RandomNeighbors(searched, saved, database_size, seed, removed)
    return neighbors


def with_neighbors(dataset: RetroDataset, kind: NeighborKind, seed: int) -> RetroDataset:
    """The same samples with other neighbors; see `change_neighbors`."""
    if kind not in ("shuffled", "random"):
        return dataset
    owners = np.repeat(np.arange(len(dataset)), dataset.chunks_per_sample)
    database = dataset.database
    changed: Any = change_neighbors(
        dataset.neighbors, kind, owners, len(database), seed, database.removed
    )
    return replace(dataset, neighbors=changed)


def check_can_shuffle(owners: NDArray[np.int64]) -> None:
    """Check that every chunk can get the neighbors of another sample (or document).

    Args:
        owners: As for `shuffled_rows`.

    Raises:
        ConfigurationError: there is only one sample, or one holds more than half of the chunks.
    """
    largest = int(np.bincount(owners).max()) if len(owners) else 0
    if 2 * largest > len(owners) or not largest:
        raise ConfigurationError(
            "--retro-eval-neighbors",
            f"shuffled, but one text holds {largest} of the {len(owners)} chunks to evaluate",
            "Evaluate more samples or documents, or leave shuffled out",
        )


def possible_kinds(
    kinds: Sequence[NeighborKind], owners: NDArray[np.int64], asked: bool
) -> list[NeighborKind]:
    """Select the possible kinds of neighbors, before any is measured.

    Args:
        kinds: The kinds to measure.
        owners: See `shuffled_rows`.
        asked: Whether the user requested them. Otherwise an impossible "shuffled" is dropped with
            a message.

    Raises:
        ConfigurationError: "shuffled" was requested but is impossible.
    """
    if "shuffled" not in kinds:
        return [*kinds]
    try:
        check_can_shuffle(owners)
    except ConfigurationError as error:
        if asked:
            raise
        if get_rank() == 0:
            _LOG.warning("Measured without shuffled neighbors: %s", error.found)
        return [kind for kind in kinds if kind != "shuffled"]
    return [*kinds]


def shuffled_rows(owners: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A permutation of all chunks that maps each to a chunk of another sample (or document).

    Args:
        owners: int64 [rows]: the sample of each chunk.
        seed: Seed of the permutation.

    Returns:
        int64 [rows]: the row of each chunk's donor.

    Raises:
        ConfigurationError: there is only one sample, or one holds more than half of the chunks.
    """
    check_can_shuffle(owners)
    generator = np.random.default_rng(seed)
    donors = generator.permutation(len(owners))
    for row in np.flatnonzero(owners[donors] == owners):
        own = owners[row]
        if owners[donors[row]] != own:  # corrected by an earlier swap
            continue
        # After a swap with one of these, neither row has a donor in its own sample.
        others = np.flatnonzero((owners != own) & (owners[donors] != own))
        other = generator.choice(others)
        donors[row], donors[other] = donors[other], donors[row]
    return donors
