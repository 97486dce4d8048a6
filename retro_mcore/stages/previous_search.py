"""Neighbors that a project uses, from which those after a removal follow.

They were found in the same database, before documents were removed from it, or in the one that the
searched database was compacted from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project.config import Split
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.markers import digest_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import (
    recorded_fingerprint,
    recorded_inputs,
    recorded_options,
)
from retro_mcore.retrieval.following_search import FollowingSearch, PreviousTable, count_touched
from retro_mcore.retrieval.index import load_index
from retro_mcore.retrieval.index.training import IndexKind, kind_of
from retro_mcore.retrieval.neighbor_search import NeighborSearch
from retro_mcore.retrieval.neighbor_tables import SavedDistances, SavedNeighbors
from retro_mcore.retrieval.project_search import ProjectSearch, open_search
from retro_mcore.retrieval.removed import INPUT
from retro_mcore.samples.neighbor_check import stage_of_directory
from retro_mcore.stages.stored_vectors import way_of_embedding

#: Recorded options that do not decide which neighbors are found: the number of candidates, since
#: more are searched where it is too small, and how many chunks are embedded or searched together.
_IRRELEVANT = (
    "--num-neighbors-query",
    "order of the search",
    "--embed-batch-size",
    "--embed-batch-tokens",
)


@dataclass(frozen=True)
class PreviousNeighbors:
    """The tables that a search follows.

    Attributes:
        tables: The neighbors, by split or by merged database.
        fingerprint: Fingerprint of the search that found them.
    """

    tables: Mapping[Split, PreviousTable]
    fingerprint: str

    def follow(self, search: NeighborSearch, split: Split) -> FollowingSearch:
        """The search of one table; rows without removed neighbors are copied."""
        return FollowingSearch(
            database=search.database,
            num_query=search.num_query,
            num_save=search.num_save,
            rerank=search.rerank,
            together=search.most_queries(search.num_query) if search.together else 0,
            table=self.tables[split],
        )

    def count_touched(self) -> int:
        """Number of chunks that are searched again."""
        return count_touched(list(self.tables.values()))


def find_previous_neighbors(
    search: ProjectSearch,
    found_in: ProjectPaths,
    options: Mapping[str, Any],
    own_inputs: Mapping[str, str],
) -> PreviousNeighbors | None:
    """Find the neighbors that the project uses now; None if everything must be searched.

    All ranks must call this inside `raise_together`, since each verifies its share of the files.

    Args:
        search: The project and the database to search.
        found_in: The project whose database the neighbors were found in: the searched one, or the
            one that it was compacted from.
        options: Options of the search, as they are recorded.
        own_inputs: Digests of the project's own files that the search reads.

    Raises:
        CorruptFileError: a file is damaged.
    """
    config, paths = search.config, search.paths
    if config.database_paths(paths.root).root.resolve() != found_in.root.resolve():
        return None
    names = config.neighbor_dirs(search.settings)
    compacted = found_in.root.resolve() != search.source.root.resolve()
    if not names or (compacted and not _same_distances(search, found_in, options)):
        return None
    try:
        before = open_search(paths, found_in)
        digests = before.database_digests(bool(options.get("--rescore")))
    except CorruptFileError:
        raise
    except ProjectError:  # its index is gone
        return None
    stages = {stage_of_directory(name) for name in names.values()}
    if len(stages) != 1:
        return None
    (stage,) = stages
    directories = {split: paths.query / name for split, name in names.items()}
    if not all((path / "distances").is_dir() for path in directories.values()):
        return None
    inputs = recorded_inputs(paths, stage)
    if _without_removed(inputs) != _without_removed({**own_inputs, **digests}):
        return None
    if _decisive(recorded_options(paths, stage)) != _decisive(options):
        return None
    removed = before.database.removed
    if removed is None:
        return None
    for directory in directories.values():
        files = [*directory.glob("*.hdf5"), *directory.glob("distances/*.hdf5")]
        verify_project(paths, sorted(files))
    tables = {}
    for split, directory in directories.items():
        neighbors = SavedNeighbors(directory, len(before.database))
        distances = SavedDistances(directory).of(neighbors)
        tables[split] = PreviousTable(before.database, removed, neighbors, distances, compacted)
    return PreviousNeighbors(tables, recorded_fingerprint(paths, stage))


def _without_removed(inputs: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in inputs.items() if name != INPUT}


def _decisive(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _IRRELEVANT}


def _same_distances(
    search: ProjectSearch, found_in: ProjectPaths, options: Mapping[str, Any]
) -> bool:
    """Whether a compacted index gives what the whole one gave, less the removed chunks.

    A graph leads elsewhere without them. Candidates that are sorted anew are others, and BM25
    counts other chunks.
    """
    if options.get("--rerank") or options.get("--rescore"):
        return False
    string = str(search.source_settings.index_string)
    empty = [paths.empty_index(string) for paths in (found_in, search.source)]
    if not all(path.is_file() for path in empty) or digest_of(empty[0]) != digest_of(empty[1]):
        return False
    if kind_of(load_index(empty[1])) is IndexKind.WHOLE:
        return False
    return way_of_embedding(found_in) == way_of_embedding(search.source)
