"""`update_db`: more documents to retrieve from, or another database, for the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from retro_mcore.cli.command import print_summary
from retro_mcore.data.corpus.counts import loss_rows, read_counts, total
from retro_mcore.data.corpus.documents import text_cleaner
from retro_mcore.data.corpus.sources import digest_of_source, name_datasets
from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.data.tokens.tokenizing import CorpusReader
from retro_mcore.distributed import barrier, get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError, CorruptFileError, ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.fields import problems_of
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import checksum, digest_of, fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import finish_stage, recorded_options, stage_report
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.neighbor_search import NUM_QUERY
from retro_mcore.stages.build_db import BuildDbOptions, build_db
from retro_mcore.stages.build_index import BuildIndexOptions, build_index
from retro_mcore.stages.grown_project import make_grown_project
from retro_mcore.stages.query_neighbors import QueryNeighborsOptions, query_other_database

STAGE = "update_db"


@dataclass
class UpdateDbOptions:
    """Retrieve from more documents, or from another project's, without touching the model.

    The neighbors of every sample are searched again. Those that the project has stay in use until
    the new ones are complete, and on the disk after that. Repeat the command if it is interrupted.
    """

    project_dir: str
    """Project directory, after query_neighbors."""
    append: list[str] = field(default_factory=list)
    """New documents, as preprocess_corpus --input takes them."""
    exchange: str | None = None
    """Another project, after build_index, whose database takes the place of this one's; this
    project itself: back to its own database."""
    json_keys: list[str] = field(default_factory=list)
    """Keys of a JSON line of --append that hold the text (default: as for the project)."""
    id_key: str | None = None
    """Key of a JSON line of --append that holds its id (default: as for the project)."""
    clean_text: bool = False
    """Mend broken characters of --append with ftfy, also where the project's were not."""
    num_neighbors_query: int | None = None
    """Candidates searched per chunk (default: as before; where that was the default, 200, or all
    of a smaller database)."""
    num_neighbors_save: int | None = None
    """Neighbors saved per chunk (default: as before)."""
    embed_batch_size: int | None = None
    """Chunks per forward pass of the embedder (default: as before)."""
    embed_fp16: bool = False
    """Embed the samples' chunks in half precision, on a GPU, also where they were not before."""
    device: str = "auto"
    """Where the embedder runs: auto, cpu or cuda."""


@dataclass(frozen=True)
class UpdatedDatabase:
    """What `update_db` switched to.

    Attributes:
        project: Whose database is used now.
        num_chunks: Chunks that are retrieved from now.
        num_before: And before.
        report: What was read, dropped and replaced of --append, by name.
    """

    project: Path
    num_chunks: int
    num_before: int
    report: dict[str, Any] = field(default_factory=dict)


def update_db(options: UpdateDbOptions) -> UpdatedDatabase:
    """Grow or exchange the database that a project's samples retrieve from.

    Raises:
        ProjectError: the project, or the other one, lacks a stage; they do not fit; another run
            works on the project, or the disk is full.
        ConfigurationError: options that cannot work.
        CorpusError: an input is missing, empty or malformed.
    """
    initialize()
    with stage_lock(ProjectPaths(options.project_dir), STAGE):
        with raise_together():
            _check_options(options)
            paths = ProjectPaths(options.project_dir)
            config = ProjectConfig.load(paths.root)
            if all(name is None for name in config.retro_neighbor_dirs.values()):
                raise ProjectError(
                    paths.config, "names no neighbors", "Run all stages on the project first"
                )
            before = ChunkDatabase.open(paths.root)
        if options.append:
            target = _grow(options, paths, config)
        else:
            target = ProjectPaths(str(options.exchange))
        if target.root == paths.root:
            _return(paths, config)
        else:
            _switch(options, paths, config, target)
        with raise_together():
            now = ChunkDatabase.open(paths.root)
    report = stage_report(target, STAGE) if options.append else {}
    result = UpdatedDatabase(target.root, len(now), len(before), report)
    rows = {
        "retrieved from": f"{result.num_chunks} chunks, {result.num_before} before",
        "database": result.project,
        **loss_rows(report),
        "samples": "as they were; a model trained on them goes on",
    }
    print_summary(STAGE, rows)
    return result


def _check_options(options: UpdateDbOptions) -> None:
    if bool(options.append) == (options.exchange is not None):
        raise ConfigurationError(
            "--append and --exchange",
            "both given" if options.append else "neither given",
            "Give new documents, or another project",
        )


