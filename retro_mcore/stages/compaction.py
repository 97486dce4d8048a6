"""A project inside another one, whose database lacks the other's removed documents.

Its datasets, tokens and document numbers are the other's. So are the chunks of each dataset, the
embeddings and the trained index; build_db and build_index leave out what was removed.
"""

from __future__ import annotations

import dataclasses
import os

from retro_mcore.data.near_duplicates.files import groups_path
from retro_mcore.distributed import barrier, get_rank, raise_together
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import adopt, digest_of, fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import finish_stage
from retro_mcore.retrieval.removed import (
    digest_of_documents,
    left_out_documents,
    removed_documents,
    save_left_out,
    union,
)
from retro_mcore.stages.appended_corpora import take_over_keys
from retro_mcore.stages.grown_project import take_over_chunks, take_over_inputs

STAGE = "update_db"


def compacted_name(base: ProjectPaths) -> str:
    """Name of the compacted project: it depends on the database and on what was removed."""
    rows = digest_of(base.merged_db("train"))
    removed = digest_of_documents(removed_documents(base))
    return fingerprint_of(["compacted", rows, removed])[:12]


def make_compacted_project(base: ProjectPaths, compacted: ProjectPaths) -> None:
    """Write everything that build_db needs for the compacted project, on all ranks.

    Args:
        base: The project whose database holds removed documents, after build_index.
        compacted: The project to create or to resume.

    Raises:
        ProjectError: a file of the old project is missing or damaged.
    """
    with raise_together():
        config = ProjectConfig.load(base.root)
        if get_rank() == 0:
            take_over_inputs(base, compacted, config)
            take_over_keys(base, compacted, config.blend[1])
            adopt(groups_path(base.data), groups_path(compacted.data), "")
            left_out = union(left_out_documents(base), removed_documents(base))
            save_left_out(compacted, left_out)
            take_over_chunks(base, compacted, config)
            _write_settings(base, compacted, config)
            finish_stage(compacted, STAGE, {"--compact": True}, {}, {"left_out": len(left_out)})
    barrier()


def _write_settings(base: ProjectPaths, compacted: ProjectPaths, config: ProjectConfig) -> None:
    if not compacted.settings.is_file():
        dataclasses.replace(
            ProjectSettings.load(base.root),
            compacted_from=os.path.relpath(base.root, compacted.root),
            removed_documents=0,
            grown_from=None,
            growth=[],
            chunk_neighbor_dirs=None,
        ).save(compacted.root)
    dataclasses.replace(
        config,
        retro_neighbor_dirs={"train": None, "valid": None, "test": None},
        retro_database=None,
    ).save(compacted.root)
