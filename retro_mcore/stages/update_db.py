"""Stage `update_db`: more or fewer documents, or another database, for the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from retro_mcore.distributed import barrier, get_rank, initialize, raise_together
from retro_mcore.errors import (
    ConfigurationError,
    ProjectError,
    check_all,
    flag_of,
    raise_problems,
    too_small,
)
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import stage_report
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.precision import Precision
from retro_mcore.retrieval.neighbor_search import NUM_QUERY
from retro_mcore.stages import build_db, build_index, query_neighbors
from retro_mcore.stages.configuration import Project, project_paths, recorded_config
from retro_mcore.stages.database_fit import check_database_fits
from retro_mcore.stages.derived_databases import append_documents, compact_database
from retro_mcore.stages.embedding_choice import explicit_precision
from retro_mcore.stages.removal import RemovalReport, read_names, remove_documents
from retro_mcore.time_limit import DataTimeLimit

STAGE = "update_db"
_LEAST = {
    "num_neighbors_query": 1,
    "num_neighbors_save": 1,
    "embed_batch_size": 1,
    "embed_batch_tokens": 1,
}
#: Options that say how documents of --append are read.
_OF_APPENDED = ("json_keys", "id_key", "clean_text")
#: Options of a search of all chunks.
_OF_SEARCH = ("num_neighbors_query", "num_neighbors_save")


@dataclass(kw_only=True)
class UpdateDbConfig(DataTimeLimit):
    """Configuration of `update_db`: one change of the database, and how to search."""

    append: list[str] = field(default_factory=list)
    """New documents, in any form that preprocess_corpus --input accepts."""
    exchange: str | None = None
    """Another project, after build_index, whose database replaces this one's. The project itself:
    return to its own database."""
    remove: list[str] = field(default_factory=list)
    """Documents that must not be retrieved any more, by the corpus's id or as DATASET:NUMBER. Text
    in training data stays."""
    remove_file: str | None = None
    """File that names such documents, one per line."""
    compact: bool = False
    """Rebuild database and index without the removed documents, beside the old ones. With --remove:
    after these are removed."""
    json_keys: list[str] = field(default_factory=list)
    """Keys of a JSON line of --append that contain the text (default: as for the project)."""
    id_key: str | None = None
    """Key of a JSON line of --append that contains its id (default: as for the project)."""
    clean_text: bool = False
    """Clean texts of --append with ftfy, even if the project's were not cleaned."""
    num_neighbors_query: int | None = None
    """Candidates to search per chunk (default: as before; if that was the default, 200, or all of a
    smaller database)."""
    num_neighbors_save: int | None = None
    """Neighbors to save per chunk (default: as before)."""
    embed_batch_size: int | None = None
    """Samples' chunks per forward pass of the embedder (default: as before, in chunks or in
    tokens)."""
    embed_batch_tokens: int | None = None
    """Tokens of the samples' chunks per forward pass, padding included, instead of a number of
    chunks (default: as before)."""
    embed_precision: Precision | None = None
    """Precision that the samples' chunks are embedded in: fp32, fp16, bf16 or int8 (default: as
    before); see build_index."""
    embed_fp16: bool = False
    """The same as --embed-precision fp16."""
    device: str = "auto"
    """Device of the embedder: auto, cpu or cuda."""
    faiss_gpu: bool | None = None
    """Use GPUs if Faiss supports them (default: as build_index and query_neighbors did)."""
    verify: bool = False
    """Verify the checksums of all files that are read, however large (default: up to 8 GiB per
    process)."""


#: Report of a stage run by update_db.
StageReport: TypeAlias = (
    build_db.BuildDbReport | build_index.BuildIndexReport | query_neighbors.QueryNeighborsReport
)


@dataclass(frozen=True)
class UpdateDbReport:
    """Database that a project was switched to.

    Attributes:
        project: Project whose database is now used.
        num_chunks: Number of chunks in the new database.
        num_before: Number of chunks that were retrieved from before.
        report: Counts of what was read, dropped and replaced in `append`, by name.
        database: Report of build_db on the extended project; None without `append`.
        index: Report of build_index on it; None without `append`.
        neighbors: Report of query_neighbors; None if nothing was searched.
        removal: The removed documents; None without `remove`.
        num_removed: Number of chunks in the database that are not retrieved.
    """

    project: Path
    num_chunks: int
    num_before: int
    report: dict[str, Any] = field(default_factory=dict)
    database: build_db.BuildDbReport | None = None
    index: build_index.BuildIndexReport | None = None
    neighbors: query_neighbors.QueryNeighborsReport | None = None
    removal: RemovalReport | None = None
    num_removed: int = 0


