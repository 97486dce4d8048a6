"""kNN-LM (Khandelwal et al. 2020) for benchmarks/memory_bakeoff.

The datastore holds the GPT's last hidden state at each position of the training documents, and the
token that follows. The nearest states of a position give a distribution of the next token, which is
mixed with the GPT's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.list_order import ListOrderSearch
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.training.loop.scoring import token_losses

#: Neighbors of a state, and states that the index is trained on.
NEIGHBORS, TRAINED_ON = 32, 40_000
#: Shares of the neighbors' distribution, and temperatures relative to the mean distance.
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
TEMPERATURES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


@dataclass(frozen=True)
class States:
    """Hidden states and what the model predicts from them.

    Attributes:
        keys: f32 [n, hidden].
        labels: i64 [n], the next tokens.
        losses: f64 [n], nats.
    """

    keys: np.ndarray
    labels: np.ndarray
    losses: np.ndarray


def read_states(model: Any, batches: Iterable[RetroBatch], vocab_size: int) -> Iterator[States]:
    """Run a GPT, and yield its states at the positions that count, batch by batch."""
    seen: list[torch.Tensor] = []

    def keep(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].detach().transpose(0, 1))

    hook = model.output_layer.register_forward_pre_hook(keep)
    try:
        for batch, losses_BS in token_losses([model], batches, vocab_size):
            assert losses_BS is not None
            counts, states_BSH = batch.loss_mask > 0, seen.pop()
            yield States(
                states_BSH[counts].float().numpy(),
                batch.labels[counts].numpy(),
                losses_BS[counts].double().numpy(),
            )
    finally:
        hook.remove()


def joined(parts: Iterable[States]) -> States:
    """The states of several batches as one."""
    columns = zip(*((part.keys, part.labels, part.losses) for part in parts), strict=True)
    return States(*(np.concatenate(column) for column in columns))


class Datastore:
    """States of the training documents in an index.

    Args:
        parts: The states. Those of the first batches train the index.
        lists: Inverted lists of the index.
        probes: Lists that a search visits.
    """

    def __init__(self, parts: Iterable[States], lists: int, probes: int) -> None:
        remaining, first, count = iter(parts), [], 0
        for part in remaining:
            first.append(part)
            count += len(part.keys)
            if count >= TRAINED_ON:
                break
        self._index = faiss_library().index_factory(first[0].keys.shape[1], f"IVF{lists},SQ8")
        self._index.train(joined(first).keys)
        self._index.nprobe = probes
        labels = []
        for part in itertools.chain(first, remaining):
            self._index.add(part.keys)
            labels.append(part.labels.astype(np.int32))
        self._labels = np.concatenate(labels)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def num_bytes(self) -> int:
        """Memory of codes, ids and labels."""
        return len(self) * (self._index.code_size + 8) + self._labels.nbytes

    def search(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances f32 and following tokens i32 [n, k] of the nearest states."""
        distances, ids = ListOrderSearch(self._index).search(keys, NEIGHBORS)
        return distances, np.where(ids < 0, -1, self._labels[ids])


@dataclass(frozen=True)
class Mixture:
    """How the neighbors' distribution is mixed with the model's.

    Attributes:
        share: Share of the neighbors' distribution.
        temperature: Squared distance at which a neighbor weighs 1/e.
    """

    share: float
    temperature: float

    def losses(self, states: States, distances: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Loss of each label in nats, f64 [n]."""
        own = np.exp(-states.losses)
        found = probability(states.labels, distances, tokens, self.temperature)
        return -np.log((1 - self.share) * own + self.share * found)


def probability(
    labels: np.ndarray, distances: np.ndarray, tokens: np.ndarray, temperature: float
) -> np.ndarray:
    """Probability f64 [n] that the neighbors give to each label.

    Args:
        labels: i64 [n].
        distances: f32 [n, k].
        tokens: i32 [n, k], tokens that follow the neighbors; -1 where one is missing.
        temperature: Squared distance at which a neighbor weighs 1/e.
    """
    nearer = distances.astype(np.float64) - distances[:, :1]
    weights = np.where(tokens < 0, 0, np.exp(-nearer / temperature))
    return (weights * (tokens == labels[:, None])).sum(1) / np.maximum(weights.sum(1), 1e-30)


def tuned(states: States, distances: np.ndarray, tokens: np.ndarray) -> Mixture:
    """The mixture with the lowest loss."""
    scale = float(distances[tokens >= 0].mean())
    mixtures = [
        Mixture(share, scale * temperature)
        for share, temperature in itertools.product(SHARES, TEMPERATURES)
    ]
    return min(mixtures, key=lambda each: each.losses(states, distances, tokens).mean())
