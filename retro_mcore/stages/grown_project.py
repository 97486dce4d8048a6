"""Create a project whose database has another project's documents, followed by new ones.

It is a complete project directory, so every stage runs on it as on any other, and can be
interrupted and resumed. Tokens, tokenizer, chunks, embeddings and the trained index of the old
documents are hard links. Nothing in the old project changes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from retro_mcore.data.tokenizers.loading import load_project_tokenizer, recorded_choice
from retro_mcore.data.tokenizers.special_tokens import KEPT_FILES
from retro_mcore.data.tokens.document_ids import ids_path
from retro_mcore.data.tokens.token_file import bin_path, idx_path
from retro_mcore.data.tokens.tokenizing import CorpusReader
from retro_mcore.distributed import barrier, get_rank, raise_together
from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings, read_json_object
from retro_mcore.project.markers import FileState, adopt, marker_path, signed_write, state_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.removed import (
    add_removed,
    left_out_documents,
    removed_documents,
    save_left_out,
)
from retro_mcore.stages.appended_corpora import make_appended_datasets, take_over_keys


def origin_of(paths: ProjectPaths) -> ProjectPaths:
    """The project that a project has grown from, directly or in several steps; else itself."""
    seen = set()
    while paths.root not in seen:
        seen.add(paths.root)
        settings = ProjectSettings.load(paths.root)
        if not (base := settings.grown_from or settings.compacted_from):
            break
        paths = ProjectPaths((paths.root / base).resolve())
    return paths


def make_grown_project(
    base: ProjectPaths,
    grown: ProjectPaths,
    sources: Sequence[Path],
    prefixes: Sequence[str],
    reader: CorpusReader,
    fingerprint: str,
) -> None:
    """Write everything that build_db needs for the extended project, on all ranks.

    Args:
        base: The project whose database is extended, after build_index.
        grown: The project to create or to resume.
        sources: New corpora, in any form that preprocess_corpus accepts.
        prefixes: Names of their datasets.
        reader: How text is read.
        fingerprint: Fingerprint of the inputs of the new datasets.

    Raises:
        CorpusError: a source is missing, empty or malformed.
        ProjectError: a file of the old project is missing or damaged.
    """
    with raise_together():
        config = ProjectConfig.load(base.root)
        if get_rank() == 0:
            take_over_inputs(base, grown, config)
            take_over_keys(base, grown, config.blend[1])
    barrier()
    with raise_together():
        tokenizer = load_project_tokenizer(config, grown, recorded_choice(base))
    make_appended_datasets(base, grown, sources, prefixes, tokenizer, reader, fingerprint)
    with raise_together():
        if get_rank() == 0:
            take_over_chunks(base, grown, config)
            _take_over_left_out(base, grown)
            _write_settings(base, grown, config, prefixes)
    barrier()


def take_over_inputs(base: ProjectPaths, grown: ProjectPaths, config: ProjectConfig) -> None:
    """Link tokens, ids and tokenizer, on rank 0.

    Raises:
        ProjectError: a file is missing or damaged.
    """
    files = [
        path(base.data / prefix) for prefix in config.blend[1] for path in (bin_path, idx_path)
    ]
    ids = [ids_path(base.data / prefix) for prefix in config.blend[1]]
    files += [file for file in ids if file.is_file()]
    names = (
        config.retro_gpt_tokenizer_model,
        config.retro_gpt_vocab_file,
        config.retro_gpt_merge_file,
        config.retro_bert_vocab_file,
    )
    files += [base.root / name for name in names if name is not None]
    declaring = [base.tokenizer / name for name in KEPT_FILES]
    files += [file for file in declaring if file.is_file() and file not in files]
    for file in files:
        _take_over(file, grown.root / base.relative(file))


def _take_over(source: Path, target: Path) -> None:
    """Link a file that other stages have verified; a file from another program gets a marker
    here."""
    if state_of(target) is FileState.COMPLETE:
        return
    if adopt(source, target, ""):
        return
    if marker_path(source).exists() or not source.is_file():
        raise ProjectError(source, "missing, or different from its marker", "Restore the file")
    with signed_write(target, "") as temporary:
        temporary.hardlink_to(source.resolve())


def take_over_chunks(base: ProjectPaths, grown: ProjectPaths, config: ProjectConfig) -> None:
    """Link chunks of the old datasets; build_db reuses those with the same fingerprint."""
    for prefix in config.blend[1]:
        for file in sorted(base.individual_db(prefix).glob("*.hdf5")):
            target = grown.individual_db(prefix) / file.name
            if not target.exists() and marker_path(file).exists():
                fingerprint = _read_fingerprint(file)
                adopt(file, target, fingerprint)


def _take_over_left_out(base: ProjectPaths, grown: ProjectPaths) -> None:
    """Let build_db leave out what the old database lacks."""
    if len(left_out := left_out_documents(base)):
        save_left_out(grown, left_out)


def _read_fingerprint(path: Path) -> str:
    """Fingerprint of a file's inputs, from its marker."""
    return str(read_json_object(marker_path(path)).get("fingerprint", ""))


def _write_settings(
    base: ProjectPaths, grown: ProjectPaths, config: ProjectConfig, prefixes: Sequence[str]
) -> None:
    weights, old = config.blend
    path = [item for pair in zip(map(str, weights), old, strict=True) for item in pair]
    path += [item for prefix in prefixes for item in ("1.0", prefix)]
    settings = ProjectSettings.load(base.root)
    database = ChunkDatabase.open(base.root, own=True)
    grown_settings = dataclasses.replace(
        settings,
        whole_datasets=[*settings.whole_datasets, *prefixes],
        grown_from=os.path.relpath(base.root, grown.root),
        growth=[*settings.growth, len(database)],
        compacted_from=None,
        removed_documents=0,
        chunk_neighbor_dirs=None,
    )
    if not grown.settings.is_file():
        grown_settings.save(grown.root)
    if len(removed := removed_documents(base)):
        add_removed(grown, removed)
    dataclasses.replace(
        config,
        retro_gpt_data_path=path,
        retro_neighbor_dirs={"train": None, "valid": None, "test": None},
        retro_database=None,
    ).save(grown.root)
