"""Perplexity as in Megatron's validation: over the samples' loss mask.

It is measured with real, shuffled, random and no neighbors on the same samples, so all differences
come from retrieval. Real against none shows the gain from retrieval. Real against shuffled and
random shows that the gain comes from the neighbors' content. See `bits_per_byte` for the paper's
protocol.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import parallel_state

from retro_mcore.distributed import get_rank
from retro_mcore.evaluation.neighbor_sources import NeighborKind, with_neighbors
from retro_mcore.evaluation.repeats import DistinctText
from retro_mcore.evaluation.results import perplexity_of
from retro_mcore.evaluation.scoring import sum_over_model_ranks
from retro_mcore.progress import track
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.training.loop.sample_reader import (
    MicroBatchSampler,
    NumberedSamples,
    read_batches,
)
from retro_mcore.training.loop.scoring import token_losses

if TYPE_CHECKING:
    from retro_mcore.samples.retro_dataset import RetroDataset


@dataclass(frozen=True)
class CorpusLoss:
    """The part of a measurement for one corpus of the blend."""

    loss: float
    perplexity: float
    num_tokens: int
    num_samples: int


@dataclass(frozen=True)
class Perplexity:
    """A measurement.

    Attributes:
        split: "valid" or "test".
        neighbors: "real", "shuffled", "random" or "none".
        loss: Mean over the loss mask, in nats per token.
        perplexity: exp(loss).
        num_tokens: Number of tokens in the loss mask.
        num_samples: Number of samples.
        seconds: Wall time.
        corpora: The same for each corpus, by prefix; empty if there is only one.
        num_documents: Number of documents in the samples; None if unknown.
        num_distinct_tokens: `num_tokens` without repetitions. A split with fewer tokens than its
            samples hold is read more than once.
        database_fraction: Share of the database's documents that neighbors were taken from.
    """

    split: str
    neighbors: NeighborKind
    loss: float
    perplexity: float
    num_tokens: int
    num_samples: int
    seconds: float
    corpora: dict[str, CorpusLoss] = field(default_factory=dict)
    num_documents: int | None = None
    num_distinct_tokens: int | None = None
    database_fraction: float = 1.0

    @property
    def repeats(self) -> float:
        """Average number of times that a token is read."""
        return self.num_tokens / self.num_distinct_tokens if self.num_distinct_tokens else 1.0


def measure_perplexity(
    model: torch.nn.Module,
    dataset: RetroDataset,
    split: str,
    neighbors: NeighborKind,
    *,
    num_samples: int,
    micro_batch_size: int,
    num_workers: int = 0,
    seed: int = 1234,
    corpora: Sequence[str] = (),
    vocab_size: int | None = None,
    distinct: DistinctText | None = None,
) -> Perplexity:
    """Measure perplexity on the first `num_samples` samples, divided among data parallel ranks.

    Args:
        model: This rank's stage, on its device; see `load_model_from_checkpoint`.
        dataset: The split's samples.
        split: Its name.
        neighbors: Neighbors of each chunk: its own, those of a chunk of another sample (a seeded
            permutation of all the split's chunks), random chunks of the database, or none.
        num_samples: Number of samples to evaluate.
        micro_batch_size: Samples per forward pass.
        num_workers: Number of processes that prefetch samples.
        seed: Seed of the permutation and random draws.
        corpora: Prefixes of the blend's corpora, for results per corpus.
        vocab_size: The tokenizer's vocabulary size, over which losses are normalized; None: all
            rows of the model's embedding.
        distinct: Amount of distinct text in the samples, for the result.
    """
    started = time.perf_counter()
    dataset = with_neighbors(dataset, neighbors, seed)
    batches = read_samples(
        dataset,
        f"{split}, {neighbors} neighbors",
        num_samples=num_samples,
        micro_batch_size=micro_batch_size,
        num_workers=num_workers,
        device=next(model.parameters()).device,
        retrieval=neighbors != "none",
    )
    sums = np.zeros((2, num_samples))  # losses, tokens
    for batch, losses_BS in token_losses([model], batches, vocab_size):
        if losses_BS is not None:
            losses, mask = losses_BS.double().cpu().numpy(), batch.loss_mask.double().cpu().numpy()
            sums[:, batch.sample_ids] = (losses * mask).sum(1), mask.sum(1)
    sums = sum_over_model_ranks(sums)
    whole = _corpus_loss(sums)
    return Perplexity(
        split=split,
        neighbors=neighbors,
        loss=whole.loss,
        perplexity=whole.perplexity,
        num_tokens=whole.num_tokens,
        num_samples=num_samples,
        seconds=time.perf_counter() - started,
        corpora=_per_corpus(dataset, sums, corpora),
        num_documents=distinct.num_documents if distinct else None,
        num_distinct_tokens=distinct.num_tokens if distinct else None,
    )


def read_samples(
    dataset: RetroDataset,
    description: str,
    *,
    num_samples: int,
    micro_batch_size: int,
    num_workers: int,
    device: torch.device,
    retrieval: bool = True,
) -> Iterable[RetroBatch]:
    """Read this data parallel rank's batches of the first `num_samples` samples.

    Args:
        dataset: The samples.
        description: Label of the progress bar.
        num_samples: Number of samples, over all ranks.
        micro_batch_size: Samples per batch.
        num_workers: Number of processes that prefetch samples.
        device: Where the batches go.
        retrieval: Also read the neighbors.
    """
    sampler = MicroBatchSampler(
        0,
        num_samples,
        micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        keep_rest=True,
    )
    numbered = NumberedSamples(dataset, retrieval=retrieval)
    batches: Iterable[RetroBatch] = track(
        read_batches(numbered, sampler, num_workers, device),
        description,
        total=len(sampler),
        hidden=get_rank() != 0,
    )
    return batches


def _corpus_loss(sums: np.ndarray) -> CorpusLoss:
    """Compute the result from sums [2, samples]: losses and tokens."""
    loss_sum, num_tokens = sums.sum(1)
    loss = float(loss_sum / max(num_tokens, 1))
    return CorpusLoss(loss, perplexity_of(loss), int(num_tokens), sums.shape[1])


def _per_corpus(
    dataset: RetroDataset, sums: np.ndarray, corpora: Sequence[str]
) -> dict[str, CorpusLoss]:
    if len(corpora) < 2:
        return {}
    of_sample = np.array([dataset.samples.read(index)[1] for index in range(sums.shape[1])])
    return {
        prefix: _corpus_loss(sums[:, of_sample == number])
        for number, prefix in enumerate(corpora)
        if (of_sample == number).any()
    }
