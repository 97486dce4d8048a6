"""Perplexity with real neighbors, with another chunk's neighbors, and without retrieval.

All three see the same samples, so that their differences are retrieval's: real against none says
what retrieval brings, real against shuffled that it is the neighbors' content that brings it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from tqdm import tqdm

from retro_mcore.distributed import get_rank
from retro_mcore.errors import ConfigurationError, TokenizerError
from retro_mcore.project.config import ProjectConfig
from retro_mcore.training.batch import RetroBatch
from retro_mcore.training.data import (
    MicroBatchSampler,
    NumberedSamples,
    read_batches,
    tokenizer_fingerprint,
)
from retro_mcore.training.loss import total_loss
from retro_mcore.training.provider import ModelArguments

if TYPE_CHECKING:
    from retro_mcore.data.neighbors import SavedNeighbors
    from retro_mcore.datasets.retro_dataset import RetroDataset

NeighborSource = Literal["real", "shuffled", "none"]


@dataclass(frozen=True)
class Perplexity:
    """A measurement.

    Attributes:
        split: "valid" or "test".
        neighbors: "real", "shuffled" or "none".
        loss: Mean over the loss mask, in nats per token.
        perplexity: exp(loss).
        num_tokens: Tokens that count in the loss.
        num_samples: Samples they come from.
        seconds: Wall time.
    """

    split: str
    neighbors: NeighborSource
    loss: float
    perplexity: float
    num_tokens: int
    num_samples: int
    seconds: float


def measure_perplexity(
    model: torch.nn.Module,
    dataset: RetroDataset,
    split: str,
    neighbors: NeighborSource,
    *,
    num_samples: int,
    micro_batch_size: int,
    num_workers: int = 0,
    seed: int = 1234,
) -> Perplexity:
    """Perplexity of the first `num_samples` samples, divided over data parallel ranks.

    Args:
        model: On its device; see `load_model_from_checkpoint`.
        dataset: The split's samples.
        split: Its name.
        neighbors: What each chunk is given: its own neighbors, those of a chunk of another
            sample (by a permutation of all the split's chunks that `seed` fixes), or nothing.
        num_samples: Samples to evaluate.
        micro_batch_size: Samples per forward pass.
        num_workers: Processes that read ahead.
        seed: Of the permutation.
    """
    started = time.perf_counter()
    if neighbors == "shuffled":
        dataset = with_shuffled_neighbors(dataset, seed)
    sampler = MicroBatchSampler(
        0,
        num_samples,
        micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        keep_rest=True,
    )
    numbered = NumberedSamples(dataset, retrieval=neighbors != "none")
    device = next(model.parameters()).device
    batches: Iterable[RetroBatch] = tqdm(
        read_batches(numbered, sampler, num_workers, device),
        desc=f"{split}, {neighbors} neighbors",
        total=len(sampler),
        disable=get_rank() != 0,
    )
    loss_sum, num_tokens = total_loss([model], batches)
    loss = loss_sum / num_tokens
    return Perplexity(
        split=split,
        neighbors=neighbors,
        loss=loss,
        perplexity=math.exp(loss),
        num_tokens=num_tokens,
        num_samples=num_samples,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class ShuffledNeighbors:
    """A split's saved neighbors, each chunk with those of another.

    Attributes:
        neighbors: The saved neighbors.
        donors: int64 [N*L]: the row that each row is answered with.
    """

    neighbors: SavedNeighbors
    donors: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.donors)

    @property
    def num_saved(self) -> int:
        """Neighbors per chunk."""
        return self.neighbors.num_saved

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Neighbors i64 [stop - start, num_saved] of the chunks' donors."""
        return np.concatenate(
            [self.neighbors.rows(row, row + 1) for row in self.donors[start:stop]]
        )


def with_shuffled_neighbors(dataset: RetroDataset, seed: int) -> RetroDataset:
    """The same samples, each chunk with the neighbors of a chunk of another sample.

    Raises:
        ConfigurationError: there is only one sample.
    """
    donors = shuffled_rows(len(dataset), dataset.chunks_per_sample, seed)
    shuffled: Any = ShuffledNeighbors(dataset.neighbors, donors)
    return replace(dataset, neighbors=shuffled)


def shuffled_rows(num_samples: int, chunks_per_sample: int, seed: int) -> NDArray[np.int64]:
    """A permutation of all chunks that gives none a chunk of its own sample.

    Args:
        num_samples: N, at least 2.
        chunks_per_sample: L.
        seed: Fixes the permutation.

    Returns:
        int64 [N*L]: for each chunk (row = sample * L + chunk), the row of its donor.

    Raises:
        ConfigurationError: there is only one sample.
    """
    if num_samples < 2:
        raise ConfigurationError(
            "--retro-eval-neighbors",
            f"shuffled, with {num_samples} sample to evaluate",
            "Evaluate at least 2 samples, or leave shuffled out",
        )
    generator = np.random.default_rng(seed)
    donors = generator.permutation(num_samples * chunks_per_sample)
    samples = np.arange(len(donors)) // chunks_per_sample
    for row in np.flatnonzero(donors // chunks_per_sample == samples):
        own = samples[row]
        if donors[row] // chunks_per_sample != own:  # mended by an earlier exchange
            continue
        # Exchanged with one of these, neither of the two has a donor in its own sample.
        others = np.flatnonzero((samples != own) & (donors // chunks_per_sample != own))
        other = generator.choice(others)
        donors[row], donors[other] = donors[other], donors[row]
    return donors


def check_tokenizer(arguments: ModelArguments, project: ProjectConfig, project_dir: str) -> None:
    """Refuse a model that was trained with another tokenizer than the project's.

    Raises:
        TokenizerError: naming both.
    """
    theirs = tokenizer_fingerprint(project, project_dir)
    if arguments.tokenizer_fingerprint != theirs:
        raise TokenizerError(
            f"tokenizer of {project_dir}",
            f"{project.retro_gpt_tokenizer_type} with fingerprint {theirs[:12]}, but the "
            f"checkpoint was trained with {arguments.tokenizer_type} (vocabulary "
            f"{arguments.vocab_size}, fingerprint {arguments.tokenizer_fingerprint[:12]})",
            "Evaluate on the project that the model was trained on, or on one with its tokenizer",
        )


def check_shape(arguments: ModelArguments, project: ProjectConfig, project_dir: str) -> None:
    """Refuse a project whose samples the model cannot read.

    Raises:
        ConfigurationError: the chunk length differs, or samples are longer than its positions.
    """
    if project.retro_gpt_chunk_length != arguments.retro_chunk_length:
        raise ConfigurationError(
            "retro_gpt_chunk_length",
            f"{project.retro_gpt_chunk_length} in {project_dir}, but the checkpoint was trained "
            f"with {arguments.retro_chunk_length}",
            "Evaluate on a project with the model's chunk length",
        )
    longer = project.retro_gpt_seq_length > arguments.seq_length
    if longer and arguments.position_embedding_type == "learned_absolute":
        raise ConfigurationError(
            "retro_gpt_seq_length",
            f"{project.retro_gpt_seq_length} in {project_dir}, but the checkpoint has "
            f"{arguments.seq_length} positions",
            "Evaluate on a project with shorter samples",
        )
