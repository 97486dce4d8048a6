"""Samples whose neighbors stand as text in the decoder's context, for benchmarks/memory_bakeoff.

After each chunk come its nearest neighbor and that neighbor's continuation:

    chunk 0, neighbor 0, chunk 1, neighbor 1, ...

Only the tokens of the chunks count in the loss, and all of them do that count without neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retro_mcore.samples.retro_dataset import RetroDataset


@dataclass(frozen=True)
class InContext:
    """Samples with neighbors in the text, for `collate`.

    Attributes:
        dataset: The samples and their neighbors.
        encoded: Also give the neighbors of each chunk to Retro's encoder. A model's chunk is then
            a chunk of text with the neighbor after it; see `chunk_length`.
    """

    dataset: RetroDataset
    encoded: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk with its neighbor."""
        return self.dataset.chunk_length * (1 + self.dataset.num_retrieved_chunks)

    @property
    def sample_length(self) -> int:
        """Tokens of a sample with its neighbors."""
        return self.dataset.chunks_per_sample * self.chunk_length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item = self.dataset[index]
        tokens_LKR, mask_LKR = item["neighbor_tokens"], item["neighbor_mask"]
        counted = item.get("loss_mask", np.ones(len(item["text"]) - 1, np.float32))
        text, loss_mask = interleave(item["text"], counted, tokens_LKR[:, 0])
        mixed = {"text": text, "loss_mask": loss_mask}
        if not self.encoded:
            return mixed
        missing = ((0, 0), (0, 0), (0, self.dataset.chunk_length))
        return {
            **mixed,
            "neighbor_tokens": np.pad(tokens_LKR, missing, constant_values=self.dataset.eod),
            "neighbor_mask": np.pad(mask_LKR, missing, constant_values=True),
        }


def interleave(
    text: np.ndarray, loss_mask: np.ndarray, neighbors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put a neighbor after each chunk.

    Args:
        text: i64 [L * M + 1].
        loss_mask: f32 [L * M], whether the next token counts.
        neighbors: i64 [L, R].

    Returns:
        Text i64 [L * (M + R) + 1] and loss mask f32 [L * (M + R)]. The first token of a chunk is
        predicted from the neighbor before it.
    """
    chunks_LM = text[:-1].reshape(len(neighbors), -1)
    mixed = np.concatenate([chunks_LM, neighbors], axis=1).reshape(-1)
    counted_LM = loss_mask.reshape(chunks_LM.shape)
    none_LR = np.zeros(neighbors.shape, loss_mask.dtype)
    # The last prediction of a chunk, the first token of the next one, moves behind the neighbor.
    moved = np.concatenate([counted_LM[:, :-1], none_LR, counted_LM[:, -1:]], axis=1)
    return np.append(mixed, text[-1]), moved.reshape(-1)
