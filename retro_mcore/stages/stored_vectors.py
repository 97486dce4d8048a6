"""Vectors stored by build_index or an earlier search, of chunks that neighbors are searched for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import digest_of, fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.project.shards import cut
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.base import LEXICAL_EMBEDDER
from retro_mcore.retrieval.embedders.precision import Precision
from retro_mcore.retrieval.index.inherited import begins_with
from retro_mcore.retrieval.index.vector_files import VectorFiles
from retro_mcore.retrieval.kept_vectors import KeptVectors
from retro_mcore.retrieval.project_search import ProjectSearch
from retro_mcore.retrieval.query_chunks import ChunkEmbedder
from retro_mcore.stages.build_index import STAGE, stored_embeddings


def stored_vectors(paths: ProjectPaths) -> VectorFiles:
    """The vectors that a project's index was built from.

    Args:
        paths: The project, after build_index.

    Raises:
        ProjectError: build_index has not finished.
    """
    files = stored_embeddings(paths)
    hint = (
        f"Restore it, or embed these chunks again: build_index --project-dir {paths.root} "
        "--stage embed, with the options that it was run with"
    )
    return VectorFiles(paths, files.shards, hint, files.fingerprint)


def vectors_of_rows(
    search: ProjectSearch, own: ChunkDatabase, numbers: list[int]
) -> VectorFiles | None:
    """Stored vectors of the rows of a project's own database; None if they must be embedded.

    Args:
        search: The project, and the database that is searched for these rows.
        own: The project's own database.
        numbers: Number of each of its datasets in the searched database.
    """
    same_datasets = numbers == list(range(len(numbers)))
    if same_datasets and begins_with(search.database.chunks, own.chunks):
        return stored_vectors(search.source)
    return stored_vectors(search.paths) if _embedded_alike(search) else None


def held_out_vectors(
    search: ProjectSearch,
    own: ChunkDatabase,
    *,
    embedder: ChunkEmbedder,
    options: Mapping[str, Any],
    precision: Precision,
    tag: str,
) -> KeptVectors:
    """Vectors of a project's held-out chunks, kept under `query/` for the next search.

    Args:
        search: The project, and the database that is searched for these chunks.
        own: The held-out chunks.
        embedder: Embeds them.
        options: Options of the search, by flag.
        precision: Precision of the embedder.
        tag: Ending of the directory's name if the database has another embedder than the project.
    """
    paths, source, settings = search.paths, search.source, search.source_settings
    alike = source.root == paths.root or _embedded_alike(search)
    directory = paths.query / ("vectors_valid" if alike else f"vectors_valid{tag}")
    made_from = {
        "embedder": [settings.embedder, settings.embedder_pooling, way_of_embedding(source)],
        "options": {name: options[name] for name in options if name.startswith("--embed")},
        "precision": precision,
        "inputs": {own.path.name: digest_of(own.path), **search.token_digests()},
    }
    shards = cut(directory, len(own), search.config.retro_block_size)
    return KeptVectors(own, embedder, shards, fingerprint_of(made_from))


def _embedded_alike(search: ProjectSearch) -> bool:
    """Whether both projects' vectors come from one embedder, so that they can be compared."""
    paths, source = search.paths, search.source
    if not paths.stage_record(STAGE).is_file():
        return False
    mine, theirs = (way_of_embedding(each) for each in (paths, source))
    if mine != theirs:
        return False
    # A relative path may name another folder there.
    name = str(search.source_settings.embedder)
    return Path(name).is_absolute() or not Path(name).exists()


def way_of_embedding(paths: ProjectPaths) -> list[object]:
    """The settings that decide a text's vector, and the weights that are made from the texts."""
    options = {
        name: value
        for name, value in recorded_options(paths, STAGE).items()
        if name.startswith("--embed") and not name.startswith("--embed-batch")
    }
    settings = ProjectSettings.load(paths.root)
    weights = None
    if settings.embedder == LEXICAL_EMBEDDER:
        weights = digest_of(paths.lexical_weights)
    length = ProjectConfig.load(paths.root).retro_gpt_chunk_length
    digests = [settings.embedder_digests] if settings.embedder_digests else []
    return [options, settings.document_ends, weights, length, *digests]
