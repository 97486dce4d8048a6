"""Live retrieval of the neighbors of a chunk or text in the project's database.

The search is the same as for the project's training neighbors: same text of a chunk, same embedder,
index and breadth, and same BM25 order if any. Only removed documents are left out, since the text
being generated belongs to no document of the database.
"""

from __future__ import annotations

import threading
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
from retro_mcore.retrieval.added_documents import AddedDocuments, JoinedDatabase
from retro_mcore.retrieval.chunk_text import chunk_texts
from retro_mcore.retrieval.document_chunks import DocumentMaker
from retro_mcore.retrieval.embedders.base import Embedder, embed_unique
from retro_mcore.retrieval.filtering import keep_first
from retro_mcore.retrieval.index import search
from retro_mcore.retrieval.neighbor_search import require_found
from retro_mcore.retrieval.neighbors import CompletedChunk, RetrievedNeighbors
from retro_mcore.retrieval.project_search import open_search

#: Factor by which a search that finds too few neighbors is widened.
_MORE = 4


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
        self._embedding = threading.Lock()
        self._added: AddedDocuments | None = None
        self._maker: DocumentMaker | None = None

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder that the index was built with; in fp32 where its precision does not run."""
        precision = self._project.usable_precision(self._device)
        return self._project.load_embedder(device=self._device, precision=precision)

    @cached_property
    def index(self) -> Any:
        """The Faiss index, with the search breadth that build_index chose."""
        return self._project.index.open(rescore=self._project.rescore)

    def accept_documents(self, most_chunks: int) -> AddedDocuments:
        """Search documents that are added in memory from now on, too.

        Args:
            most_chunks: Maximum number of their chunks.

        Raises:
            ProjectError: the project cannot cut documents into chunks as its database has them.
        """
        project = self._project
        dimension = int(project.source_settings.embedding_dimension or self.embedder.dimension)
        self._maker = DocumentMaker.open(project, self.tokenizer, self._embed)
        self._added = AddedDocuments(len(self.database), dimension, most_chunks)
        return self._added

    @property
    def maker(self) -> DocumentMaker:
        """Cuts and embeds documents; only after `accept_documents`."""
        assert self._maker is not None
        return self._maker

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts, f32 [n, dimension], for one thread at a time."""
        with self._embedding:
            return embed_unique(self.embedder, texts, what="text")

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
        # All of a search sees the same added documents.
        added = None if self._added is None else self._added.now
        database = self.database if added is None else JoinedDatabase(self.database, added)
        shape_NK = (len(texts), self.num_neighbors)
        ids, distances = np.full(shape_NK, NO_NEIGHBOR), np.full(shape_NK, np.inf, np.float32)
        if len(texts):
            there = self.database.num_retrieved + (0 if added is None else len(added))
            found = min(self.num_neighbors, there)
            reordered = self._rerank or self._project.rescore
            wanted = max(found, self._num_query) if reordered else found
            vectors = self._embed(texts)
            near, candidates = self._candidates(vectors, min(wanted, len(self.database)))
            if added is not None:
                near, candidates = added.merge(vectors, near, candidates, wanted)
            if self._rerank:
                rerank = self._rerank.over(database)
                candidates, near = rerank.reorder(chunks, candidates, near)
            distances[:, :found], ids[:, :found] = near[:, :found], candidates[:, :found]
        tokens, mask = database.retrieved_tokens(
            ids, self.num_retrieved_chunks, self.chunk_length, self.tokenizer.eod
        )
        return RetrievedNeighbors(tokens, mask, ids, distances)

    def _candidates(self, vectors: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest chunks that may be retrieved: distances and ids, [N, wanted]."""
        removed, k = self.database.removed, wanted
        while True:
            near, candidates = search(self.index, vectors, k)
            require_found(near, candidates, self.database)
            if removed is None:
                return near, candidates
            allowed = ~removed.of(candidates)
            # More are searched where removed chunks took the places of others.
            short = (allowed.sum(axis=1) < wanted) & (candidates[:, -1] != NO_NEIGHBOR)
            if k >= len(self.database) or not short.any():
                ids, kept = keep_first(candidates, near, allowed, wanted)
                return np.where(ids == NO_NEIGHBOR, np.inf, kept).astype(np.float32), ids
            k = min(_MORE * k, len(self.database))

    def neighbors_of(self, chunks: Sequence[CompletedChunk]) -> RetrievedNeighbors:
        """Search the neighbors of N chunks of growing texts (`NeighborSource`)."""
        return self.search_tokens([chunk.tokens for chunk in chunks])

    def describe(self, retrieved: RetrievedNeighbors) -> list[list[NeighborDescription]]:
        """Describe the neighbors that a search found, per chunk, in the same order."""
        assert retrieved.ids is not None
        assert retrieved.distances is not None
        return [
            [
                self._describe(int(neighbor), float(distance), text_R[~mask_R])
                for neighbor, distance, text_R, mask_R in zip(*found, strict=True)
                if neighbor != NO_NEIGHBOR
            ]
            for found in zip(
                retrieved.ids, retrieved.distances, retrieved.tokens, retrieved.mask, strict=True
            )
        ]

    def _describe(self, neighbor: int, distance: float, read: np.ndarray) -> NeighborDescription:
        if neighbor >= len(self.database):
            return self._describe_added(neighbor, distance, read)
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

    def _describe_added(
        self, neighbor: int, distance: float, read: np.ndarray
    ) -> NeighborDescription:
        """Describe a chunk of an added document, which may be gone since it was read."""
        assert self._added is not None
        now = self._added.now
        place = int(now.place_of(np.array(neighbor)))
        # Only a document's last chunk, without continuation, is shorter, and the first after BOS.
        first = self.chunk_length if place < 0 else len(now.chunks[place])
        texts = self.tokenizer.detokenize_batch([read[:first].tolist(), read[first:].tolist()])
        document = -1 if place < 0 else int(now.owners[place])
        source = "an added document, which was removed"
        if place >= 0:
            source = f"{now.documents[document].id} (added document {document})"
        return NeighborDescription(
            id=neighbor,
            distance=distance,
            text=texts[0],
            continuation=texts[1],
            dataset="added",
            document=document,
            source=source,
        )
