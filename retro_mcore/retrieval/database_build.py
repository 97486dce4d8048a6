"""Build the chunk database: cut documents into chunks of M tokens, in upstream's file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.data.tokens.layout import ends_and_padding
from retro_mcore.data.tokens.splits import num_retrieved_documents
from retro_mcore.data.tokens.token_file import TokenFile, TokenSource
from retro_mcore.distributed import barrier, get_rank, raise_together
from retro_mcore.errors import ConfigurationError, TokenizerError
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.markers import FileState, signed_write, state_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import Shard, ShardReport, choose_shard_length, cut, run_shards
from retro_mcore.project.space import require_space
from retro_mcore.retrieval.bert_tokens import BertTokenCounter
from retro_mcore.retrieval.dataset_infos import DatasetInfo

#: Upstream's number of documents per file; fewer for a small corpus, so ranks can share it.
LONGEST_DOCUMENT_BLOCK = 100_000
MERGED = ("sampled", "train", "valid")
#: Number of chunks decoded and counted in one call.
_BATCH = 4096


@dataclass(frozen=True)
class DatabaseReport:
    """The result of `build_database`."""

    infos: list[DatasetInfo]
    shards: list[ShardReport]
    merged_reused: bool

    @property
    def num_train_chunks(self) -> int:
        """Chunks of the retrieval database."""
        return sum(info.n_chunks_train for info in self.infos)

    @property
    def num_held_out_chunks(self) -> int:
        """Chunks of validation and test documents."""
        return sum(info.n_chunks - info.n_chunks_train for info in self.infos)

    @property
    def num_invalid_chunks(self) -> int:
        """Chunks excluded because they contain no words."""
        return sum(info.n_chunks_invalid for info in self.infos)


@dataclass(frozen=True)
class DatabaseInputs:
    """Tokens and tokenizers that a database is built from.

    Attributes:
        paths: The project.
        config: Its configuration.
        datasets: Its datasets, in the order of its data path.
        tokenizer: Its tokenizer.
        counter: Counts BERT tokens; a chunk without any is invalid.
        whole_datasets: Datasets whose documents all go into the retrieval database.
        aligned: Whether chunks are cut where samples of padded documents have theirs; see
            `_aligned_chunks`.
        left_out: Documents whose chunks are left out of the merged databases: dataset and
            document, i64 [documents, 2].
    """

    paths: ProjectPaths
    config: ProjectConfig
    datasets: Sequence[TokenFile]
    tokenizer: Tokenizer
    counter: BertTokenCounter
    whole_datasets: Sequence[str]
    aligned: bool
    left_out: np.ndarray


def build_database(
    inputs: DatabaseInputs,
    *,
    fingerprint: str,
    chunk_fingerprints: Sequence[str],
    num_sampled: int | None,
    document_block_size: int | None,
) -> DatabaseReport:
    """Cut every document into chunks (all ranks), then merge them (rank 0).

    Args:
        inputs: What to build it from.
        fingerprint: Fingerprint of all inputs.
        chunk_fingerprints: Fingerprint of the inputs of each dataset's chunks.
        num_sampled: Chunks to train the index on; None: all training chunks.
        document_block_size: Documents per file; None: chosen by their number.

    Raises:
        TokenizerError: the tokens were not made by the tokenizer.
        ConfigurationError: the split leaves no training chunks, or too few to sample.
    """
    config, whole_datasets = inputs.config, inputs.whole_datasets
    weights, prefixes = config.blend
    infos, reports, all_shards = [], [], []
    cut_chunks = _aligned_chunks if inputs.aligned else _packed_chunks
    for ratio, prefix, dataset, made_from in zip(
        weights, prefixes, inputs.datasets, chunk_fingerprints, strict=True
    ):
        num_docs = len(dataset)
        num_train = num_retrieved_documents(config.retro_gpt_split, num_docs)
        if prefix in whole_datasets:
            num_train = num_docs
        infos.append(DatasetInfo(ratio, prefix, num_docs, num_train))
        length = document_block_size or choose_shard_length(num_docs, LONGEST_DOCUMENT_BLOCK, 64, 8)
        shards = cut(inputs.paths.individual_db(prefix), num_docs, length)
        all_shards.append(shards)

        def build(shard: Shard, path: Path, dataset: TokenFile = dataset) -> None:
            chunks = cut_chunks(dataset, shard, inputs.tokenizer, config.retro_gpt_chunk_length)
            _build_shard(shard, path, dataset, inputs, chunks)

        num_chunks = (-(-dataset.lengths // config.retro_gpt_chunk_length)).sum(dtype=np.int64)
        row_bytes = 16 * float(num_chunks) / max(num_docs, 1)
        # Longest first, so that no rank still works on a long one while the others wait.
        starts = np.array([shard.start for shard in shards], np.int64)
        tokens = np.add.reduceat(dataset.lengths, starts, dtype=np.int64)
        by_length = [shards[i] for i in np.argsort(-tokens, kind="stable")]
        reports.append(run_shards(by_length, build, made_from, f"chunks of {prefix}", row_bytes))
    merged_reused = True
    with raise_together():
        sources = [
            _DatasetChunks(shards, inputs.left_out[inputs.left_out[:, 0] == number, 1])
            for number, shards in enumerate(all_shards)
        ]
        _count_chunks(infos, sources, num_sampled, whole_datasets)
        if get_rank() == 0:
            merged_reused = _merge_all(infos, sources, inputs.paths, fingerprint)
    barrier()
    return DatabaseReport(infos, reports, merged_reused)


def chunk_bounds(lengths: np.ndarray, chunk_length: int) -> tuple[np.ndarray, ...]:
    """Cut sequences into chunks of at most `chunk_length`.

    Args:
        lengths: Tokens of each sequence.
        chunk_length: M.

    Returns:
        Index of the sequence, start and end of each chunk, all i64.
    """
    lengths = lengths.astype(np.int64)
    counts = -(-lengths // chunk_length)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(sequence)) - first) * chunk_length
    return sequence, start, np.minimum(start + chunk_length, lengths[sequence])


def _packed_chunks(
    dataset: TokenSource, shard: Shard, tokenizer: Tokenizer, chunk_length: int
) -> tuple[np.ndarray, ...]:
    """Cut the texts of a shard's documents from their first token on; as `chunk_bounds`."""
    first_token, lengths = _texts_of(dataset, shard, tokenizer)
    document, start, end = chunk_bounds(lengths, chunk_length)
    return document, start + first_token[document], end + first_token[document]