def run(
    project: Project,
    config: UpdateDbConfig,
    on_stage: Callable[[StageReport], None] = lambda report: None,
) -> UpdateDbReport:
    """Change the database that a project's samples retrieve from, on all ranks.

    Args:
        project: Project directory, after query_neighbors.
        config: Configuration of this stage.
        on_stage: Called with the report of each stage as soon as that stage has finished.

    Raises:
        ProjectError: a stage has not run on one of the projects, the projects do not match, another
            run works on the project, or the disk is full.
        ConfigurationError: the configuration is invalid.
        CorpusError: an input is missing, empty or malformed.
    """
    initialize(
        timeout_minutes=config.distributed_timeout_minutes,
        stall_minutes=config.stall_timeout_minutes,
    )
    paths = project_paths(project)
    with stage_lock(paths, STAGE):
        with raise_together():
            _check(config, paths)
            project_config = ProjectConfig.load(paths.root)
            if not _has_neighbors(paths, project_config):
                raise ProjectError(
                    paths.config, "names no neighbors", "Run all stages on the project first"
                )
            before = ChunkDatabase.open(paths.root)
        database, index, neighbors, removal = None, None, None, None
        target = project_config.database_paths(paths.root)
        if config.append:
            target, database, index = append_documents(config, target, paths, on_stage)
            neighbors = _switch(config, paths, project_config, target)
        elif config.exchange is not None:
            target = ProjectPaths(config.exchange)
            neighbors = _exchange(config, paths, project_config, target)
        else:
            removal = _remove(config, paths)
            neighbors = _search_again(config, paths, target)
        if neighbors is not None:
            on_stage(neighbors)
        if config.compact and neighbors is not None:
            base = target
            target, database, index = compact_database(config, base, paths, on_stage)
            neighbors = _follow(config, paths, target, base)
            on_stage(neighbors)
        with raise_together():
            now = ChunkDatabase.open(paths.root)
    counts = stage_report(target, STAGE) if config.append else {}
    return UpdateDbReport(
        project=target.root,
        num_chunks=len(now),
        num_before=before.num_retrieved,
        report=counts,
        database=database,
        index=index,
        neighbors=neighbors,
        removal=removal,
        num_removed=len(now) - now.num_retrieved,
    )


def _has_neighbors(paths: ProjectPaths, config: ProjectConfig) -> bool:
    """Whether neighbors were searched in the project's own database."""
    chunks = ProjectSettings.load(paths.root).chunk_neighbor_dirs or {}
    return any(
        name is not None for name in (*config.retro_neighbor_dirs.values(), *chunks.values())
    )


def _check(config: UpdateDbConfig, paths: ProjectPaths) -> None:
    check_all(
        lambda: raise_problems(list(_problems(config, paths))),
        lambda: explicit_precision(config.embed_precision, config.embed_fp16),
    )


def _problems(config: UpdateDbConfig, paths: ProjectPaths) -> Iterator[ConfigurationError]:
    if config.append and config.exchange is not None:
        yield ConfigurationError(
            "--append and --exchange", "both given", "Give new documents, or another project"
        )
    removes = bool(config.remove) or config.remove_file is not None or config.compact
    adds = bool(config.append) or config.exchange is not None
    if not removes and not adds:
        yield ConfigurationError(
            "--append and --exchange",
            "neither given, nor --remove or --compact",
            "Give new documents, another project, or documents to remove",
        )
    if removes and adds:
        yield ConfigurationError(
            "--remove and --compact",
            f"given with {'--append' if config.append else '--exchange'}",
            "Run update_db twice",
        )
    yield from too_small(config, _LEAST)
    if config.embed_batch_size is not None and config.embed_batch_tokens is not None:
        yield ConfigurationError(
            "--embed-batch-tokens", "given with --embed-batch-size", "Give one of them"
        )
    returns = config.exchange is not None and ProjectPaths(config.exchange).root == paths.root
    if (removes or returns) and (given := _given(config, _OF_SEARCH)):
        what = "--remove or --compact" if removes else "--exchange of the project itself"
        yield ConfigurationError(
            given,
            f"given with {what}",
            "Leave it out: most neighbors stay as they were searched",
        )
    if not config.append and (given := _given(config, _OF_APPENDED)):
        yield ConfigurationError(
            given, "given without --append", "Leave it out: no documents are read"
        )


