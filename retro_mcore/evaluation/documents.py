"""The documents of a held-out split, their chunks, and the chunks' neighbors.

Chunks start with their document, as in the chunk database; a document's last chunk may be short.
The chunks of all documents are numbered consecutively ("rows"), short ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.data.tokens.splits import document_ranges
from retro_mcore.data.tokens.token_file import TokenSource, open_token_files
from retro_mcore.distributed import get_rank, get_world_size, is_first_on_host, raise_together
from retro_mcore.errors import ProjectError
from retro_mcore.evaluation.scoring import sum_over_world
from retro_mcore.project.config import ProjectConfig, ProjectSettings, Split
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import cut
from retro_mcore.retrieval.embedders.precision import Precision
from retro_mcore.retrieval.neighbor_search import NeighborSearch, query_split
from retro_mcore.retrieval.neighbor_tables import SavedNeighbors
from retro_mcore.retrieval.project_search import ProjectSearch, open_search
from retro_mcore.retrieval.query_chunks import ChunkEmbedder, SampleChunks
from retro_mcore.samples.project_samples import RenumberedSamples, numbers_in_database

#: Number of preceding tokens decoded with a chunk, since some tokenizers drop a leading space.
_DECODING_CONTEXT = 8


@dataclass(frozen=True)
class HeldOutDocuments:
    """The documents of a split that have at least two tokens, one to be predicted. Picklable.

    Attributes:
        split: "valid" or "test".
        sources: The project's corpora.
        prefixes: Their names.
        corpus: Corpus of each document, i64 [documents].
        number: Number of each document in its corpus, i64 [documents].
        lengths: Tokens of each document without the final EOD, i64 [documents].
        chunk_length: M.
        eod: The token that ends a document.
        num_too_short: Number of documents skipped because they have fewer than two tokens.
        num_in_split: Number of documents of each corpus, including those beyond a limit.
    """

    split: Split
    sources: Sequence[TokenSource]
    prefixes: Sequence[str]
    corpus: NDArray[np.int64]
    number: NDArray[np.int64]
    lengths: NDArray[np.int64]
    chunk_length: int
    eod: int
    num_too_short: int = 0
    num_in_split: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """Row of each document's first chunk, i64 [documents + 1]."""
        return np.concatenate([[0], np.cumsum(-(-self.lengths // self.chunk_length))])

    @property
    def num_chunks(self) -> int:
        """Number of chunks of all documents."""
        return int(self.first_rows[-1])

    @property
    def owners(self) -> NDArray[np.int64]:
        """Document of each chunk, i64 [chunks]."""
        return np.repeat(np.arange(len(self)), -(-self.lengths // self.chunk_length))

    def tokens(self, document: int) -> np.ndarray:
        """Tokens of a document, i64 [length]."""
        source, number = self.sources[self.corpus[document]], self.number[document]
        start = int(source.starts[number])
        return np.asarray(source.tokens[start : start + self.lengths[document]], np.int64)

    @classmethod
    def open(
        cls, project_dir: Path | str, split: Split, eod: int, limit: int | None = None
    ) -> HeldOutDocuments:
        """Open the documents of a project.

        Args:
            project_dir: The project.
            split: "valid" or "test".
            eod: The tokenizer's end-of-document token.
            limit: Maximum number of documents to read from the beginning of each corpus.

        Raises:
            ProjectError: the split has no document to evaluate.
        """
        config, paths = ProjectConfig.load(project_dir), ProjectPaths(project_dir)
        aligned = ProjectSettings.load(project_dir).samples == "aligned"
        sources = open_token_files(config, paths)
        corpora, numbers, lengths, num_too_short = [], [], [], 0
        num_in_split = []
        for corpus, source in enumerate(sources):
            start, end = document_ranges(config.retro_gpt_split, len(source))[split]
            num_in_split.append(end - start)
            for number in range(start, end if limit is None else min(end, start + limit)):
                length = text_length(source.sequence(number), eod, aligned)
                if length > 1:
                    corpora.append(corpus)
                    numbers.append(number)
                    lengths.append(length)
                else:
                    num_too_short += 1
        if not lengths:
            raise ProjectError(
                project_dir,
                f"has no documents of two or more tokens in its {split} split"
                + (f", but {num_too_short} shorter ones" if num_too_short else ""),
                "Choose another split, or preprocess with a --split that gives it some",
            )
        return cls(
            split=split,
            sources=sources,
            prefixes=config.blend[1],
            corpus=np.array(corpora, np.int64),
            number=np.array(numbers, np.int64),
            lengths=np.array(lengths, np.int64),
            chunk_length=config.retro_gpt_chunk_length,
            eod=eod,
            num_too_short=num_too_short,
            num_in_split=tuple(num_in_split),
        )


def text_length(tokens: np.ndarray, eod: int, aligned: bool) -> int:
    """Number of tokens before a document's EOD, which padding may follow if it is aligned."""
    if aligned:
        ends = np.flatnonzero(tokens == eod)
        return int(ends[0]) if len(ends) else len(tokens)
    return len(tokens) - int(len(tokens) > 0 and tokens[-1] == eod)


@dataclass(frozen=True)
class DocumentChunks:
    """Presents each chunk of the documents as a sample, for `query_split`."""

    documents: HeldOutDocuments

    def __len__(self) -> int:
        return self.documents.num_chunks

    def read(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Read M+1 tokens (EOD after a short chunk), the corpus number and the document [1]."""
        documents = self.documents
        document = int(np.searchsorted(documents.first_rows, index, side="right")) - 1
        start = (index - documents.first_rows[document]) * documents.chunk_length
        chunk = documents.tokens(document)[start : start + documents.chunk_length]
        padded = np.full(documents.chunk_length + 1, documents.eod, np.int64)
        padded[: len(chunk)] = chunk
        return padded, int(documents.corpus[document]), documents.number[document : document + 1]


def search_document_neighbors(
    project_dir: Path | str,
    documents: HeldOutDocuments,
    tokenizer: Tokenizer,
    num_save: int,
    device: str,
) -> SavedNeighbors:
    """Search the neighbors of every chunk of the documents as query_neighbors does.

    No neighbor comes from the chunk's own document. The work is divided among all ranks. The
    neighbors are
    saved in `query/<split>_documents` of the project, and reused for the same documents, index and
    number of neighbors.

    Args:
        project_dir: A project, after build_index.
        documents: The documents.
        tokenizer: The project's.
        num_save: Neighbors per chunk.
        device: Device of the embedder.

    Raises:
        ProjectError: a stage has not run, or another run works on the project.
        CorruptFileError: a file is damaged.
    """
    paths = ProjectPaths(project_dir)
    with stage_lock(paths, "evaluate_perplexity"):
        with raise_together():
            search = open_search(paths)
            breadth = search.num_candidates(search.settings.num_neighbors_query)
            num_query = min(max(breadth, num_save), len(search.database))
            precision = search.usable_precision(device)
            in_tokens = search.batch_tokens(device) is not None
            fingerprint = _fingerprint(search, documents, num_save, num_query, precision, in_tokens)
            # The EOD after a short chunk is padding. As a line break it adds no text.
            compare = is_first_on_host()
            embedder = ChunkEmbedder(
                tokenizer,
                search.load_embedder(device=device, precision=precision, compare=compare),
            )
            reranker = search.load_reranker(search.settings.rerank, tokenizer)
            neighbor_search = NeighborSearch(
                search.database, num_query=num_query, num_save=num_save, rerank=reranker
            )
            index = search.index.open(share=True, k=num_query, rescore=search.rescore)
            numbers = numbers_in_database(paths, search.config, search.source)
            samples = RenumberedSamples(DocumentChunks(documents), numbers)
        directory = paths.query / f"{documents.split}_documents"
        shards = cut(directory, documents.num_chunks, search.config.retro_block_size)
        with raise_together():
            if get_rank() == 0:
                _remove_others(directory, {shard.path.name for shard in shards})
        query_split(
            neighbor_search,
            SampleChunks(samples, documents.chunk_length, embedder),
            index,
            shards,
            fingerprint,
            f"neighbors of {documents.split} documents",
        )
    return SavedNeighbors(directory, len(search.database), search.database.removed)


def _fingerprint(
    search: ProjectSearch,
    documents: HeldOutDocuments,
    num_save: int,
    num_query: int,
    precision: Precision,
    in_tokens: bool,
) -> str:
    """Fingerprint of the inputs of the documents' neighbors."""
    settings, rerank = search.source_settings, search.settings.rerank
    breadth = search.num_candidates(search.settings.num_neighbors_query)
    usual = breadth == search.num_candidates(None)
    return fingerprint_of(
        {
            "inputs": search.token_digests() | search.database_digests(search.rescore),
            "documents": [documents.corpus.tolist(), documents.number.tolist()],
            "chunk_length": documents.chunk_length,
            "num_save": num_save,
            "search": [settings.embedder, settings.nprobe, settings.ef_search]
            + ([rerank] if rerank else [])
            + (["rescore"] if search.rescore else []),
            **({} if usual else {"num_query": num_query}),
            **({} if precision == "fp32" else {"precision": precision}),
            **({"batches": "tokens"} if in_tokens else {}),
        }
    )


def _remove_others(directory: Path, names: set[str]) -> None:
    """Remove files for a different number of chunks, which would be read together with these."""
    for path in [*directory.glob("*.hdf5*"), *directory.glob("distances/*.hdf5*")]:
        if path.name.removesuffix(".done") not in names:
            path.unlink()


def chunk_bytes(documents: HeldOutDocuments, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Count the UTF-8 bytes of each chunk's text, i64 [chunks].

    A document's first token is excluded, since it has no context. So a document's bytes add up to
    its text without that token. The work is divided among all ranks.
    """
    first_rows = documents.first_rows
    counts = np.zeros(documents.num_chunks, np.int64)
    for document in range(get_rank(), len(documents), get_world_size()):
        rows = slice(first_rows[document], first_rows[document + 1])
        counts[rows] = _bytes_of_chunks(
            documents.tokens(document).tolist(), documents.chunk_length, tokenizer
        )
    return sum_over_world(counts)


def _bytes_of_chunks(tokens: list[int], chunk_length: int, tokenizer: Tokenizer) -> list[int]:
    starts = [max(start, 1) for start in range(0, len(tokens), chunk_length)]
    ends = [*starts[1:], len(tokens)]
    contexts = [max(0, start - _DECODING_CONTEXT) for start in starts]
    # A character that is cut in two counts as a three-byte mark at the end of one piece and again
    # at the beginning of the next. There the mark in the context cancels it.
    before = tokenizer.detokenize_batch(
        [tokens[a:b] for a, b in zip(contexts, starts, strict=True)]
    )
    whole = tokenizer.detokenize_batch([tokens[a:b] for a, b in zip(contexts, ends, strict=True)])
    return [len(w.encode()) - len(b.encode()) for w, b in zip(whole, before, strict=True)]
