"""Bits per byte of whole documents, following Borgeaud et al. 2022 (section 3).

Each document is read through overlapping windows. The loss is divided by the bytes of its text, so
models with different tokenizers are comparable. Losses are kept per chunk for the leakage curve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import raise_together
from retro_mcore.evaluation.bootstrap import Estimate, percentile_interval, resampled_ratios
from retro_mcore.evaluation.chunk_losses import ChunkLosses, measure_chunk_losses
from retro_mcore.evaluation.document_rows import saved_document_neighbors
from retro_mcore.evaluation.documents import (
    HeldOutDocuments,
    chunk_bytes,
    search_document_neighbors,
)
from retro_mcore.evaluation.leakage import LeakagePoint, chunk_overlaps, leakage_curve
from retro_mcore.evaluation.neighbor_sources import NeighborKind, NeighborRows, change_neighbors
from retro_mcore.evaluation.results import perplexity_of
from retro_mcore.evaluation.windows import WindowReader, check_stride, plan_windows
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase


@dataclass(frozen=True)
class TextLoss:
    """The part of a measurement for one corpus of the blend."""

    bits_per_byte: float
    loss: float
    perplexity: float
    num_tokens: int
    num_bytes: int
    num_documents: int


@dataclass(frozen=True)
class BitsPerByte:
    """A measurement.

    Attributes:
        split: "valid" or "test".
        neighbors: "real", "shuffled", "random" or "none".
        bits_per_byte: Loss in bits per byte of text.
        loss: Mean loss in nats per token.
        perplexity: exp(loss), per token.
        num_tokens: Number of predicted tokens: all but each document's first.
        num_bytes: Bytes of the text of these tokens.
        num_documents: Number of documents.
        window: Window length in tokens.
        stride: Tokens from one window's start to the next.
        seconds: Wall time.
        corpora: The same for each corpus, by prefix; empty if there is only one.
        num_documents_too_short: Number of skipped documents with fewer than two tokens.
        num_tokens_not_predicted: Number of first tokens, which have no context.
        interval: Bounds of the 95% bootstrap interval over documents; None if not requested.
        differences: Bits per byte minus those with other neighbors, by kind, likewise.
    """

    split: str
    neighbors: NeighborKind
    bits_per_byte: float
    loss: float
    perplexity: float
    num_tokens: int
    num_bytes: int
    num_documents: int
    window: int
    stride: int
    seconds: float
    corpora: dict[str, TextLoss] = field(default_factory=dict)
    num_documents_too_short: int = 0
    num_tokens_not_predicted: int = 0
    interval: tuple[float, float] | None = None
    differences: dict[str, Estimate] | None = None


def summarize(
    documents: HeldOutDocuments,
    chunks: ChunkLosses,
    neighbors: NeighborKind,
    window: int,
    stride: int,
    started: float,
) -> BitsPerByte:
    """Summarize a measurement for all documents and for each corpus.

    Args:
        documents: The documents.
        chunks: Losses of their chunks.
        neighbors: Kind of neighbors that the model read.
        window: Window length in tokens.
        stride: Tokens from one window's start to the next.
        started: `time.perf_counter()` before the measurement.
    """
    of_chunk = documents.corpus[documents.owners]
    corpora = {}
    if len(documents.prefixes) > 1:
        for number, prefix in enumerate(documents.prefixes):
            if (chosen := of_chunk == number).any():
                num_documents = int((documents.corpus == number).sum())
                corpora[prefix] = _text_loss(chunks, chosen, num_documents)
    whole = _text_loss(chunks, np.ones(len(of_chunk), bool), len(documents))
    return BitsPerByte(
        split=documents.split,
        neighbors=neighbors,
        **vars(whole),
        window=window,
        stride=stride,
        seconds=time.perf_counter() - started,
        corpora=corpora,
        num_documents_too_short=documents.num_too_short,
        num_tokens_not_predicted=len(documents),
    )


def _text_loss(chunks: ChunkLosses, chosen: NDArray[np.bool_], num_documents: int) -> TextLoss:
    num_tokens = int(chunks.tokens[chosen].sum())
    loss = float(chunks.losses[chosen].sum()) / max(num_tokens, 1)
    return TextLoss(
        bits_per_byte=chunks.bits_per_byte(chosen),
        loss=loss,
        perplexity=perplexity_of(loss),
        num_tokens=num_tokens,
        num_bytes=int(chunks.bytes[chosen].sum()),
        num_documents=num_documents,
    )


class DocumentEvaluation:
    """Evaluates the documents of one split with several kinds of neighbors.

    All ranks must call its methods together.

    Args:
        documents: The documents.
        tokenizer: The project's tokenizer.
        database: The retrieval database.
        num_neighbors: K.
        num_retrieved_chunks: Chunks per neighbor, including the neighbor itself.
        window: Window length in tokens.
        stride: Tokens from one window's start to the next.
        project_dir: The project.
    """

    def __init__(
        self,
        documents: HeldOutDocuments,
        tokenizer: Tokenizer,
        database: ChunkDatabase,
        *,
        num_neighbors: int,
        num_retrieved_chunks: int,
        window: int,
        stride: int,
        project_dir: Path | str,
    ) -> None:
        check_stride(stride, window, documents.chunk_length)
        self.documents, self.tokenizer, self.database = documents, tokenizer, database
        self.num_neighbors, self.num_retrieved_chunks = num_neighbors, num_retrieved_chunks
        self.window, self.stride, self.project_dir = window, stride, project_dir
        self.windows = plan_windows(documents.lengths.tolist(), window, stride)
        self.losses: dict[str, ChunkLosses] = {}
        self._neighbors: NeighborRows | None = None

    @classmethod
    def open(
        cls,
        project_dir: Path | str,
        split: Literal["valid", "test"],
        *,
        num_neighbors: int = 2,
        num_retrieved_chunks: int = 2,
        stride: int | None = None,
        limit: int | None = None,
    ) -> DocumentEvaluation:
        """Open the documents of a project. Windows have the length of its samples.

        Args:
            project_dir: The project, after build_index.
            split: The split to evaluate.
            num_neighbors: K.
            num_retrieved_chunks: Chunks per neighbor, including the neighbor itself.
            stride: Tokens from one window's start to the next; default: half a window.
            limit: At most this many documents of each corpus.

        Raises:
            ProjectError: a stage has not run, or the split has no documents.
            ConfigurationError: the stride is not a multiple of M, or is longer than a window.
        """
        with raise_together():
            project = ProjectConfig.load(project_dir)
            window, chunk_length = project.retro_gpt_seq_length, project.retro_gpt_chunk_length
            tokenizer = load_project_tokenizer(project, ProjectPaths(project_dir))
            half = max(window // 2 // chunk_length, 1) * chunk_length
            return cls(
                HeldOutDocuments.open(project_dir, split, tokenizer.eod, limit),
                tokenizer,
                ChunkDatabase.open(project_dir),
                num_neighbors=num_neighbors,
                num_retrieved_chunks=num_retrieved_chunks,
                window=window,
                stride=half if stride is None else stride,
                project_dir=project_dir,
            )

    def search_neighbors(self, num_save: int, device: str) -> None:
        """Search the chunks' neighbors, or reuse those of an earlier run.

        See `saved_document_neighbors` and `search_document_neighbors`.
        """
        with raise_together():
            self._neighbors = saved_document_neighbors(self.project_dir, self.documents, num_save)
        if self._neighbors is not None:
            return
        self._neighbors = search_document_neighbors(
            self.project_dir, self.documents, self.tokenizer, num_save, device
        )

    @property
    def searched_owners(self) -> NDArray[np.int64]:
        """Document of each chunk that was searched, i64; `search_neighbors` comes first."""
        assert self._neighbors is not None, "search_neighbors first"
        return self.documents.owners[self._neighbors.searched()]

    @cached_property
    def num_bytes(self) -> NDArray[np.int64]:
        """Bytes of each chunk, i64 [chunks]. All ranks must read this property together."""
        return chunk_bytes(self.documents, self.tokenizer)

    def measure(
        self, model: torch.nn.Module, kind: NeighborKind, batch_size: int, seed: int = 1234
    ) -> BitsPerByte:
        """Measure bits per byte with one kind of neighbors, and keep the chunks' losses.

        Args:
            model: This rank's stage, on its device.
            kind: Kind of neighbors; all but "none" require `search_neighbors` first.
            batch_size: Windows per forward pass.
            seed: Seed of shuffling and random draws.

        Raises:
            ConfigurationError: "shuffled" with a single document.
        """
        started = time.perf_counter()
        self.losses[kind] = measure_chunk_losses(
            model,
            self.reader(kind, seed),
            self.windows,
            num_bytes=self.num_bytes,
            batch_size=batch_size,
            description=f"{self.documents.split} documents, {kind} neighbors",
            vocab_size=self.tokenizer.vocab_size,
        )
        return summarize(self.documents, self.losses[kind], kind, self.window, self.stride, started)

    def reader(self, kind: NeighborKind, seed: int = 1234) -> WindowReader:
        """Reads the windows with one kind of neighbors; see `measure`."""
        given = None
        if kind != "none":
            assert self._neighbors is not None, "search_neighbors first"
            with raise_together():
                owners, size = self.documents.owners, len(self.database)
                removed = self.database.removed
                given = change_neighbors(self._neighbors, kind, owners, size, seed, removed)
        return WindowReader(
            self.documents,
            given,
            self.database,
            self.num_neighbors,
            self.num_retrieved_chunks,
            divisor=_length_divisor(self.documents.chunk_length),
        )

    def with_intervals(
        self, rows: Sequence[BitsPerByte], num_resamples: int, seed: int
    ) -> list[BitsPerByte]:
        """Add bootstrap intervals over documents to measurements.

        Args:
            rows: Results of `measure`, one of each kind.
            num_resamples: Number of resamples of the documents, the same for all kinds.
            seed: Seed of the resampling.
        """
        kinds, number = [row.neighbors for row in rows], len(self.documents)
        owners, chunks = self.documents.owners, [self.losses[kind] for kind in kinds]
        bits = [np.bincount(owners, each.losses / math.log(2), number) for each in chunks]
        num_bytes = np.bincount(owners, self.num_bytes, number).astype(np.float64)
        drawn = dict(
            zip(
                kinds, resampled_ratios(np.array(bits), num_bytes, num_resamples, seed), strict=True
            )
        )
        return [
            replace(
                row,
                interval=percentile_interval(drawn[row.neighbors]),
                differences={
                    other.neighbors: Estimate(
                        row.bits_per_byte - other.bits_per_byte,
                        *percentile_interval(drawn[row.neighbors] - drawn[other.neighbors]),
                    )
                    for other in rows
                    if other is not row
                },
            )
            for row in rows
        ]

    def leakage_curve(self, num_neighbors: int, alphas: Sequence[float]) -> list[LeakagePoint]:
        """Compute the leakage curve of all measurements; see `leakage`.

        Args:
            num_neighbors: Neighbors per chunk used to measure its overlap.
            alphas: Points of the curve.
        """
        assert self._neighbors is not None, "search_neighbors first"
        overlaps = chunk_overlaps(
            self.documents,
            self._neighbors,
            self.database,
            num_neighbors,
            self.num_retrieved_chunks,
        )
        return leakage_curve(overlaps, self.losses, alphas)


def _length_divisor(chunk_length: int) -> int:
    """Divisor of the number of positions, which sequence and context parallelism share out."""
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return tensor_parallel
    return math.lcm(ranks * tensor_parallel, 2 * ranks * chunk_length)
