"""Search only the new chunks of an extended database, where the old chunks' neighbors are known.

An index of lists finds the nearest of the vectors in the lists that it probes. The extended index
has the same lists, so its nearest neighbors are the nearest of those found before and of those
found among the new vectors. So are those of an index without lists, to the byte if it is searched
in blocks: then no distance depends on other chunks. This holds for an aligned project, whose table
of neighbors in the old database has the same rows. It does not hold for graphs, which lead
elsewhere once they have grown, nor for candidates that are sorted anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project.config import Split
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.markers import digest_of, fingerprint_of, verify
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_inputs, recorded_options
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.index import load_index, load_parts
from retro_mcore.retrieval.index.filling import find_parts, first_row_of_new_parts
from retro_mcore.retrieval.index.list_order import ListOrderSearch, supports_list_order
from retro_mcore.retrieval.index.training import IndexKind, kind_of
from retro_mcore.retrieval.neighbor_tables import SavedDistances, SavedNeighbors
from retro_mcore.retrieval.project_search import ProjectSearch, open_search
from retro_mcore.stages.stored_vectors import way_of_embedding

#: Merged databases whose chunks have neighbors in an aligned project.
MERGED: tuple[Split, ...] = ("train", "valid")

#: Name, among the recorded options of a search, of the order in which an index is read.
ORDER = "order of the search"

Known = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class OldNeighbors:
    """Neighbors of a project's chunks in the database that the searched one was extended from.

    Attributes:
        search: The project and the extended database.
        directories: Directories of the neighbors, by merged database.
        num_chunks: Chunks of the old database.
        parts: Parts of the extended index with the new chunks, and with the old ones from
            `first_row` on.
        first_row: Known neighbors from this chunk on are found again.
        fingerprint: Fingerprint of the search that found the neighbors.
    """

    search: ProjectSearch
    directories: Mapping[Split, Path]
    num_chunks: int
    parts: list[Shard]
    first_row: int
    fingerprint: str

    @property
    def num_new(self) -> int:
        """Number of new chunks."""
        return len(self.search.database) - self.num_chunks

    @property
    def num_searched(self) -> int:
        """Number of chunks in the parts."""
        return len(self.search.database) - self.first_row

    def open_index(self, list_order: bool) -> Any:
        """Open an index of the new chunks alone, with the breadth of the whole index.

        Args:
            list_order: Read the index once per search.
        """
        settings, source = self.search.source_settings, self.search.source
        for part in self.parts:
            verify(part.path, f"Remove it, and run build_index --project-dir {source.root}")
        empty = source.empty_index(str(settings.index_string))
        index = load_parts(empty, self.parts, settings.nprobe, settings.ef_search)
        return ListOrderSearch(index) if list_order and supports_list_order(index) else index

    def of(self, split: Split) -> Known:
        """Open one table: returns ids and distances of rows [start, end), both [n, saved].

        All ranks must call this inside `raise_together`.

        Raises:
            CorruptFileError: a file is damaged.
        """
        directory = self.directories[split]
        files = [*directory.glob("*.hdf5"), *directory.glob("distances/*.hdf5")]
        verify_project(self.search.paths, sorted(files))
        removed = self.search.database.removed
        neighbors = SavedNeighbors(directory, self.num_chunks, removed)
        distances = SavedDistances(directory).of(neighbors)

        def known(start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
            ids, found = neighbors.rows(start, end), distances.rows(start, end)
            again = ids >= self.first_row
            return np.where(again, NO_NEIGHBOR, ids), np.where(again, np.float32(np.nan), found)

        return known


def find_old_neighbors(
    search: ProjectSearch, options: Mapping[str, Any], own_inputs: Mapping[str, str]
) -> OldNeighbors | None:
    """Find neighbors from which the search can go on; None if everything must be searched.

    Args:
        search: An aligned project and another database.
        options: Options of the search, as they are recorded.
        own_inputs: Digests of the project's own files that the search reads.

    Raises:
        CorruptFileError: a file of the old database is damaged.
    """
    settings = search.source_settings
    if settings.grown_from is None or options.get("--rerank") or options.get("--rescore"):
        return None
    base = ProjectPaths((search.source.root / settings.grown_from).resolve())
    if base.root == search.paths.root.resolve():
        base = search.paths
    try:
        digests = open_search(search.paths, base).database_digests(False)
    except CorruptFileError:  # found by one rank; the others must not go another way
        raise
    except ProjectError:  # its index is gone, so all chunks are searched
        return None
    # A project's first neighbors have no tag; those after a removal have one.
    tag = f"_{fingerprint_of(digests)[:8]}"
    if base == search.paths and not search.paths.stage_record(f"query_neighbors{tag}").is_file():
        tag = ""
    stage = f"query_neighbors{tag}"
    inputs = recorded_inputs(search.paths, stage)
    if any(inputs.get(name) != digest for name, digest in {**own_inputs, **digests}.items()):
        return None
    if not _are_grouped_as_before(search.database, base):
        return None
    if _decisive(recorded_options(search.paths, stage)) != _decisive(options):
        return None
    directories = {
        split: search.paths.query / f"chunks_{split}{tag}"
        for split in MERGED
        if len(ChunkDatabase.open(search.paths.root, split, own=True))
    }
    found = _new_parts(search, base, in_order=options.get(ORDER) is not None)
    if found is None or not all((path / "distances").is_dir() for path in directories.values()):
        return None
    fingerprint = fingerprint_of([stage, dict(options), inputs])
    return OldNeighbors(search, directories, settings.growth[-1], *found, fingerprint)


def _are_grouped_as_before(database: ChunkDatabase, base: ProjectPaths) -> bool:
    """Whether no new document connects old ones, which then may not retrieve one another."""
    if database.groups is None:
        return True
    old = ChunkDatabase.open(base.root, own=True).groups
    return old is not None and database.groups.extends(old)


def _decisive(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the number of candidates, which decides nothing where none are reranked."""
    return {name: value for name, value in options.items() if name != "--num-neighbors-query"}


def _new_parts(
    search: ProjectSearch, base: ProjectPaths, in_order: bool
) -> tuple[list[Shard], int] | None:
    """The parts with the new chunks, and the first chunk in them.

    None if they are gone, the old index is of another kind, or everything is in them.
    """
    settings, source = search.source_settings, search.source
    string = str(settings.index_string)
    empty = [paths.empty_index(string) for paths in (base, source)]
    if not all(path.is_file() for path in empty) or digest_of(empty[0]) != digest_of(empty[1]):
        return None
    index = load_index(empty[1])
    kind, old, total = kind_of(index), settings.growth[-1], len(search.database)
    blocks = kind is IndexKind.CODES and in_order and supports_list_order(index)
    first = first_row_of_new_parts(old, kind)
    if not (kind is IndexKind.LISTS or (blocks and first)):
        return None
    if way_of_embedding(base) != way_of_embedding(source):
        return None
    block = search.source_config.retro_block_size
    parts = find_parts(source.index_parts(string), total, kind, block, settings.growth)
    new = [part for part in parts if part.start >= first]
    covered = sum(part.end - part.start for part in new) == total - first
    return (new, first) if covered and all(part.path.is_file() for part in new) else None
