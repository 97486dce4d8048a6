"""Search the near-duplicates among the documents of tokenized datasets, on all ranks.

Keys are computed in files of consecutive documents, which any number of ranks share and an
interrupted run keeps. Then every rank finds the same candidates and verifies its share of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from retro_mcore.data.near_duplicates.files import (
    DocumentKeys,
    groups_path,
    keys_path,
    read_groups,
    write_groups,
)
from retro_mcore.data.near_duplicates.grouping import group_documents
from retro_mcore.data.near_duplicates.minhash import Bands, MinHasher
from retro_mcore.data.near_duplicates.shingles import digest_of, shingles_of, similarity
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokens.token_file import TokenFile, bin_path
from retro_mcore.distributed import (
    barrier,
    gather,
    get_rank,
    get_world_size,
    on_first_rank,
    raise_together,
)
from retro_mcore.project.markers import (
    FileState,
    fingerprint_of,
    signed_write,
    state_of,
)
from retro_mcore.project.markers import digest_of as file_digest
from retro_mcore.project.shards import Shard, choose_shard_length, cut, run_shards

#: Documents per file of keys, and documents decoded in one call.
_LONGEST, _BATCH = 100_000, 64
#: Sets of shingles that a process keeps while it verifies pairs.
_KEPT = 256
#: Version of the keys; part of their fingerprint.
_VERSION = 1


@dataclass(frozen=True)
class NearDuplicateSearch:
    """Search for near-duplicates.

    Attributes:
        tokenizer: Tokenizer of the datasets.
        threshold: Least Jaccard similarity of near-duplicates.
        words: Words per shingle.
    """

    tokenizer: Tokenizer
    threshold: float
    words: int

    def group(self, prefixes: Sequence[Path], folder: Path) -> np.ndarray:
        """Group the documents of all datasets, and write the groups; a collective call.

        Groups that are written already are read.

        Args:
            prefixes: Paths of the datasets, without .bin and .idx.
            folder: Folder of the file of groups.

        Returns:
            Group of each document, i64 [documents]; see `group_documents`.

        Raises:
            CorruptFileError: a file is damaged.
            MissingDependencyError: datasketch is not installed.
        """
        if self.is_done(prefixes, folder):
            with raise_together():
                return read_groups(folder, sum(len(TokenFile(prefix)) for prefix in prefixes))
        for prefix in prefixes:
            self._write_keys(prefix)
        with raise_together():
            tables = [DocumentKeys.read(prefix) for prefix in prefixes]
            files = [TokenFile(prefix) for prefix in prefixes]
        texts = _Texts(self, files)
        digests = np.concatenate([table.digests for table in tables])
        count = Bands.of(self.threshold).count
        bands = (np.concatenate([table.keys[band] for table in tables]) for band in range(count))
        groups = group_documents(digests, bands, texts.similar)
        with raise_together():
            if get_rank() == 0:
                write_groups(folder, groups, self.fingerprint(prefixes))
        barrier()
        return groups

    def is_done(self, prefixes: Sequence[Path], folder: Path) -> bool:
        """Whether the groups are written. All ranks get the same answer."""

        def is_complete() -> bool:
            return state_of(groups_path(folder), self.fingerprint(prefixes)) is FileState.COMPLETE

        return on_first_rank(is_complete)

    def fingerprint(self, prefixes: Sequence[Path]) -> str:
        """Fingerprint of the groups."""
        return fingerprint_of([self.keys_fingerprint(prefix) for prefix in prefixes])

    def keys_fingerprint(self, prefix: Path) -> str:
        """Fingerprint of the keys of a dataset."""
        tokens = file_digest(bin_path(prefix))
        return fingerprint_of(["minhash", _VERSION, self.threshold, self.words, tokens])

    def shingles(self, file: TokenFile, documents: Sequence[int]) -> list[np.ndarray]:
        """Shingles of documents, u64 [n] each."""
        texts = [self._text(file.sequence(document)) for document in documents]
        decoded = self.tokenizer.detokenize_batch([text.tolist() for text in texts])
        return [shingles_of(text, self.words) for text in decoded]

    def _text(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens of a document's text, without BOS, EOD and padding."""
        inside = np.flatnonzero(tokens != self.tokenizer.eod)
        text = tokens[: inside[-1] + 1] if len(inside) else tokens[:0]
        begins = self.tokenizer.adds_bos and len(text) and text[0] == self.tokenizer.bos
        return text[1:] if begins else text

    def _write_keys(self, prefix: Path) -> None:
        made_from, path = self.keys_fingerprint(prefix), keys_path(prefix)
        if on_first_rank(lambda: state_of(path, made_from) is FileState.COMPLETE):
            return
        with raise_together():
            file = TokenFile(prefix)
            hasher = MinHasher(Bands.of(self.threshold))
        parts = prefix.with_name(f"{prefix.name}.minhash.parts")
        shards = cut(parts, len(file), choose_shard_length(len(file), _LONGEST, 64, 8))

        def build(shard: Shard, temporary: Path) -> None:
            self._keys_of(file, shard, hasher).write(temporary)

        row_bytes = 8 * (Bands.of(self.threshold).count + 1)
        run_shards(shards, build, made_from, f"keys of {prefix.name}", row_bytes)
        with raise_together():
            if get_rank() == 0:
                _join(shards, path, made_from)
                shutil.rmtree(parts)
        barrier()

    def _keys_of(self, file: TokenFile, shard: Shard, hasher: MinHasher) -> DocumentKeys:
        keys, digests = [], []
        for first in range(shard.start, shard.end, _BATCH):
            documents = range(first, min(first + _BATCH, shard.end))
            for shingles in self.shingles(file, documents):
                keys.append(hasher.keys(shingles))
                digests.append(digest_of(shingles))
        return DocumentKeys(np.stack(keys, axis=1), np.array(digests, np.uint64))


def _join(shards: Sequence[Shard], path: Path, fingerprint: str) -> None:
    parts = [DocumentKeys.load(shard.path) for shard in shards]
    keys = np.concatenate([part.keys for part in parts], axis=1)
    digests = np.concatenate([part.digests for part in parts])
    with signed_write(path, fingerprint) as temporary:
        DocumentKeys(keys, digests).write(temporary)


class _Texts:
    """Documents of all datasets, numbered across them, whose pairs are verified."""

    def __init__(self, search: NearDuplicateSearch, files: Sequence[TokenFile]) -> None:
        self._search, self._files = search, files
        self._firsts = np.cumsum([0, *(len(file) for file in files)])
        self._shingles = lru_cache(_KEPT)(self._read)

    def similar(self, pairs: np.ndarray) -> np.ndarray:
        """Whether pairs of documents i64 [n, 2] are near-duplicates, bool [n]; a collective."""
        mine = np.array_split(pairs, get_world_size())[get_rank()].tolist()
        with raise_together():
            verified = [self._is_similar(*pair) for pair in mine]
        return np.concatenate([np.array(found, bool) for found in gather(verified)])

    def _is_similar(self, first: int, second: int) -> bool:
        found = similarity(self._shingles(first), self._shingles(second))
        return found >= self._search.threshold

    def _read(self, document: int) -> np.ndarray:
        dataset = int(np.searchsorted(self._firsts, document, side="right")) - 1
        number = document - int(self._firsts[dataset])
        return self._search.shingles(self._files[dataset], [number])[0]
