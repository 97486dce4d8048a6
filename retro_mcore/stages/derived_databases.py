"""Databases that are made from the one in use: with more documents, or without removed ones.

Each is a project inside the old one. build_db and build_index are run on it as they were on the
old one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from retro_mcore.data.corpus.counts import read_counts, total
from retro_mcore.data.corpus.documents import text_cleaner
from retro_mcore.data.corpus.sources import digest_of_source, name_datasets
from retro_mcore.data.tokens.tokenizing import CorpusReader
from retro_mcore.distributed import barrier, get_rank, raise_together
from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import digest_of, fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import finish_stage, recorded_options
from retro_mcore.stages import build_db, build_index
from retro_mcore.stages.appended_corpora import count_appended
from retro_mcore.stages.compaction import STAGE, compacted_name, make_compacted_project
from retro_mcore.stages.configuration import Config, recorded_config
from retro_mcore.stages.grown_project import make_grown_project, origin_of

if TYPE_CHECKING:
    from retro_mcore.stages.update_db import UpdateDbConfig

BuildReport: TypeAlias = build_db.BuildDbReport | build_index.BuildIndexReport
#: A new project, and what its stages report.
Made: TypeAlias = tuple[ProjectPaths, build_db.BuildDbReport, build_index.BuildIndexReport]


def append_documents(
    config: UpdateDbConfig,
    base: ProjectPaths,
    paths: ProjectPaths,
    on_stage: Callable[[BuildReport], None],
) -> Made:
    """Create a project inside this one, with the new documents after the old ones, up to its
    index.

    Args:
        config: Names the new documents, and how to read and embed them.
        base: The project whose database is extended.
        paths: The project that retrieves from it.
        on_stage: Called with the report of each stage as soon as that stage has finished.

    Raises:
        ProjectError: a stage has not run on the old project, or the disk is full.
        CorpusError: an input is missing, empty or malformed.
    """
    with raise_together():
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
    index = build_index.run(grown, _index_config(config, base, settings))
    on_stage(index)
    return grown, database, index


def compact_database(
    config: UpdateDbConfig,
    base: ProjectPaths,
    paths: ProjectPaths,
    on_stage: Callable[[BuildReport], None],
) -> Made:
    """Create a project inside this one, without the removed documents, up to its index.

    Args:
        config: How to embed.
        base: The project whose database holds removed documents.
        paths: The project that retrieves from it.
        on_stage: Called with the report of each stage as soon as that stage has finished.

    Raises:
        ProjectError: a stage has not run on the old project, or the disk is full.
    """
    with raise_together():
        settings = ProjectSettings.load(base.root)
        compacted = ProjectPaths(paths.grown(compacted_name(base)))
    with stage_lock(compacted, STAGE, create=True):
        make_compacted_project(base, compacted)
    # The index is not trained again, so a number of vectors to train it on may be too large.
    db_config = _restored(base, build_db.STAGE, build_db.BuildDbConfig)
    database = build_db.run(compacted, replace(db_config, retro_index_ntrain=None))
    on_stage(database)
    index = build_index.run(compacted, _index_config(config, base, settings))
    on_stage(index)
    return compacted, database, index


def _index_config(
    config: UpdateDbConfig, base: ProjectPaths, settings: ProjectSettings
) -> build_index.BuildIndexConfig:
    """Configuration of the old index, by name, because "auto" could choose another."""
    before = _restored(base, build_index.STAGE, build_index.BuildIndexConfig)
    return replace(
        before,
        index=settings.index_string or before.index,
        nprobe=settings.nprobe,
        ef_search=settings.ef_search,
        device=config.device,
        faiss_gpu=settings.index_faiss_gpu if config.faiss_gpu is None else config.faiss_gpu,
        verify=config.verify,
    )


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
