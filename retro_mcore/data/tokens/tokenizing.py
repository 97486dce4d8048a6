"""Convert a corpus to a Megatron indexed dataset: text is tokenized on all ranks, tokens linked."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_mcore.data.corpus.counts import counts_path, write_counts
from retro_mcore.data.corpus.documents import Document, list_parts, read_part
from retro_mcore.data.corpus.files import CorpusFiles, find_corpus_files, readable_names
from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.data.tokens.document_ids import ids_path, pack_ids, write_ids
from retro_mcore.data.tokens.indexed_dataset import token_dtype, write_indexed_dataset
from retro_mcore.data.tokens.layout import DocumentLayout, is_padded
from retro_mcore.data.tokens.token_file import TokenFile, bin_path, idx_path
from retro_mcore.data.tokens.token_input import (
    check_token_input,
    find_token_input,
    take_token_input,
)
from retro_mcore.distributed import barrier, broadcast_object, get_rank, raise_together
from retro_mcore.errors import CorpusError
from retro_mcore.platform import setup_device
from retro_mcore.project.markers import (
    FileState,
    fingerprint_of,
    link_or_copy,
    signed_write,
    state_of,
)
from retro_mcore.project.shards import Shard, ShardReport, run_shards

#: Texts tokenized in one call.
_BATCH = 256
#: Tokens read in one call.
_BLOCK = 1 << 20
#: Version of the part files. Parts of an interrupted run of an older version are rebuilt.
_PART_FORMAT = 2
#: Number of leading texts of a part that are all compared with their decoded tokens, and the step
#: after them (every 16th). A comparison costs a third of tokenization.
_ALL_COMPARED, _COMPARED_EVERY = 1024, 16


@dataclass(frozen=True)
class CorpusReader:
    """Settings for reading documents from JSON lines and text files.

    Attributes:
        json_keys: Keys of a JSON line that hold text.
        id_key: Key of a JSON line that holds its id.
        cleaner: Function applied to every text.
    """

    json_keys: Sequence[str] = ("text",)
    id_key: str = "id"
    cleaner: Callable[[str], str] | None = None


def make_dataset(
    source: Path,
    target: Path,
    tokenizer: Tokenizer,
    reader: CorpusReader,
    fingerprint: str,
    multiple: int = 1,
) -> ShardReport | None:
    """Write the indexed dataset of one corpus with its document ids and counts, on all ranks.

    Args:
        source: Text, a folder, or a .bin and .idx pair.
        target: Path of the dataset, without .bin and .idx.
        tokenizer: Tokenizer to apply; for a pair, the one that produced its tokens.
        reader: How text is read.
        fingerprint: Fingerprint of the dataset's inputs and options.
        multiple: Documents are padded with EOD to a multiple of this number of tokens.

    Returns:
        Report of the tokenized parts; None if the dataset already existed.

    Raises:
        CorpusError: the corpus is missing, empty or malformed.
        TokenizerError: the tokens of a pair do not fit `tokenizer`, or documents that are padded
            hold EOD in their text.
    """
    layout = DocumentLayout(multiple, tokenizer.eod)
    with raise_together():
        layout.check_bos(tokenizer)
    if _is_done(target, fingerprint):
        return None
    given = find_token_input(source)
    if given is not None:
        return _take_tokens(given, target, tokenizer, fingerprint, layout)
    return _tokenize(source, target, tokenizer, reader, fingerprint, layout)


def empty_corpus(source: Path) -> CorpusError:
    """Error for a corpus without text."""
    return CorpusError(source, "holds no text", "Give documents that are not empty")


def _is_done(target: Path, fingerprint: str) -> bool:
    """Whether the .bin and .idx at `target` are complete. All ranks get the same answer."""
    done = False
    with raise_together():
        if get_rank() == 0:
            files = (bin_path(target), idx_path(target))
            done = all(state_of(file, fingerprint) is FileState.COMPLETE for file in files)
    return bool(broadcast_object(done))


def _take_tokens(
    source: Path, target: Path, tokenizer: Tokenizer, fingerprint: str, layout: DocumentLayout
) -> ShardReport | None:
    """Check a .bin and .idx, and link them, copy them, or write them with other padding."""
    with raise_together():
        if get_rank() == 0:
            check_token_input(source, tokenizer)
            if layout.multiple == 1 and not is_padded(TokenFile(source), tokenizer.eod):
                take_token_input(source, target, fingerprint)
                counts_path(target).unlink(missing_ok=True)
            else:
                _lay_tokens(source, target, token_dtype_of(tokenizer), fingerprint, layout)
    barrier()
    return ShardReport(1, 0, ())


def _lay_tokens(
    source: Path,
    target: Path,
    dtype: type[np.number],
    fingerprint: str,
    layout: DocumentLayout,
) -> None:
    """Write the documents of a .bin and .idx without their padding, or with that of `layout`."""
    counts, file = Counter[str](), TokenFile(source)
    documents = (file.sequence(number) for number in range(len(file)))
    if ids_path(source).is_file():
        link_or_copy(ids_path(source), ids_path(target), fingerprint)
    with (
        signed_write(bin_path(target), fingerprint) as binary,
        signed_write(idx_path(target), fingerprint) as index,
    ):
        laid = layout.lay(layout.cut(documents, bin_path(source), counts), source, counts)
        write_indexed_dataset(binary, index, laid, dtype)
        write_counts(target, counts, {})


def _tokenize(
    source: Path,
    target: Path,
    tokenizer: Tokenizer,
    reader: CorpusReader,
    fingerprint: str,
    layout: DocumentLayout,
) -> ShardReport:
    found = find_corpus_files(source)
    parts = list_parts(source)
    parts_dir = target.with_name(f"{target.name}.parts")
    shards = [Shard(i, i + 1, parts_dir / f"{i}.zip") for i in range(len(parts))]
    # Ids are relative: below the folder, or the file's name.
    root = f"{source if source.is_dir() else source.parent}/"

    def build(shard: Shard, path: Path) -> None:
        part, counts = parts[shard.start], Counter[str]()
        documents = read_part(part, reader.json_keys, reader.cleaner, reader.id_key, counts)
        _tokenize_part(documents, root, tokenizer, path, counts)

    made_from = fingerprint_of([fingerprint, _PART_FORMAT])
    report = run_shards(shards, build, made_from, f"tokenize {source.name}")
    with raise_together():
        if get_rank() == 0:
            dtype = token_dtype_of(tokenizer)
            _join(source, shards, target, dtype, fingerprint, found, layout)
            shutil.rmtree(parts_dir)
    barrier()
    return report


def token_dtype_of(tokenizer: Tokenizer) -> type[np.number]:
    """The dtype in which Megatron stores a tokenizer's tokens."""
    setup_device()  # before megatron is imported, so that it gives no advice on GPUs
    return token_dtype(tokenizer.vocab_size)


