"""Credit of neighbors by rank: how much each lowers the loss of the tokens that read it.

See `inference.credit`. With redundant neighbors each gets little credit, since the others still say
the same when it is left out. So all of them are left out together, too.

Shapes: B samples, S sequence, L chunks, K neighbors, R retrieved length, G groups of neighbors:
each of the K, then all together.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from retro_mcore.distributed import get_rank
from retro_mcore.evaluation.bits_per_byte import DocumentEvaluation
from retro_mcore.evaluation.perplexity import read_samples
from retro_mcore.evaluation.scoring import sum_over_model_ranks
from retro_mcore.evaluation.windows import plan_batches
from retro_mcore.inference.credit import neighbor_credit
from retro_mcore.model.chunks import join_attending, unread_neighbors
from retro_mcore.progress import track
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.samples.retro_dataset import RetroDataset
from retro_mcore.session import LoadedModel
from retro_mcore.training.loop.scoring import token_losses

#: Nats from which a neighbor counts as having helped or hurt.
CLEAR_GAIN = 0.1

Protocol = Literal["samples", "documents"]


@dataclass(frozen=True)
class NeighborGain:
    """Credit of the neighbors of one rank, or of all together.

    Attributes:
        split: "valid" or "test".
        protocol: "samples" or "documents".
        rank: Rank of the neighbors, from 1; None for all together, unless there is only one.
        gain: Mean over the tokens: loss without these neighbors minus loss with them, in nats.
        helped: Share of the tokens with a gain of more than `CLEAR_GAIN`.
        hurt: Share of the tokens with a gain of less than minus `CLEAR_GAIN`.
        num_tokens: Number of predicted tokens that read such a neighbor.
        seconds: Wall time of the whole measurement.
    """

    split: str
    protocol: Protocol
    rank: int | None
    gain: float
    helped: float
    hurt: float
    num_tokens: int
    seconds: float


def sample_gains(
    loaded: LoadedModel,
    dataset: RetroDataset,
    split: str,
    *,
    num_samples: int,
    micro_batch_size: int,
    num_workers: int = 0,
) -> list[NeighborGain]:
    """Measure the credit of the neighbors of the first samples; see `measure_perplexity`."""
    started = time.perf_counter()
    batches = read_samples(
        dataset,
        f"{split}, credit of neighbors",
        num_samples=num_samples,
        micro_batch_size=micro_batch_size,
        num_workers=num_workers,
        device=_device(loaded),
    )
    placed = ((batch, batch.sample_ids) for batch in batches)
    sums = _sum_gains(loaded, placed, num_samples)
    return _rows(sums, split, "samples", started)


def document_gains(
    loaded: LoadedModel, evaluation: DocumentEvaluation, batch_size: int
) -> list[NeighborGain]:
    """Measure the credit of the neighbors of a split's documents.

    Args:
        loaded: The model.
        evaluation: The documents, after `search_neighbors`.
        batch_size: Windows per forward pass.
    """
    started, split = time.perf_counter(), evaluation.documents.split
    batches = plan_batches(evaluation.windows, batch_size)
    mine = range(
        parallel_state.get_data_parallel_rank(),
        len(batches),
        parallel_state.get_data_parallel_world_size(),
    )
    numbers = track(mine, f"{split} documents, credit of neighbors", hidden=get_rank() != 0)
    read = evaluation.reader("real").read(batches, mine, _device(loaded))
    placed = (
        (batch, [number * batch_size + row for row in range(len(batches[number]))])
        for number, batch in zip(numbers, read, strict=True)
    )
    sums = _sum_gains(loaded, placed, len(batches) * batch_size)
    return _rows(sums, split, "documents", started)


def _device(loaded: LoadedModel) -> torch.device:
    return next(loaded.model.parameters()).device


def _sum_gains(
    loaded: LoadedModel, batches: Iterable[tuple[RetroBatch, Sequence[int]]], num_places: int
) -> np.ndarray:
    """f64 [4, G, places]: sums of gains, of tokens, and of those helped and hurt.

    Args:
        loaded: The model.
        batches: Each with the place (sample or window) of each of its rows.
        num_places: Number of places. Each has a sum of its own, so results do not depend on which
            rank reads it.
    """
    num_neighbors = loaded.arguments.retro_num_neighbors
    groups = [[rank] for rank in range(num_neighbors)]
    groups += [list(range(num_neighbors))] if num_neighbors > 1 else []
    sums = np.zeros((4, len(groups), num_places))
    for batch, places in batches:
        gains_BSG = batch_credit(loaded, batch, groups)
        if gains_BSG is None:
            continue
        gains = gains_BSG.double().cpu().numpy()
        counts = _counted(loaded, batch, groups).cpu().numpy()
        parts = (gains, 1.0, gains > CLEAR_GAIN, gains < -CLEAR_GAIN)
        for row, part in enumerate(parts):
            np.add.at(sums[row].T, np.asarray(places), (part * counts).sum(1))
    return sum_over_model_ranks(sums)


def batch_credit(
    loaded: LoadedModel, batch: RetroBatch, groups: Sequence[Sequence[int]] | None = None
) -> Tensor | None:
    """Credit of neighbors for the labels of a batch, f32 [B, S, K] or [B, S, groups].

    Args:
        loaded: The model.
        batch: A batch with neighbors.
        groups: See `neighbor_credit`.

    Returns:
        None except on the last pipeline stage.
    """

    def losses_with(tokens: Tensor, mask: Tensor) -> Tensor | None:
        changed = replace(
            batch, retrieved_tokens=tokens.flatten(0, -2), retrieved_mask=mask.flatten(0, -2)
        )
        ((_, losses),) = token_losses([loaded.model], [changed], loaded.tokenizer.vocab_size)
        return losses

    tokens, mask = _by_chunk(loaded, batch)
    return neighbor_credit(losses_with, tokens, mask, loaded.tokenizer.eod, groups)


def _by_chunk(loaded: LoadedModel, batch: RetroBatch) -> tuple[Tensor, Tensor]:
    """Retrieved tokens and mask [B, L, K, R]."""
    assert batch.retrieved_tokens is not None
    assert batch.retrieved_mask is not None
    length = batch.retrieved_tokens.shape[-1]
    shape = (len(batch.tokens), -1, loaded.arguments.retro_num_neighbors, length)
    return batch.retrieved_tokens.view(shape), batch.retrieved_mask.view(shape)


def _counted(loaded: LoadedModel, batch: RetroBatch, groups: Sequence[Sequence[int]]) -> Tensor:
    """f64 [B, S, G]: the loss mask at positions that read a neighbor of the group, else 0."""
    exists_BLK = ~_by_chunk(loaded, batch)[1].all(-1)
    exists_BLG = torch.stack([exists_BLK[..., list(ranks)].any(-1) for ranks in groups], dim=-1)
    grid = loaded.model.config.chunk_grid(batch.tokens.shape[1])
    position_S = torch.arange(grid.sequence_length, device=exists_BLG.device)
    chunk_S = (position_S - grid.first_attending).div(grid.chunk_length, rounding_mode="floor")
    read_BSG = exists_BLG[:, chunk_S.clamp(min=0)] & (chunk_S >= 0)[:, None]
    if batch.segments is not None:  # documents kept apart read the neighbors of their own chunks
        reads_MN = ~unread_neighbors(batch.segments, grid).t()
        reads_SB = join_attending(reads_MN.long(), grid, len(batch.tokens)).bool()
        read_BSG = read_BSG & reads_SB.t()[..., None]
    return batch.loss_mask.double()[..., None] * read_BSG


def _rows(sums: np.ndarray, split: str, protocol: Protocol, started: float) -> list[NeighborGain]:
    gain_G, tokens_G, helped_G, hurt_G = sums.sum(-1)
    counts_G, seconds = np.maximum(tokens_G, 1), time.perf_counter() - started
    ranks: list[int | None] = [1] if len(tokens_G) == 1 else [*range(1, len(tokens_G)), None]
    return [
        NeighborGain(
            split=split,
            protocol=protocol,
            rank=rank,
            gain=float(gain_G[row] / counts_G[row]),
            helped=float(helped_G[row] / counts_G[row]),
            hurt=float(hurt_G[row] / counts_G[row]),
            num_tokens=int(tokens_G[row]),
            seconds=seconds,
        )
        for row, rank in enumerate(ranks)
    ]