def _aligned_chunks(
    dataset: TokenSource, shard: Shard, tokenizer: Tokenizer, chunk_length: int
) -> tuple[np.ndarray, ...]:
    """Cut a shard's padded documents every M tokens; as `chunk_bounds`.

    BOS, EOD and padding are not text, so the first chunk lacks BOS, and a chunk without text does
    not exist.
    """
    lengths = dataset.lengths[shard.start : shard.end].astype(np.int64)
    ends = ends_and_padding(dataset, shard.start, shard.end, chunk_length, tokenizer.eod)
    document, start, end = chunk_bounds(lengths - ends, chunk_length)
    start = np.maximum(start, _begun(dataset, shard, tokenizer, lengths - ends)[document])
    text = start < end
    return document[text], start[text], end[text]


def _build_shard(
    shard: Shard,
    path: Path,
    dataset: TokenFile,
    inputs: DatabaseInputs,
    bounds: tuple[np.ndarray, ...],
) -> None:
    """Write the chunks of documents [start, end) of one dataset, cut at `bounds`."""
    document, start, end = bounds
    counts = np.empty(len(document), np.uint32)
    for first in range(0, len(document), _BATCH):
        last = min(first + _BATCH, len(document))
        counts[first:last] = _count_batch(
            dataset, inputs, document[first:last] + shard.start, start[first:last], end[first:last]
        )
    chunks = np.stack([document + shard.start, start, end, counts], axis=1).astype(np.uint32)
    valid = counts > 0
    per_document = np.bincount(document[valid], minlength=shard.end - shard.start)
    with h5py.File(path, "w") as file:
        for name, rows in (("chunks_valid", chunks[valid]), ("chunks_invalid", chunks[~valid])):
            file[name] = rows if len(rows) else np.empty(0, np.uint32)  # upstream's empty shape
        file["doc_offsets"] = np.stack(
            [np.arange(shard.start, shard.end), np.cumsum(per_document)], axis=1
        ).astype(np.uint64)


