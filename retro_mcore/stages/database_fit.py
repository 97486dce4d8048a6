"""Check that a project's samples can retrieve from another project's database."""

from __future__ import annotations

from typing import Any

from retro_mcore.data.near_duplicates.options import NearDuplicates
from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import checksum
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.samples.project_samples import numbers_in_database


def check_database_fits(paths: ProjectPaths, config: ProjectConfig, target: ProjectPaths) -> None:
    """Compare chunk length, tokenizer, near-duplicates, and whether documents begin with BOS.

    Args:
        paths: The project with the samples.
        config: Its configuration.
        target: The project with the database.

    Raises:
        ProjectError: they differ.
        TokenizerError: a tokenizer cannot be loaded.
    """
    other = ProjectConfig.load(target.root)
    if other.retro_gpt_chunk_length != config.retro_gpt_chunk_length:
        raise ProjectError(
            target.root,
            f"has chunks of {other.retro_gpt_chunk_length} tokens, {paths.root} of "
            f"{config.retro_gpt_chunk_length}",
            "Build it with the same --retro-chunk-length",
        )
    _check_samples(paths, target)
    _check_near_duplicates(paths, config, target)
    mine = load_project_tokenizer(config, paths)
    theirs = load_project_tokenizer(other, target)
    if _contents(mine) != _contents(theirs):
        raise ProjectError(
            target.root, f"has a different tokenizer from {paths.root}", "Build it with the same"
        )
    _check_beginnings(paths, mine, target, theirs)


def _check_samples(paths: ProjectPaths, target: ProjectPaths) -> None:
    """Refuse documents that are laid out otherwise: a sample's own could not be recognized."""
    mine, theirs = (ProjectSettings.load(each.root).samples for each in (paths, target))
    if mine != theirs:
        raise ProjectError(
            target.root,
            f"has {theirs} samples, {paths.root} {mine} ones, so that documents that are in both "
            "could not be recognized",
            f"Build it with preprocess_corpus --samples {mine}",
        )


def _check_near_duplicates(
    paths: ProjectPaths, config: ProjectConfig, target: ProjectPaths
) -> None:
    """Refuse documents that were not compared with the project's, whose near-duplicates it has not.

    A database that holds all of the project's documents was compared with them.
    """
    mine, theirs = (
        NearDuplicates.recorded(ProjectSettings.load(each.root)) for each in (paths, target)
    )
    if mine.mode in ("keep", "count"):
        return
    numbers = numbers_in_database(paths, config, target)
    held = len(ProjectConfig.load(target.root).blend[1])
    if mine == theirs and max(numbers) < held:
        return
    raise ProjectError(
        target.root,
        f"its documents were not compared with those of {paths.root}, which was built with "
        f"--near-duplicates {mine.mode}",
        "Append them with update_db --append, which compares them",
    )


def _check_beginnings(
    paths: ProjectPaths, mine: Tokenizer, target: ProjectPaths, theirs: Tokenizer
) -> None:
    """Refuse neighbors whose documents use BOS differently from those that the model reads."""
    if mine.beginning == theirs.beginning:
        return
    found, other = (
        f"documents begin with BOS ({each.bos})" if each.adds_bos else "no document begins with BOS"
        for each in (theirs, mine)
    )
    raise ProjectError(
        target.root,
        f"{found}; in {paths.root}, {other}",
        f"Build it with preprocess_corpus --add-bos-token {mine.adds_bos}",
    )


def _contents(tokenizer: Tokenizer) -> list[Any]:
    files = [file / "tokenizer.json" if file.is_dir() else file for file in tokenizer.files]
    return [tokenizer.name, tokenizer.eod, *map(checksum, files)]
