"""Which near-duplicates are dropped, and datasets without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_mcore.data.corpus.counts import read_counts, write_counts
from retro_mcore.data.near_duplicates.files import DocumentKeys, keys_path
from retro_mcore.data.tokens.document_ids import DocumentIds, ids_path, write_ids
from retro_mcore.data.tokens.indexed_dataset import write_indexed_dataset
from retro_mcore.data.tokens.layout import ends_and_padding
from retro_mcore.data.tokens.splits import document_ranges
from retro_mcore.data.tokens.token_file import TokenFile, bin_path, idx_path
from retro_mcore.project.markers import signed_write
from retro_mcore.project.space import require_space

#: Dropped documents that are named.
_EXAMPLES = 20
#: Names of the counts of dropped documents.
OF_HELD_OUT, OF_TRAINING = "near_duplicates_of_held_out_dropped", "near_duplicates_dropped"


@dataclass(frozen=True)
class Dropped:
    """Documents that are dropped, of all datasets in their order.

    Attributes:
        of_held_out: Near-duplicates of held-out documents, bool [documents].
        of_earlier: Near-duplicates of earlier documents that are kept, bool [documents].
    """

    of_held_out: np.ndarray
    of_earlier: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """The others, bool [documents]."""
        return ~(self.of_held_out | self.of_earlier)

    def split(self, sizes: Sequence[int]) -> list[Dropped]:
        """Those of each dataset, given the numbers of documents."""
        bounds = np.cumsum(sizes)[:-1]
        parts = (np.split(each, bounds) for each in (self.of_held_out, self.of_earlier))
        return [Dropped(*pair) for pair in zip(*parts, strict=True)]


def choose_dropped(
    groups: np.ndarray, may_drop: np.ndarray, held_out: np.ndarray, first_survives: bool
) -> Dropped:
    """Choose the documents to drop.

    Args:
        groups: Group of each document, i64 [documents].
        may_drop: Documents that may be dropped, bool [documents].
        held_out: Held-out documents, bool [documents].
        first_survives: Drop all but the first of a group; otherwise only near-duplicates of
            held-out documents.
    """
    of_held_out = may_drop & np.isin(groups, groups[held_out])
    firsts = np.zeros(len(groups), bool)
    firsts[np.unique(groups, return_index=True)[1]] = True
    of_earlier = may_drop & ~of_held_out & ~firsts & first_survives
    return Dropped(of_held_out, of_earlier)


def choose_dropped_of_corpus(
    groups: np.ndarray, sizes: Sequence[int], split: str, first_survives: bool
) -> Dropped:
    """Choose the training documents to drop from the datasets of a corpus.

    The split is a share of the remaining documents. So each time documents are dropped, some
    held-out ones become training documents, which are then looked at in turn.

    Args:
        groups: Group of each document, i64 [documents].
        sizes: Number of documents of each dataset.
        split: Percentages of training, validation and test documents.
        first_survives: As for `choose_dropped`.
    """
    dropped = Dropped(np.zeros(len(groups), bool), np.zeros(len(groups), bool))
    while True:
        kept = np.flatnonzero(dropped.kept)
        training = training_documents(_remaining(dropped.kept, sizes), split)
        found = choose_dropped(groups[kept], training, ~training, first_survives)
        if found.kept.all():
            return dropped
        dropped.of_held_out[kept[found.of_held_out]] = True
        dropped.of_earlier[kept[found.of_earlier]] = True


def _remaining(kept: np.ndarray, sizes: Sequence[int]) -> list[int]:
    return [int(part.sum()) for part in np.split(kept, np.cumsum(sizes)[:-1])]


def training_documents(sizes: Sequence[int], split: str) -> np.ndarray:
    """Mark the training documents of datasets, bool [documents].

    Args:
        sizes: Number of documents of each dataset.
        split: Percentages of training, validation and test documents.
    """
    numbers = [np.arange(size) < document_ranges(split, size)["train"][1] for size in sizes]
    return np.concatenate([np.empty(0, bool), *numbers])


@dataclass(frozen=True)
class Copy:
    """A dataset, and a copy of it without some documents.

    Attributes:
        source: Path of the dataset, without .bin and .idx.
        target: Path of the copy.
        fingerprint: Fingerprint of the copy.
        keys_fingerprint: Returns the fingerprint of a dataset's keys.
    """

    source: Path
    target: Path
    fingerprint: str
    keys_fingerprint: Callable[[Path], str]

    def write(self, dropped: Dropped, chunk_length: int, eod: int) -> None:
        """Write the copy with its ids, counts and keys, on rank 0.

        Args:
            dropped: What to leave out of this dataset.
            chunk_length: M, which documents are padded to a multiple of; 1: not padded.
            eod: Id of the end-of-document token.
        """
        file, kept = TokenFile(self.source), dropped.kept
        documents = (file.sequence(number) for number in np.flatnonzero(kept).tolist())
        require_space(self.target.parent, file.tokens.nbytes, f"the tokens of {self.target.name}")
        with (
            signed_write(bin_path(self.target), self.fingerprint) as binary,
            signed_write(idx_path(self.target), self.fingerprint) as index,
        ):
            write_indexed_dataset(binary, index, documents, file.tokens.dtype.type)
            self._write_ids(kept)
            write_counts(self.target, *self._counts(file, dropped, chunk_length, eod))
        keys = DocumentKeys.read(self.source).of(kept)
        with signed_write(keys_path(self.target), self.keys_fingerprint(self.target)) as temporary:
            keys.write(temporary)

    def _write_ids(self, kept: np.ndarray) -> None:
        ids = DocumentIds.find(self.source)
        if ids is None:
            return
        chosen = np.flatnonzero(kept).tolist()

        def encoded() -> Iterator[np.ndarray]:
            return (np.frombuffer(ids[number].encode(), np.uint8) for number in chosen)

        lengths = np.array([len(part) for part in encoded()], np.int64)
        with signed_write(ids_path(self.target), self.fingerprint) as temporary:
            write_ids(temporary, lengths, encoded())

    def _examples(self, marked: np.ndarray) -> list[str]:
        """Ids of the first marked documents."""
        ids, numbers = DocumentIds.find(self.source), np.flatnonzero(marked)[:_EXAMPLES].tolist()
        return [f"document {number}" if ids is None else ids[number] for number in numbers]

    def _counts(
        self, file: TokenFile, dropped: Dropped, chunk_length: int, eod: int
    ) -> tuple[Counter[str], dict[str, list[str]]]:
        """Counts of the dataset, of what was read as before, and of what was dropped."""
        before = read_counts(self.source)
        names = before.pop("such_as", {}) | {
            OF_HELD_OUT: self._examples(dropped.of_held_out),
            OF_TRAINING: self._examples(dropped.of_earlier),
        }
        counts = Counter[str](before)
        counts[OF_HELD_OUT] = int(dropped.of_held_out.sum())
        counts[OF_TRAINING] = int(dropped.of_earlier.sum())
        counts["documents"] = int(dropped.kept.sum())
        if chunk_length > 1:
            ends = ends_and_padding(file, 0, len(file), chunk_length, eod)
            counts["padding_tokens"] = int((ends[dropped.kept] - 1).sum())
        return counts, names
