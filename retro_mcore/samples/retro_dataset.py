"""Samples with the tokens retrieved for their chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from retro_mcore.chunking import chunks_per_sample
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.distributed import on_first_rank, raise_together
from retro_mcore.errors import ConfigurationError, CorruptFileError
from retro_mcore.project.config import SPLITS, ProjectConfig, ProjectSettings, Split
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.samples.chunk_neighbors import ChunkNeighbors
from retro_mcore.samples.neighbor_check import check_neighbor_settings
from retro_mcore.samples.neighbor_noise import NeighborNoise
from retro_mcore.samples.project_samples import (
    GPTSamples,
    build_all_gpt_samples,
    numbers_in_database,
)
from retro_mcore.samples.sample_neighbors import SampleNeighbors, open_neighbor_tables
from retro_mcore.samples.separation import Separation


@dataclass
class RetroDataset(Dataset):
    """A split's samples, each with the tokens retrieved for its chunks. Memory-mapped, picklable.

    Attributes:
        samples: The split's GPT samples.
        neighbors: Saved neighbors of the samples' chunks.
        database: The retrieval database.
        num_neighbors: K, at most the number saved.
        num_retrieved_chunks: Chunks per neighbor: the neighbor itself and those after it.
        chunk_length: M.
        eod: Id used as padding for short and missing chunks (which are masked).
        noise: Random changes to the neighbors, for training.
        numbers: Number of each of the samples' datasets in the database; None: the same.

    Raises:
        ConfigurationError: more neighbors are requested than were saved.
        CorruptFileError: neighbors of some samples are missing.
    """

    samples: GPTSamples
    neighbors: SampleNeighbors
    database: ChunkDatabase
    num_neighbors: int
    num_retrieved_chunks: int
    chunk_length: int
    eod: int
    noise: NeighborNoise | None = None
    numbers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for field, value in (
            ("num_neighbors", self.num_neighbors),
            ("num_retrieved_chunks", self.num_retrieved_chunks),
        ):
            if value < 1:
                raise ConfigurationError(field, str(value), "Give at least 1")
        if self.num_neighbors > self.neighbors.num_saved:
            raise ConfigurationError(
                "num_neighbors",
                f"{self.num_neighbors}, but {self.neighbors.num_saved} were saved",
                "Ask for fewer, or run query_neighbors with a larger --num-neighbors-save",
            )
        sequence_length = len(self.samples.tokens(0)) - 1
        self.chunks_per_sample = chunks_per_sample(sequence_length, self.chunk_length)
        needed = len(self.samples) * self.chunks_per_sample
        if len(self.neighbors) != needed:
            raise CorruptFileError(
                self.neighbors.directories[0],
                f"holds neighbors of {len(self.neighbors)} chunks, the samples have {needed}",
                "Run query_neighbors again",
            )

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, index: int) -> np.ndarray:
        """See `GPTSamples.tokens`."""
        return self.samples.tokens(index)

    def text_item(self, index: int) -> dict[str, np.ndarray]:
        """See `GPTSamples.text_item`."""
        return self.samples.text_item(index)

    def order_digest(self, count: int) -> str:
        """See `GPTSamples.order_digest`."""
        return self.samples.order_digest(count)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Read one sample.

        Returns:
            text: i64 [S+1].
            loss_mask: f32 [S], only in an aligned project: 0 for predictions from or of padding,
                and of the first token of a document.
            segments, position_ids, loss_mask: see `Separation.items`.
            neighbor_chunks: i64 [L, K, num_retrieved_chunks], NO_NEIGHBOR where there is none.
            neighbor_tokens: i64 [L, K, R].
            neighbor_mask: bool [L, K, R], True where padded or missing.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first = index * self.chunks_per_sample
        rows = self.neighbors.rows(first, first + self.chunks_per_sample)
        ids = np.asarray(rows[:, : self.num_neighbors], np.int64)
        text, dataset, documents = self.samples.read(index)
        if self.noise is not None:
            number = dataset if self.numbers is None else self.numbers[dataset]
            ids = self.noise.disturb_neighbors(index, ids, self.database, number, documents)
        chunks = self.database.retrieved_ids(ids, self.num_retrieved_chunks)
        tokens, mask = self.database.padded_tokens(chunks, self.chunk_length, self.eod)
        if self.noise is not None:
            tokens = self.noise.disturb_tokens(index, tokens, mask)
        shape = (*ids.shape, self.num_retrieved_chunks * self.chunk_length)
        return {
            "text": text,
            **self.samples.masks(text),
            "neighbor_chunks": chunks,
            "neighbor_tokens": tokens.reshape(shape),
            "neighbor_mask": mask.reshape(shape),
        }


def note_of_short_neighbors(samples: object, most: int = 256) -> str | None:
    """Sentence on the chunks of an aligned project that have too few neighbors; None if none has.

    In a packed project, query_neighbors counts them. All ranks must call this together.

    Args:
        samples: A split; only those with saved neighbors of chunks are looked at.
        most: Number of evenly spaced samples that are read at most.

    Raises:
        CorruptFileError: saved neighbors are damaged.
    """
    if not isinstance(samples, RetroDataset) or not isinstance(samples.neighbors, ChunkNeighbors):
        return None
    neighbors, num_neighbors = samples.neighbors, samples.num_neighbors
    found = on_first_rank(lambda: neighbors.count_short(num_neighbors, most))
    return str(found) if found.short else None


def note_of_mixed_chunks(samples: object, most: int = 256) -> str | None:
    """Sentence on chunks of several documents, whose neighbors nobody reads; None if there are
    none.

    All ranks must call this together.

    Args:
        samples: A split.
        most: Number of evenly spaced samples that are read at most.
    """
    if not isinstance(samples, RetroDataset) or samples.samples.separation is None:
        return None
    separation, length = samples.samples.separation, samples.chunk_length
    if not separation.reset_attention_mask or separation.chunk_length is not None:
        return None
    numbers = np.linspace(0, len(samples) - 1, min(most, len(samples)), dtype=np.int64)

    def share() -> float:
        texts = (samples.tokens(int(number))[:-1] for number in numbers)
        return float(np.mean([separation.mixed_chunks(text, length) for text in texts]))

    found = on_first_rank(share)
    if not found:
        return None
    return (
        f"{found:.1%} of the chunks (in {len(numbers)} samples) hold several documents: with "
        "--reset-attention-mask nobody reads their neighbors; an aligned project has no such chunks"
    )


def build_retro_datasets(
    project_dir: Path | str,
    num_neighbors: int = 2,
    num_retrieved_chunks: int = 2,
    train_noise: NeighborNoise | None = None,
    documents: Mapping[str, bool] | None = None,
) -> dict[Split, RetroDataset | None]:
    """Build the datasets of a project's splits; None for a split without samples.

    The neighbor directories are those named in config.json, so a moved project works. All ranks
    must call this.

    Args:
        project_dir: A project directory, after query_neighbors.
        num_neighbors: K.
        num_retrieved_chunks: Chunks per neighbor, including the neighbor itself.
        train_noise: Random changes to the neighbors, applied to training samples only.
        documents: How documents are kept apart, by the names of `Separation`; None: they are not.

    Raises:
        ProjectError: a stage has not run. Names the command.
        CorruptFileError: a file is damaged.
        ConfigurationError: more neighbors are asked for than were saved.
        ProjectError: neighbors were searched for other samples.
    """
    paths = ProjectPaths(project_dir)
    with raise_together():
        config = ProjectConfig.load(paths.root)
        check_neighbor_settings(paths, config, ProjectSettings.load(paths.root))
        database = ChunkDatabase.open(paths.root)
        tokenizer = load_project_tokenizer(config, paths)
        # Checked before the samples are built, which takes time. Their number is a setting, too.
        tables = open_neighbor_tables(paths, config, database)
        numbers = numbers_in_database(paths, config, config.database_paths(paths.root))
    all_samples = build_all_gpt_samples(config, paths, tokenizer)
    datasets: dict[Split, RetroDataset | None] = dict.fromkeys(SPLITS)
    with raise_together():
        for split in SPLITS:
            samples = all_samples[split]
            if samples is None:
                continue
            if documents is not None and any(documents.values()):
                length = None if samples.padding is None else samples.padding.chunk_length
                separation = Separation(tokenizer.eod, length, **documents)
                samples = replace(samples, separation=separation)
            datasets[split] = RetroDataset(
                samples,
                tables.of_split(split, samples),
                database,
                num_neighbors=num_neighbors,
                num_retrieved_chunks=num_retrieved_chunks,
                chunk_length=config.retro_gpt_chunk_length,
                eod=tokenizer.eod,
                noise=train_noise if split == "train" and train_noise else None,
                numbers=numbers,
            )
    return datasets
