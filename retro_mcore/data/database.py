"""The chunk database: every document cut into chunks of M tokens, in upstream's files.

The retrieval database is db/merged/train.hdf5, made of training documents only; a chunk's id is
its row there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.lib.stride_tricks import as_strided

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.bert_tokens import BertTokenCounter
from retro_mcore.data.hdf5 import map_dataset
from retro_mcore.data.shards import Shard, ShardReport, choose_shard_length, cut, run_shards
from retro_mcore.data.token_file import TokenFile, TokenSource, open_token_files
from retro_mcore.data.tokenizers import Tokenizer
from retro_mcore.distributed import barrier, get_rank, raise_together
from retro_mcore.errors import ConfigurationError, ProjectError, TokenizerError
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.markers import FileState, signed_write, state_of, verify
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.space import require_space
from retro_mcore.project.stages import require_stage

#: Documents per file that upstream takes; fewer for a small corpus, so that ranks can share it.
LONGEST_DOCUMENT_BLOCK = 100_000
MERGED = ("sampled", "train", "valid")
#: Chunks whose texts are made and counted in one call.
_BATCH = 4096


@dataclass
class DatasetInfo:
    """One entry of db/indexed_dataset_infos.json."""

    ratio: float
    prefix: str
    n_docs: int
    n_docs_train: int
    n_chunks: int = 0
    n_chunks_train: int = 0
    n_chunks_invalid: int = 0
    n_chunks_sampled: int = 0


@dataclass(frozen=True)
class DatabaseReport:
    """What `build_database` made or found."""

    infos: list[DatasetInfo]
    shards: list[ShardReport]
    merged_reused: bool

    @property
    def num_train_chunks(self) -> int:
        """Chunks of the retrieval database."""
        return sum(info.n_chunks_train for info in self.infos)


def build_database(
    config: ProjectConfig,
    paths: ProjectPaths,
    datasets: Sequence[TokenFile],
    tokenizer: Tokenizer,
    counter: BertTokenCounter,
    num_sampled: int | None,
    document_block_size: int | None,
    fingerprint: str,
    chunk_fingerprints: Sequence[str],
    whole_datasets: Sequence[str] = (),
) -> DatabaseReport:
    """Cut every document into chunks (all ranks), then merge them (rank 0).

    Args:
        config: The project's configuration.
        paths: The project.
        datasets: Its datasets, in the order of its data path.
        tokenizer: Its tokenizer.
        counter: Counts BERT tokens; a chunk without any is invalid.
        num_sampled: Chunks to train the index on; None: all training chunks.
        document_block_size: Documents per file; None: chosen from their number.
        fingerprint: What the database is built from.
        chunk_fingerprints: What the chunks of each dataset are made from.
        whole_datasets: Datasets whose documents are all retrieved from.

    Raises:
        TokenizerError: the tokens are not of `tokenizer`.
        ConfigurationError: the split leaves no training chunks, or too few to sample.
    """
    weights, prefixes = config.blend
    infos, reports, all_shards = [], [], []
    train_share = float(config.retro_gpt_split.split(",")[0]) / 100
    for ratio, prefix, dataset, made_from in zip(
        weights, prefixes, datasets, chunk_fingerprints, strict=True
    ):
        num_docs = len(dataset)
        num_train = num_docs if prefix in whole_datasets else int(train_share * num_docs)
        infos.append(DatasetInfo(ratio, prefix, num_docs, num_train))
        length = document_block_size or choose_shard_length(num_docs, LONGEST_DOCUMENT_BLOCK, 64, 8)
        shards = cut(paths.individual_db(prefix), num_docs, length)
        all_shards.append(shards)

        def build(shard: Shard, path: Path, dataset: TokenFile = dataset) -> None:
            _build_shard(shard, path, dataset, tokenizer, counter, config.retro_gpt_chunk_length)

        num_chunks = (-(-dataset.lengths // config.retro_gpt_chunk_length)).sum(dtype=np.int64)
        row_bytes = 16 * float(num_chunks) / max(num_docs, 1)
        # The longest first, so that no rank is left with one while the others wait.
        starts = np.array([shard.start for shard in shards], np.int64)
        tokens = np.add.reduceat(dataset.lengths, starts, dtype=np.int64)
        by_length = [shards[i] for i in np.argsort(-tokens, kind="stable")]
        reports.append(run_shards(by_length, build, made_from, f"chunks of {prefix}", row_bytes))
    merged_reused = True
    with raise_together():
        _count_chunks(infos, all_shards, num_sampled, whole_datasets)
        if get_rank() == 0:
            merged_reused = _merge_all(infos, all_shards, paths, fingerprint)
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


def _build_shard(
    shard: Shard,
    path: Path,
    dataset: TokenFile,
    tokenizer: Tokenizer,
    counter: BertTokenCounter,
    chunk_length: int,
) -> None:
    """Chunks of documents [start, end) of one dataset."""
    lengths = _lengths_without_eod(dataset, shard, tokenizer.eod)
    document, start, end = chunk_bounds(lengths, chunk_length)
    counts = np.empty(len(document), np.uint32)
    for first in range(0, len(document), _BATCH):
        last = min(first + _BATCH, len(document))
        counts[first:last] = _count_batch(
            dataset, tokenizer, counter, document[first:last] + shard.start,
            start[first:last], end[first:last],
        )  # fmt: skip
    chunks = np.stack([document + shard.start, start, end, counts], axis=1).astype(np.uint32)
    valid = counts > 0
    per_document = np.bincount(document[valid], minlength=len(lengths))
    with h5py.File(path, "w") as file:
        for name, rows in (("chunks_valid", chunks[valid]), ("chunks_invalid", chunks[~valid])):
            file[name] = rows if len(rows) else np.empty(0, np.uint32)  # upstream's empty shape
        file["doc_offsets"] = np.stack(
            [np.arange(shard.start, shard.end), np.cumsum(per_document)], axis=1
        ).astype(np.uint64)


def _lengths_without_eod(dataset: TokenSource, shard: Shard, eod: int) -> np.ndarray:
    """Tokens of the shard's sequences, i64, an end-of-document token at their end left out."""
    lengths = dataset.lengths[shard.start : shard.end].astype(np.int64)
    last = np.maximum(dataset.starts[shard.start : shard.end] + lengths - 1, 0)
    return lengths - ((lengths > 0) & (dataset.tokens[last] == eod))


