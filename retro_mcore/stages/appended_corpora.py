"""Datasets of documents that update_db appends, compared with the project's documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_mcore.data.near_duplicates.dropping import (
    Dropped,
    choose_dropped,
    training_documents,
)
from retro_mcore.data.near_duplicates.files import keys_path, read_groups
from retro_mcore.data.near_duplicates.options import NearDuplicates
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.data.tokens.tokenizing import CorpusReader, make_dataset
from retro_mcore.errors import CorpusError
from retro_mcore.project.config import ProjectConfig, ProjectSettings, read_json_object
from retro_mcore.project.markers import adopt, marker_path
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.stages.preprocessing.near_duplicates import CorpusDatasets


def take_over_keys(base: ProjectPaths, grown: ProjectPaths, prefixes: Sequence[str]) -> None:
    """Link the keys of the old documents, on rank 0, so that they are not computed again."""
    for prefix in prefixes:
        file = keys_path(base.data / prefix)
        if marker_path(file).is_file():
            fingerprint = str(read_json_object(marker_path(file)).get("fingerprint", ""))
            adopt(file, keys_path(grown.data / prefix), fingerprint)


def make_appended_datasets(
    base: ProjectPaths,
    grown: ProjectPaths,
    sources: Sequence[Path],
    prefixes: Sequence[str],
    tokenizer: Tokenizer,
    reader: CorpusReader,
    fingerprint: str,
) -> None:
    """Write the datasets of new corpora, on all ranks; see `make_grown_project`.

    Their near-duplicates, also among the old documents, are treated as those of the project.

    Raises:
        CorpusError: a source is missing, empty or malformed, or holds near-duplicates alone.
    """
    config, settings = ProjectConfig.load(base.root), ProjectSettings.load(base.root)
    multiple = config.retro_gpt_chunk_length if settings.samples == "aligned" else 1

    def tokenize(folder: Path) -> bool:
        for source, prefix in zip(sources, prefixes, strict=True):
            make_dataset(source, folder / prefix, tokenizer, reader, fingerprint, multiple)
        return False

    def choose(groups: np.ndarray, sizes: list[int]) -> Dropped:
        num_old = len(config.blend[1])
        new = np.arange(len(groups)) >= sum(sizes[:num_old])
        held_out = _held_out(config, settings, sizes)
        dropped = choose_dropped(groups, new, held_out, near.first_survives)
        for source, part in zip(sources, dropped.split(sizes)[num_old:], strict=True):
            if not part.kept.any():
                raise CorpusError(
                    source,
                    "holds nothing but near-duplicates of documents that are in the project",
                    "Append other documents",
                )
        return dropped

    near = NearDuplicates.recorded(settings)
    earlier = [grown.data / prefix for prefix in config.blend[1]]
    CorpusDatasets(grown.data, prefixes, near, tokenizer, multiple, fingerprint, earlier).make(
        tokenize, choose
    )


def _held_out(config: ProjectConfig, settings: ProjectSettings, sizes: Sequence[int]) -> np.ndarray:
    """Mark the held-out documents among old and new ones, bool [documents]."""
    names = config.blend[1]
    whole = [name in settings.whole_datasets for name in names]
    whole += [True] * (len(sizes) - len(names))
    training = training_documents(sizes, config.retro_gpt_split)
    return ~training & ~np.repeat(whole, sizes)


def count_appended(
    base: ProjectPaths, grown: ProjectPaths, prefixes: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Near-duplicates among the new documents, by dataset; empty if they are not searched."""
    config, settings = ProjectConfig.load(base.root), ProjectSettings.load(base.root)
    if not NearDuplicates.recorded(settings).are_searched:
        return {prefix: {} for prefix in prefixes}
    names = [*config.blend[1], *prefixes]
    sizes = [len(TokenFile(grown.data / name)) for name in names]
    groups = read_groups(grown.data, sum(sizes))
    alike = np.bincount(groups, minlength=len(groups))[groups] > 1
    leaked = np.isin(groups, groups[_held_out(config, settings, sizes)])
    bounds = np.cumsum(sizes)[:-1]
    found = zip(names, np.split(alike, bounds), np.split(leaked, bounds), strict=True)
    counts = {
        name: {"near_duplicates": int(a.sum()), "near_duplicates_of_held_out": int(b.sum())}
        for name, a, b in found
    }
    return {prefix: counts[prefix] for prefix in prefixes}