def _grow(options: UpdateDbOptions, paths: ProjectPaths, config: ProjectConfig) -> ProjectPaths:
    """A project inside this one with the new documents behind the old, up to its index."""
    with raise_together():
        base = config.database_paths(paths.root)
        settings = ProjectSettings.load(base.root)
        reader, clean = _reader(options, base, settings)
        sources = [Path(source) for source in options.append]
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
        _record(grown, prefixes, reader, clean)
    build_db(BuildDbOptions(str(grown.root), **_recorded(base, "build_db", BuildDbOptions)))
    # The index that the old documents are in, by its own name: "auto" could choose another.
    recorded = {**_recorded(base, "build_index", BuildIndexOptions), "index": settings.index_string}
    recorded = {**recorded, "nprobe": settings.nprobe, "ef_search": settings.ef_search}
    build_index(BuildIndexOptions(str(grown.root), **recorded, device=options.device))
    return grown


def _reader(
    options: UpdateDbOptions, base: ProjectPaths, settings: ProjectSettings
) -> tuple[CorpusReader, bool]:
    """How the new documents are read: as the project's were; and whether they are cleaned."""
    # Projects of before these were settings have them in the record of the stage alone.
    recorded = recorded_options(base, "preprocess_corpus")
    id_key, clean = settings.id_key, settings.clean_text
    if id_key is None:
        id_key = str(recorded.get("--id-key", "id"))
    if clean is None:
        clean = bool(recorded.get("--clean-text", False))
    clean = clean or options.clean_text
    reader = CorpusReader(
        options.json_keys or settings.json_keys,
        options.id_key or id_key,
        text_cleaner() if clean else None,
    )
    return reader, clean


def _record(
    grown: ProjectPaths, prefixes: Sequence[str], reader: CorpusReader, clean: bool
) -> None:
    """How the new documents were read, and what was counted."""
    with raise_together():
        each = {prefix: read_counts(grown.data / prefix) for prefix in prefixes}
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


def _recorded(base: ProjectPaths, stage: str, kind: type) -> dict[str, Any]:
    """The flags that a stage of the old project was run with, as options of `kind`."""
    path = base.stage_record(stage)
    if not path.is_file():
        raise ProjectError(
            path, "no such file, so how to go on is not known", f"Run {stage} on {base.root} first"
        )
    options = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in recorded_options(base, stage).items()
        if name.startswith("--")
    }
    unknown = options.keys() - {field.name for field in fields(kind)}
    if unknown or problems_of(options, kind, {}):
        raise CorruptFileError(path, f"holds what are no options of {stage}", "Restore the file")
    return options


def _switch(
    options: UpdateDbOptions, paths: ProjectPaths, config: ProjectConfig, target: ProjectPaths
) -> None:
    with raise_together():
        other = ProjectConfig.load(target.root)
        if other.retro_gpt_chunk_length != config.retro_gpt_chunk_length:
            raise ProjectError(
                target.root,
                f"has chunks of {other.retro_gpt_chunk_length} tokens, {paths.root} of "
                f"{config.retro_gpt_chunk_length}",
                "Build it with the same --retro-chunk-length",
            )
        mine, theirs = load_project_tokenizer(config, paths), load_project_tokenizer(other, target)
        if _contents(mine) != _contents(theirs):
            raise ProjectError(
                target.root, f"has another tokenizer than {paths.root}", "Build it with the same"
            )
        query = _query_options(options, paths)
    query_other_database(query, target.root)


def _query_options(options: UpdateDbOptions, paths: ProjectPaths) -> QueryNeighborsOptions:
    """As the project's own neighbors were searched, but for what is asked otherwise."""
    settings = ProjectSettings.load(paths.root)
    before = recorded_options(paths, "query_neighbors")
    candidates = settings.num_neighbors_query
    default = min(NUM_QUERY, len(ChunkDatabase.open(paths.root, own=True)))
    return QueryNeighborsOptions(
        str(paths.root),
        # The default of one database is not that of another.
        num_neighbors_query=options.num_neighbors_query
        or (None if candidates == default else candidates),
        num_neighbors_save=options.num_neighbors_save or settings.num_neighbors_save or 20,
        rerank=settings.rerank,
        embed_batch_size=options.embed_batch_size or before.get("--embed-batch-size", 16),
        embed_fp16=options.embed_fp16 or before.get("--embed-fp16", False),
        device=options.device,
    )


def _contents(tokenizer: Tokenizer) -> list[Any]:
    files = [file / "tokenizer.json" if file.is_dir() else file for file in tokenizer.files]
    return [tokenizer.name, tokenizer.eod, *map(checksum, files)]


def _return(paths: ProjectPaths, config: ProjectConfig) -> None:
    """Back to the project's own database and neighbors, which never went."""
    with raise_together():
        if get_rank() == 0:
            config.retro_database = None
            config.save(paths.root)
    barrier()