def _join(
    source: Path,
    shards: Sequence[Shard],
    target: Path,
    dtype: type[np.number],
    fingerprint: str,
    found: CorpusFiles,
    layout: DocumentLayout,
) -> None:
    """Write the dataset and its side files from its parts."""
    padding = Counter[str]()
    with (
        signed_write(bin_path(target), fingerprint) as binary,
        signed_write(idx_path(target), fingerprint) as index,
        # The innermost file is renamed first, so a dataset always has its ids.
        signed_write(ids_path(target), fingerprint) as ids,
    ):
        documents = layout.lay(_documents(shards), source, padding)
        number = write_indexed_dataset(binary, index, documents, dtype)
        if not number:
            raise empty_corpus(source)
        lengths = np.concatenate([_read(shard, "id_lengths") for shard in shards])
        write_ids(ids, lengths, (_read(shard, "ids") for shard in shards))
        counts = sum((_counts(shard) for shard in shards), found.counts) + padding
        counts["documents"] = number
        counts["repeated_ids"] = number - _num_distinct_ids(shards)
        root = source if source.is_dir() else source.parent
        names = {
            name: list(readable_names([path.relative_to(root) for path in paths]))
            for name, paths in (
                ("files_left_out", found.left_out),
                ("broken_links", found.broken_links),
                ("repeated_links", found.repeated_links),
            )
        }
        write_counts(target, counts, names)


def _tokenize_part(
    documents: Iterable[Document],
    root: str,
    tokenizer: Tokenizer,
    path: Path,
    counts: Counter[str],
) -> None:
    """Write tokens, lengths, ids and counts of a part's documents, one batch at a time."""
    waiting = iter(documents)
    ids: list[str] = []
    lengths: list[int] = []
    # Not HDF5: it cannot grow a contiguous dataset, and crashes when the disk is full.
    with zipfile.ZipFile(path, "w") as file:
        with file.open("tokens", "w", force_zip64=True) as tokens:
            while batch := list(itertools.islice(waiting, _BATCH)):
                texts = [document.text for document in batch]
                rows = tokenizer.tokenize_batch(texts)
                compared = _compared(len(lengths), len(texts))
                some = [texts[place] for place in compared]
                counts.update(tokenizer.count_losses(some, [rows[place] for place in compared]))
                counts["texts_not_compared_with_tokens"] += len(texts) - len(compared)
                begin, end = tokenizer.beginning, tokenizer.eod
                flat = [token for row in rows for token in (*begin, *row, end)]
                tokens.write(np.array(flat, np.int32).tobytes())
                lengths += [len(begin) + len(row) + 1 for row in rows]
                ids += [document.source_id.removeprefix(root) for document in batch]
        arrays = {"lengths": np.array(lengths, dtype=np.int64)}
        arrays["ids"], arrays["id_lengths"] = pack_ids(ids)
        arrays["id_hashes"] = np.array([_hash(value) for value in ids], np.uint64)
        for name, array in arrays.items():
            with file.open(name, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array)
        file.writestr(zipfile.ZipInfo("counts.json"), json.dumps(counts, sort_keys=True))


def _compared(first: int, number: int) -> list[int]:
    """Indexes of the texts to compare with their tokens; `first` texts precede them."""
    return [
        place
        for place in range(number)
        if first + place < _ALL_COMPARED or not (first + place) % _COMPARED_EVERY
    ]


def _hash(value: str) -> int:
    encoded = value.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _counts(shard: Shard) -> Counter[str]:
    with zipfile.ZipFile(shard.path) as file:
        return Counter(json.loads(file.read("counts.json")))


def _num_distinct_ids(shards: Sequence[Shard]) -> int:
    return len(np.unique(np.concatenate([_read(shard, "id_hashes") for shard in shards])))


def _read(shard: Shard, name: str) -> np.ndarray:
    with zipfile.ZipFile(shard.path) as file, file.open(name) as stream:
        return np.lib.format.read_array(stream)


def _documents(shards: Sequence[Shard]) -> Iterator[np.ndarray]:
    for shard in shards:
        ends = np.cumsum(_read(shard, "lengths"))
        first = start = 0
        with zipfile.ZipFile(shard.path) as file, file.open("tokens") as stream:
            while first < len(ends):
                # Whole documents, about one block of tokens at a time, but at least one.
                last = max(int(np.searchsorted(ends, start + _BLOCK, side="right")), first + 1)
                stop = int(ends[last - 1])
                tokens = np.frombuffer(stream.read(4 * (stop - start)), np.int32)
                yield from np.split(tokens, ends[first : last - 1] - start)
                first, start = last, stop
