"""Live retrieval of the neighbors of a chunk or text in the project's database.

The search is the same as for the project's training neighbors: same text of a chunk, same embedder,
index and breadth, and same BM25 order if any. Nothing is filtered, since the text being generated
belongs to no document of the database.
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
from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.chunk_text import chunk_texts
from retro_mcore.retrieval.embedders.base import Embedder, embed_unique
from retro_mcore.retrieval.index import search
from retro_mcore.retrieval.neighbor_search import require_found
from retro_mcore.retrieval.neighbors import CompletedChunk, RetrievedNeighbors
from retro_mcore.retrieval.project_search import open_search


@dataclass(frozen=True)
class NeighborDescription:
    """A neighbor in human-readable form.

    Attributes:
        id: Row in the chunk database.
        distance: Distance of the embeddings, in the index's metric.
        text: The neighbor's own chunk.
        continuation: Text of the chunks that follow it; empty at the end of its document.
        dataset: Prefix of the dataset that contains its document.
        document: Index of the document in that dataset.
        source: Description of the document; begins with its id if it has one.
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

    The first search loads the embedder and the index, so a rank that never searches needs no
    memory for them.

    Args:
        project_dir: A project directory, after build_index.
        num_neighbors: K.
        num_retrieved_chunks: Chunks per neighbor, itself included.
        device: Where the embedder runs ("cpu", "cuda"); None: CUDA if available.

    Raises:
        ProjectError: a stage has not run, or the index belongs to another database.
        ConfigurationError: K or the number of retrieved chunks is not positive.
        TokenizerError: the tokenizer differs from the project's.
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
        project = open_search(project_dir)
        self._project, self._device = project, device
        self.database = project.database
        self.chunk_length = project.source_config.retro_gpt_chunk_length
        self.tokenizer = load_project_tokenizer(project.source_config, project.source)
        self._datasets = project.source_config.blend[1]
        self._names = DocumentNames([project.source.data / prefix for prefix in self._datasets])
        wanted = project.num_candidates(project.settings.num_neighbors_query)
        self._num_query = min(wanted, len(self.database))
        self._rerank = project.load_reranker(project.settings.rerank, self.tokenizer)

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder that the index was built with; in fp32 where its precision does not run."""
        precision = self._project.usable_precision(self._device)
        return self._project.load_embedder(device=self._device, precision=precision)

    @cached_property
    def index(self) -> Any:
        """The Faiss index, with the search breadth that build_index chose."""
        return self._project.index.open(rescore=self._project.rescore)

    def search_texts(self, texts: Sequence[str]) -> RetrievedNeighbors:
        """Search the neighbors of N texts; if the index finds fewer than K, the rest is masked."""
        chunks = [self.tokenizer.tokenize(text) for text in texts] if self._rerank else []
        return self._search(texts, chunks)

    def search_tokens(self, chunks: Sequence[Sequence[int]]) -> RetrievedNeighbors:
        """Search the neighbors of N chunks of the project's tokens."""
        arrays = [np.asarray(chunk, np.int64) for chunk in chunks]
        texts = chunk_texts(self.tokenizer, arrays, self._project.source_settings.document_ends)
        return self._search(texts, arrays)

    def _search(self, texts: Sequence[str], chunks: Sequence[Any]) -> RetrievedNeighbors:
        """Search neighbors of texts; `chunks` are their tokens, used to reorder candidates."""
        shape_NK = (len(texts), self.num_neighbors)
        ids, distances = np.full(shape_NK, NO_NEIGHBOR), np.full(shape_NK, np.inf, np.float32)
        if len(texts):
            found = min(self.num_neighbors, len(self.database))
            reordered = self._rerank or self._project.rescore
            wanted = max(found, self._num_query) if reordered else found
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
        """Search the neighbors of N chunks of growing texts (`NeighborSource`)."""
        return self.search_tokens([chunk.tokens for chunk in chunks])

    def describe(self, retrieved: RetrievedNeighbors) -> list[list[NeighborDescription]]:
        """Describe the neighbors that a search found, per chunk, in the same order."""
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
            id=neighbor,
            distance=distance,
            text=texts[0],
            continuation="".join(texts[1:]),
            dataset=self._datasets[dataset],
            document=document,
            source=self._names.describe(dataset, document),
        )
