"""Tokens of a corpus, with its near-duplicates counted or dropped.

Where documents are dropped, the whole datasets are written to a folder of their own first, and
copied without the dropped documents. The folder is removed at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_mcore.data.near_duplicates.dropping import (
    Copy,
    Dropped,
    choose_dropped_of_corpus,
    training_documents,
)
from retro_mcore.data.near_duplicates.files import groups_path, keys_path, write_groups
from retro_mcore.data.near_duplicates.options import NearDuplicates
from retro_mcore.data.near_duplicates.search import NearDuplicateSearch
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokens.splits import check_documents, document_ranges
from retro_mcore.data.tokens.token_file import TokenFile, bin_path, idx_path
from retro_mcore.distributed import barrier, get_rank, on_first_rank, raise_together
from retro_mcore.project.config import Split
from retro_mcore.project.markers import FileState, state_of

#: Writes datasets into a folder, on all ranks; returns whether all existed already.
Tokenize = Callable[[Path], bool]


@dataclass(frozen=True)
class CorpusDatasets:
    """The datasets of a corpus, and how their near-duplicates are treated.

    Attributes:
        folder: Folder of the datasets.
        prefixes: Their names.
        near: Options of near-duplicates.
        tokenizer: The project's tokenizer.
        multiple: Documents are padded to a multiple of this number of tokens.
        fingerprint: Fingerprint of datasets without the dropped documents.
        earlier: Paths of datasets whose documents come first and stay.
    """

    folder: Path
    prefixes: Sequence[str]
    near: NearDuplicates
    tokenizer: Tokenizer
    multiple: int
    fingerprint: str
    earlier: Sequence[Path] = ()

    @property
    def targets(self) -> list[Path]:
        """Paths of the datasets, without .bin and .idx."""
        return [self.folder / prefix for prefix in self.prefixes]

    @property
    def whole(self) -> Path:
        """Folder of the datasets before documents are dropped."""
        return self.folder / "whole"

    @property
    def search(self) -> NearDuplicateSearch:
        """The search for near-duplicates."""
        return self.near.search(self.tokenizer)

    def make(self, tokenize: Tokenize, choose: Callable[[np.ndarray, list[int]], Dropped]) -> bool:
        """Write the datasets and the groups of their documents, on all ranks.

        Args:
            tokenize: Writes them with all documents.
            choose: Chooses what to drop, given the groups and the numbers of documents.

        Returns:
            Whether all datasets existed already.

        Raises:
            CorpusError: an input is missing, empty or malformed.
            MissingDependencyError: datasketch is not installed.
        """
        if not self.near.are_dropped:
            done = tokenize(self.folder)
            if self.near.are_searched:
                self.search.group([*self.earlier, *self.targets], self.folder)
        else:
            done = on_first_rank(self._are_copied)
            if not done:
                tokenize(self.whole)
                self._drop(choose)
        with raise_together():
            if get_rank() == 0:  # also of an interrupted run with other options
                shutil.rmtree(self.whole, ignore_errors=True)
        barrier()
        return done

    def _are_copied(self) -> bool:
        files = [path(target) for target in self.targets for path in (bin_path, idx_path)]
        if any(state_of(file, self.fingerprint) is not FileState.COMPLETE for file in files):
            return False
        made_from = self.search.fingerprint([*self.earlier, *self.targets])
        found = [(keys_path(each), self.search.keys_fingerprint(each)) for each in self.targets]
        found.append((groups_path(self.folder), made_from))
        return all(state_of(*each) is FileState.COMPLETE for each in found)

    def _drop(self, choose: Callable[[np.ndarray, list[int]], Dropped]) -> None:
        sources = [*self.earlier, *(self.whole / prefix for prefix in self.prefixes)]
        groups = self.search.group(sources, self.whole)
        with raise_together():
            sizes = [len(TokenFile(source)) for source in sources]
            dropped = choose(groups, sizes)
            if get_rank() == 0:
                self._copy(dropped, sizes)
                kept = groups[dropped.kept]
                _, first, number = np.unique(kept, return_index=True, return_inverse=True)
                fingerprint = self.search.fingerprint([*self.earlier, *self.targets])
                write_groups(self.folder, first[number], fingerprint)
        barrier()

    def _copy(self, dropped: Dropped, sizes: Sequence[int]) -> None:
        """Copy the datasets; `sizes` are those of earlier and whole datasets."""
        of_each = dropped.split(sizes)[len(self.earlier) :]
        for prefix, target, part in zip(self.prefixes, self.targets, of_each, strict=True):
            source = self.whole / prefix
            copy = Copy(source, target, self.fingerprint, self.search.keys_fingerprint)
            copy.write(part, self.multiple, self.tokenizer.eod)


def drop_of_corpus(
    near: NearDuplicates, split: str, sources: Sequence[Path]
) -> Callable[[np.ndarray, list[int]], Dropped]:
    """How `CorpusDatasets.make` chooses the documents to drop from a corpus.

    Args:
        near: Options of near-duplicates.
        split: Percentages of training, validation and test documents.
        sources: Inputs, for error messages.
    """

    def choose(groups: np.ndarray, sizes: list[int]) -> Dropped:
        dropped = choose_dropped_of_corpus(groups, sizes, split, near.first_survives)
        for source, part in zip(sources, dropped.split(sizes), strict=True):
            check_documents(split, int(part.kept.sum()), f"{source} without near-duplicates")
        return dropped

    return choose


@dataclass(frozen=True)
class NearDuplicateCounts:
    """Near-duplicates among the documents of a project.

    Attributes:
        datasets: Counts of each dataset.
        splits: Counts of each split.
    """

    datasets: list[dict[str, int]]
    splits: dict[Split, dict[str, int]]


def count_near_duplicates(
    groups: np.ndarray, sizes: Sequence[int], split: str
) -> NearDuplicateCounts:
    """Count documents that have near-duplicates.

    Args:
        groups: Group of each document, i64 [documents].
        sizes: Number of documents of each dataset.
        split: Percentages of training, validation and test documents.
    """
    training = training_documents(sizes, split)
    alike = np.bincount(groups, minlength=len(groups))[groups] > 1
    trained = np.bincount(groups[training], minlength=len(groups))[groups]
    repeated = training & (trained > 1)
    leaked = ~training & (trained > 0)
    bounds = np.cumsum(sizes)[:-1]
    of_split: dict[Split, dict[str, int]] = {
        "train": {"near_duplicates": int(repeated.sum())},
        "valid": {"near_duplicates_of_training": 0},
        "test": {"near_duplicates_of_training": 0},
    }
    for size, part in zip(sizes, np.split(leaked, bounds), strict=True):
        for name, (start, end) in document_ranges(split, size).items():
            if name != "train":
                of_split[name]["near_duplicates_of_training"] += int(part[start:end].sum())
    datasets = [
        {"near_duplicates": int(a.sum()), "held_out_near_duplicates_of_training": int(b.sum())}
        for a, b in zip(np.split(alike, bounds), np.split(leaked, bounds), strict=True)
    ]
    return NearDuplicateCounts(datasets, of_split)
