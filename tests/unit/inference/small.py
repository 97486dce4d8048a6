"""What the tests of generation share: a source of neighbors, and generating on a small model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retro_mcore.retrieval.neighbors import CompletedChunk, RetrievedNeighbors
from tests.unit.model.builders import SMALL, VOCABULARY, build_model

CHUNK_LENGTH = SMALL["retro_chunk_length"]
NUM_NEIGHBORS = SMALL["retro_num_neighbors"]
RETRIEVED_LENGTH = CHUNK_LENGTH * SMALL["retro_num_retrieved_chunks"]


@dataclass(frozen=True)
class Vocabulary:
    """The last ids of the model are padding of its embedding."""

    vocab_size: int = VOCABULARY - 6
    eod: int = 0


@dataclass
class ChunkFunction:
    """Neighbors as a function of a chunk's tokens alone, like a search's; keeps its questions."""

    asked: list[CompletedChunk] = field(default_factory=list)
    num_neighbors: int = NUM_NEIGHBORS
    retrieved_length: int = RETRIEVED_LENGTH

    def neighbors_of(self, chunks: Sequence[CompletedChunk]) -> RetrievedNeighbors:
        self.asked += chunks
        seeds = [sum(token * 31**i for i, token in enumerate(chunk.tokens)) for chunk in chunks]
        shape_KR = (self.num_neighbors, self.retrieved_length)
        tokens = [np.random.default_rng(seed).integers(1, 90, shape_KR) for seed in seeds]
        mask = np.zeros((len(chunks), *shape_KR), bool)
        mask[:, 0, -3:] = True
        return RetrievedNeighbors(np.stack(tokens), mask)


def small_model(**overrides: Any) -> Any:
    """A Retro model whose neighbors matter."""
    return build_model(**{"position_embedding_type": "rope", **overrides})


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = np.random.default_rng(7)
    return [generator.integers(1, 90, length).tolist() for length in lengths]


def requests_for(prompt_tokens: Sequence[Sequence[int]], **options: Any) -> list[Any]:
    """Requests from fields of requests and stopping options; `neighbors` for all or for each."""
    from retro_mcore.inference.requests import GenerationRequest, StoppingOptions

    stopping = {
        name: value if isinstance(value, int) else tuple(value)
        for name in ("max_new_tokens", "min_new_tokens", "stop_tokens", "stop_strings")
        if (value := options.pop(name, None)) is not None
    }
    neighbors = options.pop("neighbors", None)
    sources = neighbors if isinstance(neighbors, list) else [neighbors] * len(prompt_tokens)
    request = GenerationRequest(stopping=StoppingOptions(**stopping), **options)
    return request.for_prompts(prompt_tokens, sources)
