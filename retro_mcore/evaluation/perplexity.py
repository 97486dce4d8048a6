"""Perplexity as Megatron validates: over the samples' loss mask.

With real, shuffled, random and no neighbors, on the same samples, so that the differences are
retrieval's: real against none says what retrieval brings, real against shuffled and random that it
is the neighbors' content that brings it. `bits_per_byte` holds the paper's protocol.
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
    """The part of a measurement that one corpus of the blend makes up."""

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
        num_tokens: Tokens that count in the loss.
        num_samples: Samples they come from.
        seconds: Wall time.
        corpora: The same for each corpus, by its prefix; empty where there is only one.
        num_documents: Documents that the samples are cut from; None where that is not known.
        num_distinct_tokens: Of num_tokens, those that are not repetitions: a split of fewer
            tokens than its samples hold is read more than once.
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

    @property
    def repeats(self) -> float:
        """How often a token is read, on average."""
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
    """Perplexity of the first `num_samples` samples, divided over data parallel ranks.

    Args:
        model: This rank's stage, on its device; see `load_model_from_checkpoint`.
        dataset: The split's samples.
        split: Its name.
        neighbors: What each chunk is given: its own neighbors, those of a chunk of another
            sample (by a permutation of all the split's chunks that `seed` fixes), random chunks
            of the database, or nothing.
        num_samples: Samples to evaluate.
        micro_batch_size: Samples per forward pass.
        num_workers: Processes that read ahead.
        seed: Seed of permutation and draws.
        corpora: Prefixes of the blend's corpora, to tell them apart.
        vocab_size: The tokenizer's, over which the losses are; None: every row of the model's.
        distinct: The text that the samples are made of, for the result.
    """
    started = time.perf_counter()
    dataset = with_neighbors(dataset, neighbors, seed)
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
    batches: Iterable[RetroBatch] = track(
        read_batches(numbered, sampler, num_workers, device),
        f"{split}, {neighbors} neighbors",
        total=len(sampler),
        hidden=get_rank() != 0,
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


def _corpus_loss(sums: np.ndarray) -> CorpusLoss:
    """The result of sums [2, samples]: losses and tokens."""
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
