"""A loaded model for the tests of evaluation: small, random, with a tokenizer of letters."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from retro_mcore.retrieval.neighbors import CompletedChunk, RetrievedNeighbors
from tests.unit.inference.small import CHUNK_LENGTH, ChunkFunction, small_model

#: Tokens that mean something; the model's other rows are padding.
VOCABULARY_SIZE, EOD, BOS = 90, 0, 1


class Letters:
    """A token for each printable ASCII character but the last seven; others are left out."""

    vocab_size, eod, bos, adds_bos = VOCABULARY_SIZE, EOD, BOS, False
    beginning: Sequence[int] = ()

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) - 30 for letter in text if 2 <= ord(letter) - 30 < VOCABULARY_SIZE]

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(chr(token + 30) for token in ids if token > BOS)

    def detokenize_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.detokenize(row) for row in ids]


class Search(ChunkFunction):
    """Neighbors as a function of a chunk's tokens, also for chunks alone."""

    def search_tokens(self, chunks: Sequence[Sequence[int]]) -> RetrievedNeighbors:
        return self.neighbors_of([CompletedChunk(0, i, c) for i, c in enumerate(chunks)])


def poison_padding(model: Any, by: float = 9.0) -> None:
    """Give the rows of the padding weights that would take all probability."""
    for name, weight in model.named_parameters():
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            weight.data[VOCABULARY_SIZE:] += by


def loaded_model(retrieval: bool, model: Any = None) -> Any:
    """What `load_model` gives."""
    from retro_mcore.session import LoadedModel

    model = model or small_model()
    arguments: Any = SimpleNamespace(
        seq_length=model.max_sequence_length,
        retro_chunk_length=CHUNK_LENGTH,
        retro_num_neighbors=model.config.retro_num_neighbors,
        retro_num_retrieved_chunks=model.config.retro_num_retrieved_chunks,
        retro_attention_gate=1.0,
        no_retrieval=False,
    )
    tokenizer: Any = Letters()
    search: Any = Search() if retrieval else None
    return LoadedModel(model, arguments, tokenizer, search)
