"""The samples that a model trains on, for whose chunks neighbors are searched.

They are Megatron's GPT samples, built by megatron-core's own classes with the class name and
attributes of the retired Retro. So their order, their content and the hash in the names of the
neighbor directories are unchanged.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.data.tokens.splits import document_ranges, parse_split
from retro_mcore.data.tokens.token_file import bin_path, idx_path, open_token_files
from retro_mcore.distributed import initialize, on_first_rank, raise_together
from retro_mcore.errors import ConfigurationError, CorruptFileError
from retro_mcore.project.config import SPLITS, ProjectConfig, ProjectSettings, Split
from retro_mcore.project.markers import checksum, digest_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.space import show_bytes
from retro_mcore.retrieval.query_chunks import QuerySamples
from retro_mcore.samples.index_cache import IndexCache
from retro_mcore.samples.padding import DocumentPadding
from retro_mcore.samples.separation import Separation

_LOG = logging.getLogger(__name__)


@dataclass
class GPTSamples:
    """The samples of one split. Picklable.

    Attributes:
        split: The split.
        blended: Megatron's blended dataset, which may hold a few more samples than are used.
        num_samples: Number of samples that are used.
        padding: Padding of the documents; None in a packed project, which has none.
        separation: How documents of a sample are kept apart; None: they are not.
    """

    split: Split
    blended: Any
    num_samples: int
    padding: DocumentPadding | None = None
    separation: Separation | None = None

    def __len__(self) -> int:
        return self.num_samples

    def read(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Read one sample.

        Returns:
            Tokens i64 [S+1] (the sample and the label of its last token), the number of its
            dataset, and the documents that it is made from, i64 [n].
        """
        sample = self.blended[index]
        return sample["text"], int(sample["dataset_id"]), sample["document_ids"]

    def tokens(self, index: int) -> np.ndarray:
        """Tokens i64 [S+1] of the sample, including the label of its last token."""
        return self.read(index)[0]

    def masks(self, text: np.ndarray) -> dict[str, np.ndarray]:
        """Parts of an item that follow from its tokens i64 [S+1]: `loss_mask` f32 [S] if padded,
        and what `Separation.items` returns."""
        masks = {} if self.padding is None else {"loss_mask": self.padding.loss_mask(text)}
        return masks if self.separation is None else {**masks, **self.separation.items(text)}

    def text_item(self, index: int) -> dict[str, np.ndarray]:
        """Read one sample without neighbors: `text`, i64 [S+1], and what `masks` returns."""
        text = self.tokens(index)
        return {"text": text, **self.masks(text)}

    def without_padding(self, chunk: np.ndarray) -> np.ndarray:
        """Tokens of one chunk i64 [M], without its padding."""
        return chunk if self.padding is None else self.padding.drop(chunk)

    @property
    def sample_length(self) -> int:
        """S."""
        return int(self.blended.config.sequence_length)

    def chunk_places(self, index: int, chunk_length: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Where the chunks of a sample lie, if every document is padded to whole chunks.

        Returns:
            Number of the sample's dataset, document of each chunk i64 [L], and where the chunk
            begins in it i64 [L].
        """
        number = int(self.blended.dataset_index[index])
        dataset = self.blended.datasets[number]
        place = dataset.shuffle_index[self.blended.dataset_sample_index[index]]
        (first, start), (last, stop) = np.asarray(dataset.sample_index[place : place + 2], np.int64)
        documents = np.asarray(dataset.document_index[first : last + 1], np.int64)
        ends = np.asarray(dataset.dataset.sequence_lengths[documents], np.int64)
        begins = np.zeros_like(ends)
        begins[0], ends[-1] = start, stop
        counts = (ends - begins) // chunk_length
        before = np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + (np.arange(counts.sum()) - before) * chunk_length
        return number, np.repeat(documents, counts), starts

    def num_containing(self, documents: Mapping[int, np.ndarray]) -> int:
        """Number of samples whose S input tokens include any of some documents' tokens.

        Args:
            documents: Documents by number of the dataset.
        """
        count = 0
        of_dataset = np.asarray(self.blended.dataset_index)[: len(self)]
        in_dataset = np.asarray(self.blended.dataset_sample_index)[: len(self)]
        for number, chosen in documents.items():
            dataset = self.blended.datasets[number]
            places = dataset.shuffle_index[in_dataset[of_dataset == number]]
            before = np.cumsum(np.isin(dataset.document_index, chosen))
            before = np.concatenate([[0], before])
            index = np.asarray(dataset.sample_index, np.int64)
            (first, start), (last, stop) = index[places].T, index[places + 1].T
            # A sample may begin after a document's last token, and end before its first one.
            lengths = dataset.dataset.sequence_lengths[dataset.document_index[first]]
            first, last = first + (start >= lengths), last - (stop == 0)
            count += int((before[last + 1] > before[first]).sum())
        return count

    def document_ids(self, index: int) -> np.ndarray:
        """Documents that the sample is made from, i64 [n]."""
        return self.read(index)[2]

    @property
    def description_hash(self) -> str:
        """The md5 in the name of the neighbor directory."""
        return str(self.blended.unique_description_hash)

    @property
    def description(self) -> str:
        """Megatron's description of the blend as JSON, the input of the hash."""
        return str(self.blended.unique_description)

    def order_digest(self, count: int) -> str:
        """Digest of the identity and order of the first `count` samples.

        Computed from the token positions of at most 65,536 samples, since any reordering moves
        nearly all samples.
        """
        rows = np.unique(np.linspace(0, max(count - 1, 0), 65_536).astype(np.int64))[:count]
        of_dataset = np.asarray(self.blended.dataset_index)[rows]
        in_dataset = np.asarray(self.blended.dataset_sample_index)[rows]
        places = np.zeros((len(rows), 3), np.int64)
        for number, dataset in enumerate(self.blended.datasets):
            mine = of_dataset == number
            starts = dataset.sample_index[dataset.shuffle_index[in_dataset[mine]]]
            documents = dataset.document_index[starts[:, 0]]
            places[mine] = np.stack([np.full(len(starts), number), documents, starts[:, 1]], axis=1)
        return hashlib.sha256(places.tobytes()).hexdigest()[:32]


@dataclass
class RenumberedSamples:
    """Samples whose datasets have other numbers in the searched database.

    Attributes:
        samples: The split's samples.
        numbers: Number of each dataset in the database; an unused number if it is not there.
    """

    samples: QuerySamples
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """See `GPTSamples.read`."""
        tokens, dataset, documents = self.samples.read(index)
        return tokens, self.numbers[dataset], documents


def numbers_in_database(
    paths: ProjectPaths, config: ProjectConfig, source: ProjectPaths
) -> list[int]:
    """Number in a database of each of a project's datasets, identified by their tokens.

    A dataset that is not in the database gets an unused number.

    Args:
        paths: The project.
        config: Its configuration.
        source: The project that owns the database.
    """
    prefixes = config.blend[1]
    if source.root == paths.root:
        return list(range(len(prefixes)))
    held = ProjectConfig.load(source.root).blend[1]
    digests = [digest_of(bin_path(source.data / prefix)) for prefix in held]
    wanted = [digest_of(bin_path(paths.data / prefix)) for prefix in prefixes]
    numbers: list[int] = []
    for i, digest in enumerate(wanted):
        same = [number for number, each in enumerate(digests) if each == digest]
        # Of datasets with the same tokens, each has its own, so that no document finds itself.
        own = [number for number in same if number not in numbers]
        numbers.append((own or same or [len(held) + i])[0])
    return numbers


def build_gpt_samples(
    config: ProjectConfig,
    paths: ProjectPaths,
    split: Split,
    tokenizer: Tokenizer | None = None,
) -> GPTSamples | None:
    """Build the samples of one split; None if the split has no documents or no samples.

    All ranks must call this. Rank 0 writes the sample indexes to data/cache if possible.

    Args:
        config: The project's configuration.
        paths: The project.
        split: The split.
        tokenizer: The project's tokenizer, if already loaded.
    """
    return build_all_gpt_samples(config, paths, tokenizer)[split]


def build_all_gpt_samples(
    config: ProjectConfig, paths: ProjectPaths, tokenizer: Tokenizer | None = None
) -> dict[Split, GPTSamples | None]:
    """Build the samples of every split; see `build_gpt_samples`.

    Raises:
        ConfigurationError: a split of more than 0 percent has no documents.
        ConfigurationError: the sample indexes do not fit in this machine's memory.
        TokenizerError: the tokenizer is not the project's.
    """
    initialize()
    with raise_together():
        tokenizer = tokenizer or load_project_tokenizer(config, paths)
        _check_splits(config, paths)
        _check_memory(config)
        padding = document_padding(config, paths, tokenizer)
    digests = on_first_rank(lambda: _index_digests(config, paths))
    cache = IndexCache(paths.data_cache, digests)
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from retro_mcore.samples.multi_split import MultiSplitGPTDataset, MultiSplitGPTDatasetConfig

    weights, prefixes = config.blend
    data_config = MultiSplitGPTDatasetConfig(
        random_seed=config.retro_gpt_seed,
        sequence_length=config.retro_gpt_seq_length,
        blend=([str(paths.data / prefix) for prefix in prefixes], weights),
        split=config.retro_gpt_split,
        split_preprocessing=config.retro_gpt_split,
        index_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [config.num_samples(split) for split in SPLITS]
    builder = BlendedMegatronDatasetBuilder(MultiSplitGPTDataset, sizes, lambda: True, data_config)
    with _without_advice():
        datasets = builder.build()
    for note in cache.notes:
        _LOG.warning("note: %s", note)
    return {
        split: GPTSamples(split, dataset, size, padding) if dataset is not None and size else None
        for split, dataset, size in zip(SPLITS, datasets, sizes, strict=True)
    }


def document_padding(
    config: ProjectConfig, paths: ProjectPaths, tokenizer: Tokenizer
) -> DocumentPadding | None:
    """Padding of a project's documents; None if it is packed.

    Raises:
        CorruptFileError: documents of an aligned project do not fill whole chunks.
    """
    if ProjectSettings.load(paths.root).samples != "aligned":
        return None
    length = config.retro_gpt_chunk_length
    for file in open_token_files(config, paths):
        if (file.lengths % length).any():
            raise CorruptFileError(
                idx_path(file.prefix),
                f"holds documents that do not fill whole chunks of {length} tokens, and the "
                "project is aligned",
                "Restore the file",
            )
    return DocumentPadding(length, tokenizer.eod)


def _index_digests(config: ProjectConfig, paths: ProjectPaths) -> dict[str, str]:
    prefixes = [paths.data / prefix for prefix in config.blend[1]]
    # Checksum of the bytes, since files with the same number of documents have the same size.
    return {str(prefix): checksum(idx_path(prefix)) for prefix in prefixes}


@contextmanager
def _without_advice() -> Iterator[None]:
    """Suppress megatron warnings about intended behavior.

    A blend may have a single dataset, because the neighbor directories' hashes always describe a
    blended dataset. And `IndexCache` caches the indexes, not megatron.
    """
    unwanted = ("Building a BlendedDataset", "Cannot save the", "Unable to save")

    def is_wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(unwanted)

    names = ("blended_dataset", "gpt_dataset")
    loggers = [logging.getLogger(f"megatron.core.datasets.{name}") for name in names]
    for logger in loggers:
        logger.addFilter(is_wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_wanted)


def remove_truncated_cache(paths: ProjectPaths) -> list[Path]:
    """Remove partly written sample indexes of a killed run and return their paths.

    Megatron writes them in place and reuses whatever exists. The stage that writes them calls this
    first, on rank 0, while no other run uses the project.
    """
    truncated = [path for path in sorted(paths.data_cache.glob("*.npy")) if not _is_whole(path)]
    for path in truncated:
        path.unlink()
    return truncated


def _is_whole(path: Path) -> bool:
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError):
        return False
    # A sparse file of zeros would pass, but megatron writes from front to back.
    return path.stat().st_size == array.offset + array.nbytes


#: Bytes of all indexes per sample: start (8), position in the order (8), dataset (2) and number in
#: the dataset (8).
_BYTES_PER_SAMPLE = 26


def _check_memory(config: ProjectConfig) -> None:
    # Megatron builds the indexes in memory, which a mistyped number of samples would exhaust.
    sizes = {split: config.num_samples(split) for split in SPLITS}
    needed = _BYTES_PER_SAMPLE * sum(sizes.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        told = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
        raise ConfigurationError(
            "retro_gpt_train_samples",
            f"{config.retro_gpt_train_samples:,}, that is {told} samples, whose indexes alone take "
            f"{show_bytes(needed)}; this machine has {show_bytes(memory)} of memory",
            "Give fewer samples (the validation samples follow from retro_gpt_eval_interval and "
            "retro_gpt_eval_iters)",
        )


def _check_splits(config: ProjectConfig, paths: ProjectPaths) -> None:
    # Megatron would count empty epochs forever.
    parts = parse_split(config.retro_gpt_split)
    for dataset, prefix in zip(open_token_files(config, paths), config.blend[1], strict=True):
        ranges = document_ranges(config.retro_gpt_split, len(dataset))
        for name, part in zip(SPLITS, parts, strict=True):
            if part and ranges[name][0] == ranges[name][1]:
                raise ConfigurationError(
                    f"retro_gpt_split {config.retro_gpt_split!r}",
                    f"leaves no {name} documents of the {len(dataset)} in {prefix}",
                    "Give more documents, or another --split",
                )
