"""Live retrieval: a chunk of tokens or a text in, its neighbors in the project's database out.

The search is the one that built the project's training neighbors: the same text of a chunk, the
same embedder, index and breadth, and its order by BM25 if it had one. Nothing is filtered, since a
text that is being written belongs to no document of the database.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.document_ids import DocumentNames
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.project import ProjectConfig, ProjectSettings
from retro_mcore.retrieval.chunk_text import chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.base import Embedder, embed_unique, load_project_embedder
from retro_mcore.retrieval.embedders.megatron_bert import register as register_megatron_bert
from retro_mcore.retrieval.index import search
from retro_mcore.retrieval.index.project import ProjectIndex
from retro_mcore.retrieval.neighbor_search import NUM_QUERY, require_found
from retro_mcore.retrieval.neighbors import CompletedChunk, RetrievedNeighbors
from retro_mcore.retrieval.rerank import load_reranker


@dataclass(frozen=True)
class NeighborDescription:
    """A neighbor for human eyes.

    Attributes:
        id: Its row in the chunk database.
        distance: Distance of the embeddings, in the index's metric.
        text: The neighbor's own chunk.
        continuation: The text of the chunks that follow it; empty at its document's end.
        dataset: Prefix of the dataset that holds its document.
        document: The document's place in that dataset.
        source: Where it comes from, in words; begins with the document's id where it has one.
    """

    id: int
    distance: float
    text: str
    continuation: str
    dataset: str
    document: int
    source: str


class Retriever:
    """The project's database and index, as a `NeighborSource`.

    The embedder and the index are loaded by the first search, so that a rank that never searches
    needs no memory for them.

    Args:
        project_dir: A project directory, after build_index.
        num_neighbors: K.
        num_retrieved_chunks: Chunks per neighbor, itself included.
        device: Where the embedder runs ("cpu", "cuda"); None: CUDA where there is one.

    Raises:
        ProjectError: a stage has not run, or the index is not of this database.
        ConfigurationError: K or the number of retrieved chunks is not positive.
        TokenizerError: the tokenizer is not the project's.
        CorruptFileError: a file is damaged.
    """

    def __init__(
        self,
        project_dir: Path | str,
        num_neighbors: int = 2,
        num_retrieved_chunks: int = 2,
        device: str | None = None,
    ) -> None:
        for flag, value in (
            ("--retro-num-neighbors", num_neighbors),
            ("--retro-num-retrieved-chunks", num_retrieved_chunks),
        ):
            if value < 1:
                raise ConfigurationError(flag, str(value), "Give at least 1")
        self.num_neighbors, self.num_retrieved_chunks = num_neighbors, num_retrieved_chunks
        config = ProjectConfig.load(project_dir)
        self._paths, self._device = config.database_paths(project_dir), device
        config = ProjectConfig.load(self._paths.root)
        self.chunk_length = config.retro_gpt_chunk_length
        self.tokenizer = load_project_tokenizer(config, self._paths)
        self.database = ChunkDatabase.open(self._paths.root, own=True)
        self._datasets = config.blend[1]
        self._names = DocumentNames([self._paths.data / prefix for prefix in self._datasets])
        self._settings = ProjectSettings.load(self._paths.root)
        own = ProjectSettings.load(project_dir)
        self._num_query = own.num_neighbors_query or NUM_QUERY
        self._rerank = load_reranker(
            own.rerank,
            self._paths,
            self.database,
            self.chunk_length,
            self.tokenizer.vocab_size,
        )
        self._index = ProjectIndex(
            self._paths, self._settings, len(self.database), config.retro_block_size
        )

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder that the index was built with."""
        register_megatron_bert()
        embedder = load_project_embedder(self._settings, self._paths, device=self._device)
        if embedder.dimension != self._settings.embedding_dimension:
            raise ProjectError(
                self._paths.settings,
                f"the index has dimension {self._settings.embedding_dimension}, but the embedder "
                f"{embedder.name} now gives {embedder.dimension}",
                "Restore the embedder's model",
            )
        return embedder

    @cached_property
    def index(self) -> Any:
        """The Faiss index, with the search breadth that build_index chose."""
        return self._index.open()

    def search_texts(self, texts: Sequence[str]) -> RetrievedNeighbors:
        """The neighbors of N texts; where the index finds fewer than K, the rest is masked."""
        chunks = [self.tokenizer.tokenize(text) for text in texts] if self._rerank else []
        return self._search(texts, chunks)

    def search_tokens(self, chunks: Sequence[Sequence[int]]) -> RetrievedNeighbors:
        """The neighbors of N chunks of the project's tokens."""
        arrays = [np.asarray(chunk, np.int64) for chunk in chunks]
        texts = chunk_texts(self.tokenizer, arrays, self._settings.document_ends)
        return self._search(texts, arrays)

    def _search(self, texts: Sequence[str], chunks: Sequence[Any]) -> RetrievedNeighbors:
        """Neighbors of texts; `chunks`, their tokens, are what candidates are reordered by."""
        shape_NK = (len(texts), self.num_neighbors)
        ids, distances = np.full(shape_NK, NO_NEIGHBOR), np.full(shape_NK, np.inf, np.float32)
        if len(texts):
            found = min(self.num_neighbors, len(self.database))
            wanted = max(found, min(self._num_query, len(self.database))) if self._rerank else found
            vectors = embed_unique(self.embedder, texts, what="text")
            near, candidates = search(self.index, vectors, wanted)
            require_found(near, candidates, self.database)
            if self._rerank:
                candidates, near = self._rerank.reorder(chunks, candidates, near)
            distances[:, :found], ids[:, :found] = near[:, :found], candidates[:, :found]
        tokens, mask = self.database.retrieved_tokens(
            ids, self.num_retrieved_chunks, self.chunk_length, self.tokenizer.eod
        )
        return RetrievedNeighbors(tokens, mask, ids, distances)

    def neighbors_of(self, chunks: Sequence[CompletedChunk]) -> RetrievedNeighbors:
        """The neighbors of N chunks of growing texts (`NeighborSource`)."""
        return self.search_tokens([chunk.tokens for chunk in chunks])

    def describe(self, retrieved: RetrievedNeighbors) -> list[list[NeighborDescription]]:
        """Texts and source documents of what a search found, per chunk, in the order found."""
        assert retrieved.ids is not None
        assert retrieved.distances is not None
        return [
            [
                self._describe(int(neighbor), float(distance))
                for neighbor, distance in zip(ids_K, distances_K, strict=True)
                if neighbor != NO_NEIGHBOR
            ]
            for ids_K, distances_K in zip(retrieved.ids, retrieved.distances, strict=True)
        ]

    def _describe(self, neighbor: int, distance: float) -> NeighborDescription:
        ids = self.database.retrieved_ids(np.array(neighbor), self.num_retrieved_chunks)
        texts = self.database.texts(ids[ids != NO_NEIGHBOR], self.tokenizer)
        dataset, document = self.database.documents(np.array(neighbor)).tolist()
        return NeighborDescription(
            neighbor,
            distance,
            texts[0],
            "".join(texts[1:]),
            self._datasets[dataset],
            document,
            self._names.describe(dataset, document),
        )
