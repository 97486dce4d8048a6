"""Digests of an embedder's files, so that another model under its name is told from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from retro_mcore.errors import ProjectError
from retro_mcore.project.markers import checksum, fingerprint_of
from retro_mcore.retrieval.embedders.base import Embedder

_SHOWN = 8


def digests_of(embedder: Embedder) -> dict[str, str]:
    """Digest of each part of an embedder's files; empty if it has none, or they are unknown."""
    return {
        part: fingerprint_of(sorted([file.name, checksum(file)] for file in files))
        for part, files in embedder.files.items()
        if files
    }


def require_same_model(embedder: Embedder, recorded: Mapping[str, str], project: Path) -> None:
    """Refuse an embedder whose files are not those that a project's vectors were made with.

    Args:
        embedder: The embedder.
        recorded: Its digests then. Parts that are not loaded now, or were not then, do not matter.
        project: The project that holds the vectors.

    Raises:
        ProjectError: a digest differs.
    """
    for part, now in digests_of(embedder).items():
        before = recorded.get(part, now)
        if now != before:
            raise ProjectError(
                f"embedder {embedder.name}",
                f"the digest of its {part} is {now[:_SHOWN]}, but {project} was embedded with "
                f"{before[:_SHOWN]}",
                "Restore the model; or remove index/, query/, stages/build_index.json and "
                "stages/query_neighbors.json there, and run build_index and query_neighbors again",
            )