def _count_batch(
    dataset: TokenFile,
    tokenizer: Tokenizer,
    counter: BertTokenCounter,
    document: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
) -> np.ndarray:
    """WordPiece tokens of each chunk; the chunks follow each other in the file."""
    offset = dataset.starts[document]
    first = int(offset[0] + start[0])
    tokens = dataset.tokens[first : int(offset[-1] + end[-1])]
    if int(tokens.max()) >= tokenizer.vocab_size:
        raise TokenizerError(
            f"{dataset.prefix}.bin",
            f"holds token id {tokens.max()}, but the project's tokenizer has "
            f"{tokenizer.vocab_size}",
            "Restore the tokenizer that the tokens were made with",
        )
    flat = tokens.tolist()
    bounds = zip((offset + start - first).tolist(), (offset + end - first).tolist(), strict=True)
    return counter.count(tokenizer.detokenize_batch([flat[a:b] for a, b in bounds]))


def _count_chunks(
    infos: Sequence[DatasetInfo],
    all_shards: Sequence[Sequence[Shard]],
    num_sampled: int | None,
    whole_datasets: Sequence[str],
) -> None:
    for info, shards in zip(infos, all_shards, strict=True):
        for shard in shards:
            with h5py.File(shard.path, "r") as file:
                documents = _valid_chunks(file)[:, 0]
                info.n_chunks += len(documents)
                info.n_chunks_train += int((documents < info.n_docs_train).sum())
                info.n_chunks_invalid += len(file["chunks_invalid"])
    if not sum(info.n_chunks_train for info in infos):
        raise ConfigurationError(
            "--split", "leaves no training chunks", "Give more documents or a larger first part"
        )
    # The index is not trained anew for datasets that were appended.
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


def _valid_chunks(file: h5py.File) -> np.ndarray:
    """u32 [n, 4]: document, first token, end token, BERT tokens."""
    return file["chunks_valid"][:].reshape(-1, 4)


def _merge_all(
    infos: Sequence[DatasetInfo],
    all_shards: Sequence[Sequence[Shard]],
    paths: ProjectPaths,
    fingerprint: str,
) -> bool:
    """Write the merged databases that are not there yet; whether all of them were."""
    write_json(paths.dataset_infos, [vars(info) for info in infos])
    reused = True
    for name in MERGED:
        path = paths.merged_db(name)
        if state_of(path, fingerprint) is FileState.COMPLETE:
            continue
        reused = False
        with signed_write(path, fingerprint) as temporary:
            _merge(name, infos, all_shards, temporary)
    return reused


