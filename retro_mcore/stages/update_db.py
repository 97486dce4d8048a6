"""Stage `update_db`: more documents, or another database, for the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from retro_mcore.data.corpus.counts import read_counts, total
from retro_mcore.data.corpus.documents import text_cleaner
from retro_mcore.data.corpus.sources import digest_of_source, name_datasets
from retro_mcore.data.tokens.tokenizing import CorpusReader
from retro_mcore.distributed import barrier, get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import digest_of, fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import finish_stage, recorded_options, stage_report
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.neighbor_search import NUM_QUERY
from retro_mcore.stages import build_db, build_index, query_neighbors
from retro_mcore.stages.appended_corpora import count_appended
from retro_mcore.stages.configuration import Config, Project, project_paths, recorded_config
from retro_mcore.stages.database_fit import check_database_fits
from retro_mcore.stages.grown_project import make_grown_project, origin_of

STAGE = "update_db"


@dataclass(kw_only=True)
class UpdateDbConfig:
    """Configuration of `update_db`: `append` or `exchange`, and how to search."""

    append: list[str] = field(default_factory=list)
    """New documents, in any form that preprocess_corpus --input accepts."""
    exchange: str | None = None
    """Another project, after build_index, whose database replaces this one's. The project itself:
    return to its own database."""
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
    """Chunks per forward pass of the embedder (default: as before)."""
    embed_fp16: bool = False
    """Embed the samples' chunks in half precision, on a GPU, even if they were not before."""
    device: str = "auto"
    """Device of the embedder: auto, cpu or cuda."""


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
        num_before: Number of chunks in the database used before.
        report: Counts of what was read, dropped and replaced in `append`, by name.
        database: Report of build_db on the extended project; None without `append`.
        index: Report of build_index on it; None without `append`.
        neighbors: Report of query_neighbors; None if the project returned to its own database.
    """

    project: Path
    num_chunks: int
    num_before: int
    report: dict[str, Any] = field(default_factory=dict)
    database: build_db.BuildDbReport | None = None
    index: build_index.BuildIndexReport | None = None
    neighbors: query_neighbors.QueryNeighborsReport | None = None


def run(
    project: Project,
    config: UpdateDbConfig,
    on_stage: Callable[[StageReport], None] = lambda report: None,
) -> UpdateDbReport:
    """Extend or exchange the database that a project's samples retrieve from, on all ranks.

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
    initialize()
    paths = project_paths(project)
    with stage_lock(paths, STAGE):
        with raise_together():
            _check(config)
            project_config = ProjectConfig.load(paths.root)
            if not _has_neighbors(paths, project_config):
                raise ProjectError(
                    paths.config, "names no neighbors", "Run all stages on the project first"
                )
            before = ChunkDatabase.open(paths.root)
        database, index, neighbors = None, None, None
        if config.append:
            target, database, index = _grow(config, paths, project_config, on_stage)
        else:
            target = ProjectPaths(str(config.exchange))
        if target.root == paths.root:
            _return(paths, project_config)
        else:
            neighbors = _switch(config, paths, project_config, target)
            on_stage(neighbors)
        with raise_together():
            now = ChunkDatabase.open(paths.root)
    counts = stage_report(target, STAGE) if config.append else {}
    return UpdateDbReport(
        project=target.root,
        num_chunks=len(now),
        num_before=len(before),
        report=counts,
        database=database,
        index=index,
        neighbors=neighbors,
    )


def _has_neighbors(paths: ProjectPaths, config: ProjectConfig) -> bool:
    """Whether neighbors were searched in the project's own database."""
    chunks = ProjectSettings.load(paths.root).chunk_neighbor_dirs or {}
    return any(
        name is not None for name in (*config.retro_neighbor_dirs.values(), *chunks.values())
    )


def _check(config: UpdateDbConfig) -> None:
    if bool(config.append) == (config.exchange is not None):
        raise ConfigurationError(
            "--append and --exchange",
            "both given" if config.append else "neither given",
            "Give new documents, or another project",
        )


