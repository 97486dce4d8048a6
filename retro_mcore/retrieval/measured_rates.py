"""Rates for `scale`, measured on this machine with a project's own chunks."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options, stage_report
from retro_mcore.retrieval.bert_tokens import BertTokenCounter
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders import (
    build_embedder,
    default_batch_tokens,
    default_precision,
)
from retro_mcore.retrieval.embedders.base import BATCH_SIZE, DEFAULT_EMBEDDER, Embedder
from retro_mcore.retrieval.embedders.precision import Precision, obstacle
from retro_mcore.retrieval.index.embeddings import write_embeddings
from retro_mcore.retrieval.scale import Rates

logger = logging.getLogger(__name__)

#: Chunks that are tokenized, and of a file that is embedded.
_TOKENIZED, _EMBEDDED = 16_384, 512
#: Chunks embedded before timing starts, and seconds after which no more files are.
_WARM_UP, _ENOUGH = 32, 3.0


def measure_rates(
    project_dir: Path | str, embedder: str | None = None, device: str = "cpu"
) -> tuple[Rates, int]:
    """Measure tokenizing, chunking and embedding on evenly spaced chunks of a project's database.

    Args:
        project_dir: A project, after build_db.
        embedder: Name of the embedder; None: the project's, or minilm before build_index.
        device: Device of the embedder: "cpu", "cuda" …

    Returns:
        Rates per second (defaults for those not measured), and the embedder's dimension. Embedding
        is measured in fp32, with a warning, where this machine lacks the project's precision.

    Raises:
        ProjectError: build_db has not run.
    """
    paths = ProjectConfig.load(project_dir).database_paths(project_dir)
    config, settings = ProjectConfig.load(paths.root), ProjectSettings.load(paths.root)
    database = ChunkDatabase.open(paths.root, own=True)
    tokenizer = load_project_tokenizer(config, paths)
    count = min(_TOKENIZED, len(database))
    ids = np.linspace(0, len(database) - 1, count).astype(int)
    counter = BertTokenCounter(paths.root / str(config.retro_bert_vocab_file))
    together = _chunks_per_document(paths, config.retro_gpt_chunk_length)
    chunked, tokenized = _text_rates(database, ids, tokenizer, counter, together)
    name = embedder or settings.embedder or DEFAULT_EMBEDDER
    own = None if embedder else settings.embed_precision
    precision = _usable_precision(own, device)
    recorded = {} if embedder else recorded_options(paths, "build_index")
    tokens = recorded.get("--embed-batch-tokens")
    if not recorded and settings.samples == "aligned":
        tokens = default_batch_tokens(name, device)
        precision = precision if own else default_precision(name, device)
    built = build_embedder(
        name,
        recorded.get("--embed-batch-size", BATCH_SIZE),
        device=device,
        pooling=None if embedder else settings.embedder_pooling,
        weights=paths.lexical_weights,
        precision=precision,
        batch_tokens=tokens,
    )
    embedded = _embedding_rate(database, tokenizer, built, settings, device)
    rates = Rates(tokenized=tokenized, chunked=chunked, embedded=embedded)
    return rates, built.dimension


def _usable_precision(recorded: Precision | None, device: str) -> Precision:
    lacks = obstacle(recorded, device) if recorded else None
    if lacks is None:
        return recorded or "fp32"
    logger.warning(
        "embedding is measured in fp32: the project's %s does not run %s. "
        "Give --embedder-rate if you know the rate of the machine that embeds",
        recorded,
        lacks,
    )
    return "fp32"


def mean_document_tokens(paths: ProjectPaths) -> float | None:
    """Mean length of a project's documents, without padding; None if another program made it."""
    counts = stage_report(paths, "preprocess_corpus")
    tokens = counts.get("tokens", 0) - counts.get("padding_tokens", 0)
    return tokens / counts["documents"] if counts.get("documents") and tokens else None


def _chunks_per_document(paths: ProjectPaths, chunk_length: int) -> int:
    """Mean length of the project's documents, in chunks."""
    return round((mean_document_tokens(paths) or chunk_length) / chunk_length)


def _text_rates(
    database: ChunkDatabase,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    counter: BertTokenCounter,
    together: int,
) -> tuple[float, float]:
    """Chunks and tokens per second on one core; short texts take longer per token than documents,
    so chunks are tokenized `together`."""
    tokens = [chunk.tolist() for chunk in database.tokens(ids)]
    start = time.process_time()
    texts = tokenizer.detokenize_batch(tokens)
    counter.count(texts)
    chunked = len(ids) / (time.process_time() - start)
    step = max(1, together)
    documents = [" ".join(texts[first : first + step]) for first in range(0, len(texts), step)]
    start = time.process_time()
    tokenized = sum(map(len, tokenizer.tokenize_batch(documents))) / (time.process_time() - start)
    return chunked, tokenized


def _embedding_rate(
    database: ChunkDatabase,
    tokenizer: Tokenizer,
    embedder: Embedder,
    settings: ProjectSettings,
    device: str,
) -> float:
    """Chunks per second of a GPU, or of a core, from the database to files of vectors."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    size = min(_EMBEDDED, len(database))
    starts = np.random.default_rng(0).permutation(np.arange(0, len(database) - size + 1, size))
    made_as = settings.document_ends, settings.embeddings_dtype
    with tempfile.TemporaryDirectory() as folder:
        path, embedded = Path(folder, "vectors.hdf5"), 0
        write_embeddings(database, tokenizer, embedder, range(min(_WARM_UP, size)), path, *made_as)
        begun = clock()
        for start in starts.tolist():
            ids = range(start, start + size)
            write_embeddings(database, tokenizer, embedder, ids, path, *made_as)
            embedded += size
            if clock() - begun > _ENOUGH:
                break
        return embedded / (clock() - begun)