def _merge(
    name: str,
    infos: Sequence[DatasetInfo],
    all_shards: Sequence[Sequence[Shard]],
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
        for index, (info, shards, (start, end)) in enumerate(
            zip(infos, all_shards, bounds, strict=True)
        ):
            seen = 0
            for shard in shards:
                with h5py.File(shard.path, "r") as source:
                    chunks, doc_offsets = _valid_chunks(source), source["doc_offsets"][:]
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


class ChunkDatabase:
    """Random access to the chunks of a merged database. Memory-mapped, picklable.

    Args:
        path: A merged database, such as db/merged/train.hdf5.
        token_sources: The datasets, in the order of the project's data path.

    Raises:
        CorruptFileError: the file is damaged.
    """

    def __init__(self, path: Path | str, token_sources: Sequence[TokenSource]) -> None:
        self.path, self.token_sources = Path(path), token_sources
        #: u32 [n, 5]: dataset, document, first token, end token, BERT tokens.
        self.chunks = map_dataset(self.path, "chunks")

    @classmethod
    def open(cls, project_dir: Path | str, name: str = "train", own: bool = False) -> ChunkDatabase:
        """The merged database `name` that a project uses.

        Args:
            project_dir: The project.
            name: Which database.
            own: The project's own, even if another was put in its place.

        Raises:
            ProjectError: it was not built yet; names the command.
            CorruptFileError: it is damaged.
        """
        config = ProjectConfig.load(project_dir)
        paths = ProjectPaths(project_dir) if own else config.database_paths(project_dir)
        if not own:
            config = ProjectConfig.load(paths.root)
        path = paths.merged_db(name)
        require_stage(paths, path, "build_db")
        if get_rank() == 0:  # one rank reads it through
            verify(path, f"Run build_db --project-dir {paths.root} again")
        return cls(path, open_token_files(config, paths))

    def __len__(self) -> int:
        return len(self.chunks)

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.token_sources)

    def documents(self, ids: np.ndarray) -> np.ndarray:
        """Dataset and document of each chunk, u32 [..., 2]; ids must be valid."""
        return self.chunks[ids, :2]

    def continuation(self, ids: np.ndarray) -> np.ndarray:
        """The next chunk of the same document, i64 [...]; NO_NEIGHBOR where there is none."""
        ids = np.asarray(ids, np.int64)
        exists = (ids >= 0) & (ids + 1 < len(self))
        here = self.documents(np.where(exists, ids, 0))
        following = self.documents(np.where(exists, ids + 1, 0))
        return np.where(exists & (here == following).all(-1), ids + 1, NO_NEIGHBOR)

    def retrieved_ids(self, ids: np.ndarray, num_retrieved_chunks: int) -> np.ndarray:
        """Each neighbor and its continuations, i64 [..., num_retrieved_chunks]."""
        columns = [np.asarray(ids, np.int64)]
        while len(columns) < num_retrieved_chunks:
            columns.append(self.continuation(columns[-1]))
        return np.stack(columns, axis=-1)

    def padded_tokens(
        self, ids: np.ndarray, chunk_length: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of chunks, padded to M.

        Args:
            ids: Chunk ids of any shape; NO_NEIGHBOR gives padding only.
            chunk_length: M.
            pad_id: Fills what a chunk lacks.

        Returns:
            Tokens i64 [..., M] and mask bool [..., M], True where padded.
        """
        shape, ids = np.shape(ids), np.asarray(ids, np.int64).ravel()
        dataset, document, start, end, _ = self.chunks[np.maximum(ids, 0)].T.astype(np.int64)
        lengths = np.where(ids >= 0, end - start, 0)
        mask = np.arange(chunk_length) >= lengths[:, None]
        tokens = np.empty(mask.shape, np.int64)
        for index, source in enumerate(self.token_sources):
            mine = slice(None) if len(self.token_sources) == 1 else np.flatnonzero(dataset == index)
            first = source.starts[document[mine]] + start[mine]
            tokens[mine] = _windows(source.tokens, first, chunk_length)
        tokens[mask] = pad_id
        return tokens.reshape(*shape, chunk_length), mask.reshape(*shape, chunk_length)

    def retrieved_tokens(
        self, ids: np.ndarray, num_retrieved_chunks: int, chunk_length: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Neighbors with their continuations.

        Args:
            ids: Neighbor ids of any shape.
            num_retrieved_chunks: Chunks per neighbor, itself included.
            chunk_length: M.
            pad_id: Fills short and missing chunks (upstream: end of document).

        Returns:
            Tokens i64 [..., R] and mask bool [..., R], True where padded or missing;
            R = num_retrieved_chunks · M.
        """
        retrieved = self.retrieved_ids(ids, num_retrieved_chunks)
        tokens, mask = self.padded_tokens(retrieved, chunk_length, pad_id)
        shape = (*np.shape(ids), num_retrieved_chunks * chunk_length)
        return tokens.reshape(shape), mask.reshape(shape)

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Tokens of each chunk, without padding.

        Raises:
            ProjectError: an id is not in the database.
        """
        rows = np.asarray(ids, np.int64).ravel()
        outside = rows[(rows < 0) | (rows >= len(self))]
        if len(outside):
            raise ProjectError(self.path, f"has no chunk {outside[0]}", f"It has {len(self)}")
        found = []
        for dataset, document, start, end, _ in self.chunks[rows].tolist():
            source = self.token_sources[dataset]
            offset = int(source.starts[document])
            found.append(source.tokens[offset + start : offset + end])
        return found

    def texts(self, ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[str]:
        """Text of each chunk."""
        return tokenizer.detokenize_batch([chunk.tolist() for chunk in self.tokens(ids)])


def _windows(tokens: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
    """[n, length]: the tokens from each of `first` on; anything beyond the last token."""
    count = len(tokens) - length + 1
    if len(first) and count > first.max():
        # Whole rows are copied, not tokens one by one.
        return as_strided(tokens, (count, length), tokens.strides * 2, writeable=False)[first]
    return tokens[np.minimum(first[:, None] + np.arange(length), len(tokens) - 1)]