def _given(config: UpdateDbConfig, names: tuple[str, ...]) -> str:
    """The flags among `names` that are given; empty if none is."""
    return " and ".join(flag_of(name) for name in names if getattr(config, name))


def _switch(
    config: UpdateDbConfig,
    paths: ProjectPaths,
    project_config: ProjectConfig,
    target: ProjectPaths,
) -> query_neighbors.QueryNeighborsReport:
    with raise_together():
        check_database_fits(paths, project_config, target)
        query_config = _query_config(config, paths)
    return query_neighbors.query_other_database(paths, query_config, target)


def _exchange(
    config: UpdateDbConfig,
    paths: ProjectPaths,
    project_config: ProjectConfig,
    target: ProjectPaths,
) -> query_neighbors.QueryNeighborsReport | None:
    """Use another project's database, or the project's own again; None if nothing is searched."""
    if target.root == paths.root:
        _return(paths, project_config)
    elif target.root != project_config.database_paths(paths.root).root:
        return _switch(config, paths, project_config, target)
    found = _search_again(config, paths, target)
    if found is None and target.root != paths.root:
        return _switch(config, paths, project_config, target)
    return found


def _remove(config: UpdateDbConfig, paths: ProjectPaths) -> RemovalReport | None:
    """Remove the documents that were named, if any."""
    with raise_together():
        names = read_names(config.remove, config.remove_file)
    return remove_documents(paths, names) if names else None


def _search_again(
    config: UpdateDbConfig, paths: ProjectPaths, source: ProjectPaths
) -> query_neighbors.QueryNeighborsReport | None:
    """Search again for chunks with removed neighbors; None if the database has none removed."""
    with raise_together():
        removed = ChunkDatabase.open(source.root, own=True).removed
    return None if removed is None else _follow(config, paths, source, source)


def _follow(
    config: UpdateDbConfig, paths: ProjectPaths, target: ProjectPaths, found_in: ProjectPaths
) -> query_neighbors.QueryNeighborsReport:
    with raise_together():
        query_config = _query_config(config, paths)
    return query_neighbors.follow_removal(paths, query_config, target, found_in)


def _query_config(
    config: UpdateDbConfig, paths: ProjectPaths
) -> query_neighbors.QueryNeighborsConfig:
    """Configuration of the project's own search, with the requested changes."""
    kind = query_neighbors.QueryNeighborsConfig
    before = recorded_config(paths, query_neighbors.STAGE, kind) or kind()
    settings = ProjectSettings.load(paths.root)
    candidates = settings.num_neighbors_query
    # The default depends on the database.
    if candidates == min(NUM_QUERY, len(ChunkDatabase.open(paths.root, own=True))):
        candidates = None
    return kind(
        num_neighbors_query=config.num_neighbors_query or candidates,
        num_neighbors_save=config.num_neighbors_save
        or settings.num_neighbors_save
        or before.num_neighbors_save,
        rerank=settings.rerank,
        rescore=settings.rescore,
        embed_batch_size=config.embed_batch_size,
        embed_batch_tokens=config.embed_batch_tokens,
        **_precision(config, before),
        device=config.device,
        faiss_gpu=settings.faiss_gpu if config.faiss_gpu is None else config.faiss_gpu,
        verify=config.verify,
    )


def _precision(
    config: UpdateDbConfig, before: query_neighbors.QueryNeighborsConfig
) -> dict[str, Any]:
    asked = config.embed_precision is not None or config.embed_fp16
    chosen = config if asked else before
    return {"embed_precision": chosen.embed_precision, "embed_fp16": chosen.embed_fp16}


def _return(paths: ProjectPaths, config: ProjectConfig) -> None:
    """Return to the project's own database and neighbors, which are still there."""
    with raise_together():
        if get_rank() == 0:
            config.retro_database = None
            config.save(paths.root)
    barrier()
