"""Cut and embed a document as build_db and build_index do, without writing it anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.retrieval.added_documents import AddedDocument
from retro_mcore.retrieval.bert_tokens import BertTokenCounter
from retro_mcore.retrieval.chunk_text import DocumentEnds, chunk_texts
from retro_mcore.retrieval.project_search import ProjectSearch
from retro_mcore.retrieval.stored_types import StoredCounts, as_stored

#: Chunks embedded in one call, between which searches of running texts are served.
_TOGETHER = 64


@dataclass(frozen=True)
class DocumentMaker:
    """Makes chunks and vectors of a text.

    Attributes:
        tokenizer: The project's tokenizer.
        chunk_length: M.
        document_ends: Text that the embedder reads for an end of document.
        counter: Counts the words of chunks; a chunk without any is left out.
        embed: Embeds texts, f32 [n, dimension].
        aligned: Whether the project is aligned, so that BOS takes a place in the first chunk.
        settings: Settings of the project, which say how `update_db --append` reads documents.
    """

    tokenizer: Tokenizer
    chunk_length: int
    document_ends: DocumentEnds
    counter: BertTokenCounter
    embed: Callable[[Sequence[str]], np.ndarray]
    aligned: bool
    settings: ProjectSettings

    @classmethod
    def open(
        cls,
        project: ProjectSearch,
        tokenizer: Tokenizer,
        embed: Callable[[Sequence[str]], np.ndarray],
    ) -> DocumentMaker:
        """A maker for the database that a project retrieves from.

        Args:
            project: The project and its database.
            tokenizer: Its tokenizer.
            embed: Embeds texts.

        Raises:
            ProjectError: config.json names no vocabulary that counts words.
        """
        config, settings = project.source_config, project.source_settings
        if config.retro_bert_vocab_file is None:
            raise ProjectError(
                project.source.config, "retro_bert_vocab_file is null", "Name a vocab.txt"
            )
        lower_case = config.retro_bert_tokenizer_type != "BertWordPieceCase"
        counter = BertTokenCounter(project.source.root / config.retro_bert_vocab_file, lower_case)
        return cls(
            tokenizer=tokenizer,
            chunk_length=config.retro_gpt_chunk_length,
            document_ends=settings.document_ends,
            counter=counter,
            embed=embed,
            aligned=settings.samples == "aligned",
            settings=settings,
        )

    def cut(self, text: str) -> tuple[list[np.ndarray], list[str], int]:
        """Cut a text into chunks.

        Returns:
            Tokens of each chunk with words, its text, and the number of chunks without words.
        """
        tokens = np.asarray(self.tokenizer.tokenize(text), np.int64)
        first = self.chunk_length - int(self.aligned and self.tokenizer.adds_bos)
        bounds = [0, *range(first, len(tokens), self.chunk_length), len(tokens)]
        chunks = [tokens[start:end] for start, end in itertools.pairwise(bounds) if end > start]
        counts = self.counter.count(self.tokenizer.detokenize_batch([c.tolist() for c in chunks]))
        kept = [chunk for chunk, count in zip(chunks, counts, strict=True) if count]
        texts = chunk_texts(self.tokenizer, kept, self.document_ends)
        return kept, texts, len(chunks) - len(kept)

    def make(self, name: str, text: str) -> AddedDocument:
        """Cut and embed a document.

        Raises:
            ConfigurationError: it holds no words, or the embedder returns unusable vectors.
        """
        chunks, texts, without = self.cut(text)
        if not chunks:
            raise ConfigurationError("documents", f"{name!r} holds no words", "Leave it out")
        vectors = [
            self.embed(texts[start : start + _TOGETHER])
            for start in range(0, len(texts), _TOGETHER)
        ]
        # Rounded as build_index stores the database's vectors, so that both compare alike.
        dtype = self.settings.embeddings_dtype
        stored = as_stored(np.concatenate(vectors), dtype, StoredCounts()).astype(np.float32)
        return AddedDocument(name, text, chunks, stored, without)