def _grow(
    config: UpdateDbConfig,
    paths: ProjectPaths,
    project_config: ProjectConfig,
    on_stage: Callable[[StageReport], None],
) -> tuple[ProjectPaths, build_db.BuildDbReport, build_index.BuildIndexReport]:
    """Create a project inside this one, with the new documents after the old ones, up to its
    index."""
    with raise_together():
        base = project_config.database_paths(paths.root)
        settings = ProjectSettings.load(base.root)
        reader, clean = _reader(config, base, settings)
        sources = [Path(source) for source in config.append]
        held = ProjectConfig.load(base.root).blend[1]
        prefixes = name_datasets(sources, reader.json_keys, held)
        made_from = fingerprint_of(
            {
                "inputs": [digest_of_source(source) for source in sources],
                "names": prefixes,
                "reader": [list(reader.json_keys), reader.id_key, clean],
                "base": digest_of(base.merged_db("train")),
            }
        )
        grown = ProjectPaths(paths.grown(made_from[:12]))
    with stage_lock(grown, STAGE, create=True):
        make_grown_project(base, grown, sources, prefixes, reader, made_from)
        _record(base, grown, prefixes, reader, clean)
    database = build_db.run(grown, _restored(base, build_db.STAGE, build_db.BuildDbConfig))
    on_stage(database)
    index_config = _restored(base, build_index.STAGE, build_index.BuildIndexConfig)
    # The old documents' index by name, because "auto" could choose another.
    index_config = replace(
        index_config,
        index=settings.index_string or index_config.index,
        nprobe=settings.nprobe,
        ef_search=settings.ef_search,
        device=config.device,
    )
    index = build_index.run(grown, index_config)
    on_stage(index)
    return grown, database, index


def _reader(
    config: UpdateDbConfig, base: ProjectPaths, settings: ProjectSettings
) -> tuple[CorpusReader, bool]:
    """Reader of the new documents, by default the project's own, and whether it cleans texts."""
    # Older projects have these only in the record of the stage, which grown projects lack.
    recorded = recorded_options(origin_of(base), "preprocess_corpus")
    id_key, clean = settings.id_key, settings.clean_text
    if id_key is None:
        id_key = str(recorded.get("--id-key", "id"))
    if clean is None:
        clean = bool(recorded.get("--clean-text", False))
    clean = clean or config.clean_text
    reader = CorpusReader(
        config.json_keys or settings.json_keys,
        config.id_key or id_key,
        text_cleaner() if clean else None,
    )
    return reader, clean


def _record(
    base: ProjectPaths,
    grown: ProjectPaths,
    prefixes: Sequence[str],
    reader: CorpusReader,
    clean: bool,
) -> None:
    """Record how the new documents were read and what was counted."""
    with raise_together():
        near = count_appended(base, grown, prefixes)
        each = {prefix: {**read_counts(grown.data / prefix), **near[prefix]} for prefix in prefixes}
        read_as = {
            "--append": list(prefixes),
            "--json-keys": list(reader.json_keys),
            "--id-key": reader.id_key,
            "--clean-text": clean,
        }
        if get_rank() == 0:
            report = {**total(list(each.values())), "datasets": each}
            finish_stage(grown, STAGE, read_as, {}, report)
    barrier()


def _restored(base: ProjectPaths, stage: str, kind: type[Config]) -> Config:
    """Configuration with which the old project was built."""
    restored = recorded_config(base, stage, kind)
    if restored is None:
        raise ProjectError(
            base.stage_record(stage),
            "no such file, so its options are unknown",
            f"Run {stage} on {base.root} first",
        )
    return restored


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
        embed_batch_size=config.embed_batch_size or before.embed_batch_size,
        embed_batch_tokens=None if config.embed_batch_size else before.embed_batch_tokens,
        embed_precision=None if config.embed_fp16 else before.embed_precision,
        embed_fp16=config.embed_fp16 or before.embed_fp16,
        device=config.device,
    )


def _return(paths: ProjectPaths, config: ProjectConfig) -> None:
    """Return to the project's own database and neighbors, which are still there."""
    with raise_together():
        if get_rank() == 0:
            config.retro_database = None
            config.save(paths.root)
    barrier()
