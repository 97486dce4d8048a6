"""Sources of neighbors for a generated text: a live search, or the caller.

Shapes: N chunks requested, M chunk length, K neighbors, R retrieved length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from retro_mcore.data.retrieved import missing_neighbors, pad_texts
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.errors import ConfigurationError, ShapeError


class CompletedChunk(NamedTuple):
    """A complete chunk of a growing text."""

    prompt: int
    chunk: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class RetrievedNeighbors:
    """The neighbors of N chunks, in the form that the model reads.

    Attributes:
        tokens: int64 [N, K, R].
        mask: bool [N, K, R]; True for padding or a missing neighbor.
        ids: int64 [N, K], rows of the chunk database; None if they are not from a database.
        distances: float32 [N, K] of the search, or None.

    Raises:
        ShapeError: the arrays' shapes do not match.
    """

    tokens: np.ndarray
    mask: np.ndarray
    ids: np.ndarray | None = None
    distances: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape:
            raise ShapeError(
                "neighbors",
                f"tokens {list(self.tokens.shape)} and mask {list(self.mask.shape)}",
                "Both are [chunks, neighbors, retrieved length]",
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def join(cls, parts: Sequence[RetrievedNeighbors]) -> RetrievedNeighbors:
        """Concatenate the chunks of several objects."""
        ids = [part.ids for part in parts if part.ids is not None]
        distances = [part.distances for part in parts if part.distances is not None]
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.mask for part in parts]),
            np.concatenate(ids) if len(ids) == len(parts) else None,
            np.concatenate(distances) if len(distances) == len(parts) else None,
        )

    @classmethod
    def pack(
        cls, texts: Sequence[Sequence[RetrievedNeighbors]], num_chunks: int, pad_id: int
    ) -> RetrievedNeighbors:
        """The neighbors of the chunks of several texts, without ids and distances.

        Args:
            texts: For each of B texts, the neighbors of its first chunks (N = 1 each). At least one
                text has some.
            num_chunks: L, chunks per text; further chunks of a text have no neighbors.
            pad_id: Token in place of a missing neighbor, which is masked.

        Returns:
            N = B * L, ordered by text.
        """
        shape_KR = next(found.tokens.shape[1:] for text in texts for found in text)
        tokens, mask = missing_neighbors((len(texts), num_chunks, *shape_KR), pad_id)
        for place, text in enumerate(texts):
            for chunk, found in enumerate(text):
                tokens[place, chunk], mask[place, chunk] = found.tokens[0], found.mask[0]
        return cls(tokens.reshape(-1, *shape_KR), mask.reshape(-1, *shape_KR))

    def chunk(self, row: int) -> RetrievedNeighbors:
        """The neighbors of one of the N chunks (N = 1)."""
        one = slice(row, row + 1)
        return RetrievedNeighbors(
            self.tokens[one],
            self.mask[one],
            None if self.ids is None else self.ids[one],
            None if self.distances is None else self.distances[one],
        )


class NeighborSource(Protocol):
    """Provides the neighbors of each completed chunk; asked once per chunk."""

    def neighbors_of(self, chunks: Sequence[CompletedChunk]) -> RetrievedNeighbors:
        """The neighbors of N chunks, in the order of the chunks."""
        ...


class Prefetching(NeighborSource):
    """A `NeighborSource` that can start a search before its result is needed."""

    #: Number of tokens at a chunk's end that its search ignores, so it can start earlier.
    lead: int = 0

    def expect(self, chunks: Sequence[CompletedChunk]) -> None:
        """Start searching for these chunks, unless already started."""
        ...

    def forget(self, prompt: int) -> None:
        """Forget a prompt whose text has ended."""


class GivenNeighbors:
    """Neighbors chosen by the caller, as a `NeighborSource`.

    Args:
        neighbors: Neighbors of each prompt's first chunks, by the prompt's index in the batch;
            other chunks and prompts have none.
        num_neighbors: K of the model.
        retrieved_length: R of the model.
        pad_id: Token in place of a missing neighbor; masked.

    Raises:
        ShapeError: K or R of the neighbors differ from the model's.
    """

    def __init__(
        self,
        neighbors: Mapping[int, RetrievedNeighbors],
        num_neighbors: int,
        retrieved_length: int,
        pad_id: int,
    ) -> None:
        for prompt, given in neighbors.items():
            if given.tokens.shape[1:] != (num_neighbors, retrieved_length):
                raise ShapeError(
                    f"neighbors of prompt {prompt}",
                    f"[neighbors, retrieved length] is {list(given.tokens.shape[1:])}",
                    f"The model reads {[num_neighbors, retrieved_length]}",
                )
        self._neighbors = dict(neighbors)
        self._shape_KR = (num_neighbors, retrieved_length)
        self._pad_id = pad_id

    def neighbors_of(self, chunks: Sequence[CompletedChunk]) -> RetrievedNeighbors:
        """The given neighbors; all masked if none were given."""
        tokens, mask = missing_neighbors((len(chunks), *self._shape_KR), self._pad_id)
        for row, (prompt, chunk, _) in enumerate(chunks):
            given = self._neighbors.get(prompt)
            if given is not None and chunk < len(given):
                tokens[row], mask[row] = given.tokens[chunk], given.mask[chunk]
        return RetrievedNeighbors(tokens, mask)


class SameNeighbors:
    """The same neighbors for every chunk, as a `NeighborSource`.

    Args:
        neighbors: Neighbors of one chunk (N = 1).
        num_cut: Number of neighbors that are only the beginning of a longer text.
    """

    def __init__(self, neighbors: RetrievedNeighbors, num_cut: int = 0) -> None:
        self._neighbors = neighbors.chunk(0)
        self.num_cut = num_cut

    def neighbors_of(self, chunks: Sequence[CompletedChunk]) -> RetrievedNeighbors:
        """Repeat these neighbors for each chunk."""
        return RetrievedNeighbors.join([self._neighbors] * len(chunks))


def num_longer(texts: Sequence[str], tokenizer: Tokenizer, retrieved_length: int) -> int:
    """Count the texts that `neighbors_from_texts` cuts to R tokens."""
    return sum(len(tokenizer.tokenize(text)) > retrieved_length for text in texts)


def neighbors_from_texts(
    texts: Sequence[str], tokenizer: Tokenizer, num_neighbors: int, retrieved_length: int
) -> RetrievedNeighbors:
    """Use texts as the neighbors of one chunk (N = 1): cut or padded to R tokens, with masked
    padding.

    Args:
        texts: At most K texts; missing ones are masked.
        tokenizer: The project's tokenizer.
        num_neighbors: K of the model.
        retrieved_length: R of the model.

    Raises:
        ConfigurationError: more texts than the model reads.
    """
    if len(texts) > num_neighbors:
        raise ConfigurationError(
            "neighbors",
            f"{len(texts)} texts, but the model reads {num_neighbors}",
            "Give the best ones",
        )
    tokens_KR, mask_KR = pad_texts(texts, tokenizer, num_neighbors, retrieved_length)
    return RetrievedNeighbors(tokens_KR[None], mask_KR[None])
