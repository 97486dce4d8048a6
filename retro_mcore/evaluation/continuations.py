"""Log-likelihoods of continuations, with neighbors for every complete chunk.

Shapes: B texts, S their padded length, L chunks, K neighbors, R retrieved length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from retro_mcore.distributed import broadcast_object, get_rank, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.scoring import sum_over_model_ranks
from retro_mcore.model.vocabulary import whole_vocabulary
from retro_mcore.progress import track
from retro_mcore.retrieval.neighbors import RetrievedNeighbors
from retro_mcore.samples.batch import position_ids, retrieved_inputs
from retro_mcore.session import LoadedModel

#: Number of chunks whose neighbors are cached: the options of a question share its chunks.
_REMEMBERED = 10_000

Pair = tuple[Sequence[int], Sequence[int]]


def pieces_of(pair: Pair, max_length: int) -> list[Pair]:
    """Split a continuation into pieces that fit a window, with the preceding text as context.

    A continuation that fits is one piece. In a longer one every token is scored once, with at least
    half a window of context if available.

    Args:
        pair: Tokens of context and continuation.
        max_length: Window length in tokens.
    """
    context, continuation = pair
    if len(continuation) <= max_length:
        return [pair]
    size = max(max_length // 2, 1)
    return [
        ([*context, *continuation[:start]], continuation[start : start + size])
        for start in range(0, len(continuation), size)
    ]


class ContinuationScorer:
    """Scores continuations in batches, divided among data parallel ranks.

    Args:
        loaded: The model; with a retriever, each complete chunk gets its neighbors.
        batch_size: Texts per forward pass.
        max_length: Window length in tokens. Longer contexts lose their beginning, and longer
            continuations are scored in pieces.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int, max_length: int | None = None) -> None:
        self._loaded, self._batch_size = loaded, batch_size
        self.max_length = max_length or loaded.window
        self._known: dict[bytes, RetrievedNeighbors] = {}
        self._device = next(loaded.model.parameters()).device

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], description: str) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the greedy one.

        Args:
            pairs: Tokens of context (at least one) and continuation.
            description: Label of the progress bar.

        Raises:
            ConfigurationError: a context is empty.
        """
        if not all(context for context, _ in pairs):
            raise ConfigurationError("a context", "no tokens", "Begin it with BOS or EOD")
        parts = [pieces_of(pair, self.max_length) for pair in pairs]
        scores = iter(self._score([piece for pieces in parts for piece in pieces], description))
        merged = [[next(scores) for _ in pieces] for pieces in parts]
        return [(sum(a for a, _ in part), all(b for _, b in part)) for part in merged]

    def _score(self, pairs: Sequence[Pair], description: str) -> list[tuple[float, bool]]:
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        size = self._batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        rank = parallel_state.get_data_parallel_rank()
        mine = batches[rank :: parallel_state.get_data_parallel_world_size()]
        results = np.zeros((2, len(pairs)))
        with raise_together():
            for batch in track(mine, description, hidden=get_rank() != 0):
                results[:, batch] = self._score_batch([pairs[index] for index in batch])
        likelihoods, greedy = sum_over_model_ranks(results)
        return [(float(a), bool(b)) for a, b in zip(likelihoods, greedy, strict=True)]

    def _score_batch(self, pairs: Sequence[Pair]) -> np.ndarray:
        """f64 [2, B]: log-likelihoods, and 1 if every token is the most likely one, else 0."""
        texts = [
            [*context, *continuation][-self.max_length - 1 :] for context, continuation in pairs
        ]
        counts = [len(continuation) for _, continuation in pairs]
        results = np.zeros((2, len(pairs)))
        logits_BSV = self._logits([text[:-1] for text in texts])
        for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
            results[1, row] = 1
            if not count:
                continue
            logits_NV = whole_vocabulary(
                logits_BSV[row, len(text) - 1 - count : len(text) - 1],
                self._loaded.tokenizer.vocab_size,
                self._loaded.model,
            ).double()
            target_N = torch.tensor(text[-count:], device=self._device)
            likelihoods_N = logits_NV.log_softmax(-1).gather(1, target_N[:, None])
            results[0, row] = likelihoods_N.sum().item()
            results[1, row] = bool((logits_NV.argmax(-1) == target_N).all())
        return results

    def _logits(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [B, S, this rank's V]; rows are padded on the right, hidden by causality."""
        chunk_length = self._loaded.arguments.retro_chunk_length
        longest = max(map(len, inputs))
        if self._loaded.retriever is not None:  # whole chunks, so that all grids are the same
            longest = -(-longest // chunk_length) * chunk_length
        eod = self._loaded.tokenizer.eod
        rows = [[*row, *[eod] * (longest - len(row))] for row in inputs]
        tokens_BS = torch.tensor(rows, dtype=torch.int64, device=self._device)
        context: dict[str, Any] = {}
        if self._loaded.retriever is not None and any(len(row) >= chunk_length for row in inputs):
            context = self._context(inputs, longest // chunk_length)
        return self._loaded.model(tokens_BS, position_ids(tokens_BS), None, **context)

    def _context(
        self, inputs: Sequence[Sequence[int]], num_chunks: int
    ) -> dict[str, torch.Tensor | None]:
        """The model's arguments for retrieved tokens."""
        chunk_length = self._loaded.arguments.retro_chunk_length
        chunks = [
            [
                np.asarray(row[start : start + chunk_length], np.int64)
                for start in range(0, len(row) - chunk_length + 1, chunk_length)
            ]
            for row in inputs
        ]
        self._search([chunk for row in chunks for chunk in row])
        packed = RetrievedNeighbors.pack(
            [[self._known[chunk.tobytes()] for chunk in row] for row in chunks],
            num_chunks,
            self._loaded.tokenizer.eod,
        )
        return retrieved_inputs(
            torch.from_numpy(packed.tokens).to(self._device),
            torch.from_numpy(packed.mask).to(self._device),
        )

    def _search(self, chunks: Sequence[np.ndarray]) -> None:
        """Search the neighbors of chunks that are not cached, on the model's first rank."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = {chunk.tobytes(): chunk for chunk in chunks if chunk.tobytes() not in self._known}
        if not new:
            return
        group: dist.ProcessGroup | None = parallel_state.get_tensor_model_parallel_group()
        found: object = None
        with raise_together(group):
            if get_rank(group) == 0:
                assert self._loaded.retriever is not None
                found = self._loaded.retriever.search_tokens([c.tolist() for c in new.values()])
        found = broadcast_object(found, group)
        assert isinstance(found, RetrievedNeighbors)
        for place, key in enumerate(new):
            self._known[key] = found.chunk(place)