def _texts_of(
    dataset: TokenSource, shard: Shard, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of the text in each of the shard's sequences, both i64.

    A final end-of-document token is not text. Neither is BOS if the project's documents begin with
    it.
    """
    lengths = dataset.lengths[shard.start : shard.end].astype(np.int64)
    starts = dataset.starts[shard.start : shard.end]
    last = np.maximum(starts + lengths - 1, 0)
    lengths = lengths - ((lengths > 0) & (dataset.tokens[last] == tokenizer.eod))
    begun = _begun(dataset, shard, tokenizer, lengths)
    return begun, lengths - begun


def _begun(
    dataset: TokenSource, shard: Shard, tokenizer: Tokenizer, lengths: np.ndarray
) -> np.ndarray:
    """Tokens before the text in each of the shard's sequences, i64: 1 for BOS, else 0.

    Args:
        dataset: The tokens.
        shard: Some of its sequences.
        tokenizer: The project's tokenizer.
        lengths: Tokens of each sequence, without those that end it.
    """
    if not tokenizer.adds_bos:
        return np.zeros_like(lengths)
    # An empty document at the end of the file has no first token.
    starts = dataset.starts[shard.start : shard.end]
    first = np.minimum(starts, max(len(dataset.tokens) - 1, 0))
    return ((lengths > 0) & (dataset.tokens[first] == tokenizer.bos)).astype(np.int64)


def _count_batch(
    dataset: TokenFile,
    inputs: DatabaseInputs,
    document: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
) -> np.ndarray:
    """Count the WordPiece tokens of adjacent chunks."""
    offset = dataset.starts[document]
    first = int(offset[0] + start[0])
    tokens = dataset.tokens[first : int(offset[-1] + end[-1])]
    tokenizer = inputs.tokenizer
    if int(tokens.max()) >= tokenizer.vocab_size:
        raise TokenizerError(
            f"{dataset.prefix}.bin",
            f"holds token id {tokens.max()}, but the project's tokenizer has "
            f"{tokenizer.vocab_size}",
            "Restore the tokenizer that the tokens were made with",
        )
    flat = tokens.tolist()
    bounds = zip((offset + start - first).tolist(), (offset + end - first).tolist(), strict=True)
    return inputs.counter.count(tokenizer.detokenize_batch([flat[a:b] for a, b in bounds]))


@dataclass(frozen=True)
class _DatasetChunks:
    """The chunks of one dataset, without documents that are left out.

    Attributes:
        shards: Files of all its chunks.
        left_out: Documents that are left out, i64 [documents].
    """

    shards: Sequence[Shard]
    left_out: np.ndarray

    def read(self, shard: Shard) -> tuple[np.ndarray, np.ndarray, int]:
        """Read a file: chunks u32 [n, 4], doc_offsets u64 [documents, 2], number of invalid."""
        with h5py.File(shard.path, "r") as file:
            chunks, offsets = file["chunks_valid"][:].reshape(-1, 4), file["doc_offsets"][:]
            num_invalid = len(file["chunks_invalid"])
        gone = np.isin(chunks[:, 0], self.left_out) if len(self.left_out) else np.zeros(0, bool)
        if gone.any():
            chunks = chunks[~gone]
            ends = np.searchsorted(chunks[:, 0], offsets[:, 0], side="right")
            offsets[:, 1] = ends.astype(np.uint64)
        return chunks, offsets, num_invalid


def _count_chunks(
    infos: Sequence[DatasetInfo],
    sources: Sequence[_DatasetChunks],
    num_sampled: int | None,
    whole_datasets: Sequence[str],
) -> None:
    for info, source in zip(infos, sources, strict=True):
        for shard in source.shards:
            chunks, _, num_invalid = source.read(shard)
            info.n_chunks += len(chunks)
            info.n_chunks_train += int((chunks[:, 0] < info.n_docs_train).sum())
            info.n_chunks_invalid += num_invalid
    if not sum(info.n_chunks_train for info in infos):
        raise ConfigurationError(
            "--split", "leaves no training chunks", "Give more documents or a larger first part"
        )
    # The index is not retrained for appended datasets.
    sampled = [info for info in infos if info.prefix not in whole_datasets]
    total_ratio = sum(info.ratio for info in sampled)
    for info in sampled:
        info.n_chunks_sampled = info.n_chunks_train
        if num_sampled is not None:
            info.n_chunks_sampled = int(num_sampled * info.ratio / total_ratio)
        if info.n_chunks_sampled > info.n_chunks_train:
            raise ConfigurationError(
                "--retro-index-ntrain",
                f"{num_sampled} takes {info.n_chunks_sampled} of the {info.n_chunks_train} training"
                f" chunks of {info.prefix}",
                "Give a smaller number",
            )


def _merge_all(
    infos: Sequence[DatasetInfo],
    sources: Sequence[_DatasetChunks],
    paths: ProjectPaths,
    fingerprint: str,
) -> bool:
    """Write the missing merged databases. Returns whether all existed already."""
    # Kept where only the weights differ, which `set_samples` changes: build_index has its digest.
    if state_of(paths.dataset_infos, fingerprint) is not FileState.COMPLETE:
        with signed_write(paths.dataset_infos, fingerprint) as temporary:
            write_json(temporary, [vars(info) for info in infos])
    reused = True
    for name in MERGED:
        path = paths.merged_db(name)
        if state_of(path, fingerprint) is FileState.COMPLETE:
            continue
        reused = False
        with signed_write(path, fingerprint) as temporary:
            _merge(name, infos, sources, temporary)
    return reused


def _merge(
    name: str,
    infos: Sequence[DatasetInfo],
    sources: Sequence[_DatasetChunks],
    path: Path,
) -> None:
    bounds = [
        {
            "train": (0, info.n_chunks_train),
            "valid": (info.n_chunks_train, info.n_chunks),
            "sampled": (0, info.n_chunks_sampled),
        }[name]
        for info in infos
    ]
    total = sum(end - start for start, end in bounds)
    num_docs = sum(info.n_docs_train for info in infos)
    require_space(path.parent, 20 * total, f"the {total} chunks of {name}.hdf5")
    with h5py.File(path, "w") as file:
        merged = file.create_dataset("chunks", (total, 5), dtype=np.uint32)
        file["n_written"] = np.array([total], np.uint64)
        offsets = (
            file.create_dataset("doc_offsets", (num_docs, 3), dtype=np.uint64)
            if name == "train"
            else None
        )
        row = doc_row = chunks_before = 0
        for index, (info, source, (start, end)) in enumerate(
            zip(infos, sources, bounds, strict=True)
        ):
            seen = 0
            for shard in source.shards:
                chunks, doc_offsets, _ = source.read(shard)
                part = chunks[max(start - seen, 0) : max(end - seen, 0)]
                merged[row : row + len(part), 0] = index
                merged[row : row + len(part), 1:] = part
                row += len(part)
                if offsets is not None:
                    doc_offsets = doc_offsets[: max(info.n_docs_train - shard.start, 0)]
                    rows = slice(doc_row, doc_row + len(doc_offsets))
                    offsets[rows, 0] = index
                    offsets[rows, 1] = doc_offsets[:, 0]
                    offsets[rows, 2] = doc_offsets[:, 1] + np.uint64(chunks_before + seen)
                    doc_row += len(doc_offsets)
                seen += len(chunks)
            chunks_before += info.n_chunks_train
