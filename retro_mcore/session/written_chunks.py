"""Chunks of a text with the neighbors that the model read while it wrote them.

The model writes a chunk with the neighbors of the chunk before it. So the first chunk has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.inference.texts import GeneratedText
from retro_mcore.retrieval.marked_text import Piece, split_text
from retro_mcore.retrieval.neighbors import RetrievedNeighbors
from retro_mcore.retrieval.overlap import covering_runs
from retro_mcore.retrieval.retriever import Retriever

#: Fewest generated tokens in a row that count as copied from a neighbor.
SHORTEST_COPY = 3
#: Unlike any token, also of a neighbor.
_NO_TOKEN, _PADDING = -1, -2


@dataclass(frozen=True)
class ReadNeighbor:
    """A neighbor that the model read while it wrote a chunk.

    Attributes:
        rank: Place among the chunk's neighbors, from 1.
        source: Its document, or "given".
        distance: Distance of the embeddings; None for a given neighbor.
        tokens: i64 [n], without padding.
        copied: bool [n], True for tokens of runs that the chunk shares.
        num_own: Number of tokens of the neighbor itself; its continuation follows.
        has_continuation: Whether a continuation was asked for.
        gain: Nats per token by which the neighbor lowered the mean loss of the chunk's generated
            tokens; None if it was not measured.
    """

    rank: int
    source: str
    distance: float | None
    tokens: NDArray[np.int64]
    copied: NDArray[np.bool_]
    num_own: int
    has_continuation: bool
    gain: float | None

    @property
    def title(self) -> str:
        """Rank, distance, source and gain in one line."""
        distance = "" if self.distance is None else f", distance {self.distance:.3f}"
        gain = "" if self.gain is None else f"; gain {self.gain:+.3f} nats per token"
        return f"neighbor {self.rank}{distance}: {self.source}{gain}"

    def pieces(self, tokenizer: Tokenizer) -> list[list[Piece]]:
        """Text of the neighbor itself, and of its continuation if it has one."""
        places = [slice(self.num_own), slice(self.num_own, None)]
        return [
            split_text(tokenizer, self.tokens[place], self.copied[place])
            for place in places
            if len(self.tokens[place])
        ]


@dataclass(frozen=True)
class WrittenChunk:
    """A chunk of a text, the last one perhaps incomplete.

    Attributes:
        number: Place in the text, from 0.
        start: Place of its first token in the text.
        tokens: i64 [n]; empty if the text ended before the chunk's first token.
        num_prompt: How many of them, from the first, are the prompt's.
        copied_from: i64 [n], rank of the neighbor that holds the longest run of at least
            `SHORTEST_COPY` generated tokens around each token; 0 if none does, and for the prompt.
        neighbors: Neighbors that were read; empty if there were none.
        credit: f32 [n, K], nats by which each neighbor lowered the loss of each token; None if it
            was not measured.
    """

    number: int
    start: int
    tokens: NDArray[np.int64]
    num_prompt: int
    copied_from: NDArray[np.int64]
    neighbors: list[ReadNeighbor]
    credit: NDArray[np.float32] | None

    @property
    def num_generated(self) -> int:
        """Number of tokens that the model wrote."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_copied(self) -> int:
        """Number of generated tokens in a run copied from a neighbor."""
        return int((self.copied_from > 0).sum())

    @property
    def title(self) -> str:
        """Number of the chunk and who wrote it, in one line."""
        if not len(self.tokens):
            return f"chunk {self.number}: the text ended before it"
        if not self.num_generated:
            return f"chunk {self.number}: prompt"
        if not self.num_prompt:
            return f"chunk {self.number}: generated"
        return f"chunk {self.number}: {self.num_prompt} tokens of the prompt, then generated"

    @property
    def copied_share(self) -> str:
        """How many of its generated tokens are copied, in one line."""
        if not self.neighbors:
            return f"{self.num_generated} tokens written without neighbors"
        share = f"{self.num_copied} of {self.num_generated} tokens"
        return f"{share} are in a run copied from neighbors"


def written_chunks(
    text: GeneratedText, chunk_length: int, retriever: Retriever | None
) -> Iterator[WrittenChunk]:
    """Yield the chunks of a text.

    Args:
        text: A text that has ended.
        chunk_length: The model's chunk length.
        retriever: Names the sources of retrieved neighbors.
    """
    for number, place in enumerate(_places(text, chunk_length)):
        tokens = np.array(text.tokens[place.start : place.stop], np.int64)
        num_prompt = min(max(text.prompt_length - place.start, 0), len(tokens))
        generated = tokens.copy()
        generated[:num_prompt] = _NO_TOKEN
        copied_from = np.zeros(len(tokens), np.int64)
        neighbors: list[ReadNeighbor] = []
        credit = text.neighbor_credit
        credit = None if credit is None else credit[place.start : place.stop]
        if 1 <= number <= len(text.neighbors):
            found = text.neighbors[number - 1]
            runs_Kn, copied_KR = _copied_runs(generated, found)
            copied_from = np.where(runs_Kn.any(0), runs_Kn.argmax(0) + 1, 0)
            neighbors = list(
                _described(found, copied_KR, chunk_length, retriever, _gains(credit, num_prompt))
            )
        yield WrittenChunk(number, place.start, tokens, num_prompt, copied_from, neighbors, credit)


def _places(text: GeneratedText, chunk_length: int) -> list[range]:
    """Places of all chunks, and of the empty one that follows neighbors at the text's end."""
    length = len(text.tokens)
    if text.two_chunks:
        return [range(text.prompt_length), range(text.prompt_length, length)]
    count = max(-(-length // chunk_length), len(text.neighbors) + 1)
    return [
        range(number * chunk_length, min((number + 1) * chunk_length, length))
        for number in range(count)
    ]


def _gains(credit: NDArray[np.float32] | None, num_prompt: int) -> list[float] | None:
    """Mean credit of each neighbor for the generated tokens of a chunk."""
    if credit is None or len(credit) == num_prompt:
        return None
    gains: list[float] = credit[num_prompt:].mean(0).tolist()
    return gains


def _copied_runs(
    generated: NDArray[np.int64], found: RetrievedNeighbors
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Length [K, n] of the run of each neighbor around each token, and marks [K, R]."""
    tokens_KR = np.where(found.mask[0], _PADDING, found.tokens[0])
    runs = [covering_runs(generated, tokens_R, SHORTEST_COPY) for tokens_R in tokens_KR]
    return np.stack([mine for mine, _ in runs]), np.stack([theirs > 0 for _, theirs in runs])


def _described(
    found: RetrievedNeighbors,
    copied_KR: NDArray[np.bool_],
    chunk_length: int,
    retriever: Retriever | None,
    gains: list[float] | None,
) -> Iterator[ReadNeighbor]:
    described = None
    if found.ids is not None and retriever is not None:
        described = iter(retriever.describe(found)[0])
    for rank, (tokens_R, mask_R) in enumerate(zip(found.tokens[0], found.mask[0], strict=True), 1):
        if mask_R.all():
            continue
        one = None if described is None else next(described)
        own_R = ~mask_R[:chunk_length] if one is not None else ~mask_R
        yield ReadNeighbor(
            rank=rank,
            source="given" if one is None else one.source,
            distance=None if one is None else one.distance,
            tokens=tokens_R[~mask_R],
            copied=copied_KR[rank - 1][~mask_R],
            num_own=int(own_R.sum()),
            has_continuation=one is not None and len(mask_R) > chunk_length,
            gain=None if gains is None else gains[rank - 1],
        )
