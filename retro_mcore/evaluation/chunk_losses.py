"""The loss of each chunk of the documents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from retro_mcore.distributed import get_rank
from retro_mcore.evaluation.documents import HeldOutDocuments
from retro_mcore.evaluation.scoring import sum_over_model_ranks
from retro_mcore.evaluation.windows import Window, WindowReader, plan_batches
from retro_mcore.progress import track
from retro_mcore.training.loop.scoring import token_losses


@dataclass(frozen=True)
class ChunkLosses:
    """The losses of the chunks of a split's documents.

    Attributes:
        losses: f64 [chunks], sum over the chunk's tokens in nats.
        tokens: i64 [chunks], number of predicted tokens.
        bytes: i64 [chunks], bytes of the text of these tokens.
    """

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]

    def bits_per_byte(self, chosen: NDArray[np.bool_] | slice = slice(None)) -> float:
        """Bits per byte of the chosen chunks; NaN if they contain no bytes."""
        num_bytes = int(self.bytes[chosen].sum())
        return float(self.losses[chosen].sum() / math.log(2) / num_bytes) if num_bytes else math.nan


def measure_chunk_losses(
    model: torch.nn.Module,
    reader: WindowReader,
    windows: list[Window],
    num_bytes: NDArray[np.int64],
    batch_size: int,
    description: str,
    vocab_size: int | None = None,
) -> ChunkLosses:
    """Read the documents through their windows, divided among data parallel ranks.

    Args:
        model: This rank's stage, on its device.
        reader: The documents and their neighbors.
        windows: From `plan_windows`.
        num_bytes: i64 [chunks], from `chunk_bytes`.
        batch_size: Windows per forward pass.
        description: Label of the progress bar.
        vocab_size: The tokenizer's vocabulary size, over which losses are normalized; None: all
            rows of the model's embedding.
    """
    batches = plan_batches(windows, batch_size)
    mine = range(
        parallel_state.get_data_parallel_rank(),
        len(batches),
        parallel_state.get_data_parallel_world_size(),
    )
    progress = track(mine, description, hidden=get_rank() != 0)
    sums = np.zeros((2, reader.documents.num_chunks))
    device = next(model.parameters()).device
    results = token_losses([model], reader.read(batches, mine, device), vocab_size)
    for number, (batch, losses_BS) in zip(progress, results, strict=True):
        if losses_BS is not None:
            losses, mask = losses_BS.double().cpu().numpy(), batch.loss_mask.double().cpu().numpy()
            _add_to_chunks(sums, reader.documents, batches[number], losses * mask, mask)
    losses_C, tokens_C = sum_over_model_ranks(sums)
    return ChunkLosses(losses_C, tokens_C.round().astype(np.int64), num_bytes)


def _add_to_chunks(
    sums: np.ndarray,
    documents: HeldOutDocuments,
    windows: list[Window],
    losses_BS: np.ndarray,
    mask_BS: np.ndarray,
) -> None:
    first_rows, chunk_length = documents.first_rows, documents.chunk_length
    for window, losses_S, mask_S in zip(windows, losses_BS, mask_BS, strict=True):
        # Position p predicts the next token.
        predicted = window.start + 1 + np.arange(window.length)
        rows = first_rows[window.document] + predicted // chunk_length
        np.add.at(sums[0], rows, losses_S[: window.length])
        np.add.at(sums[1], rows, mask_S[: window.length])
