"""`build_index`: embed the chunk database and index it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from retro_mcore.cli.command import print_summary, run_command
from retro_mcore.data.database import ChunkDatabase, DatasetInfo
from retro_mcore.data.embedders import DEFAULT_EMBEDDER, LEXICAL_EMBEDDER, build_embedder
from retro_mcore.data.growth import Growth
from retro_mcore.data.index import (
    Embeddings,
    IndexChoice,
    Recall,
    add_to_index,
    choose_index_string,
    embed_database,
    load_index,
    measure_recall,
    save_index,
    stored_bytes,
    train_index,
)
from retro_mcore.data.lexical import bucket_weights
from retro_mcore.data.shards import ShardReport, cut
from retro_mcore.data.text import chunk_texts
from retro_mcore.data.tokenizers import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import (
    barrier,
    broadcast_object,
    get_rank,
    initialize,
    raise_together,
)
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.megatron_bert import register as register_megatron_bert
from retro_mcore.platform import setup_device
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import ProjectConfig, ProjectSettings, read_json_list
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import FileState, fingerprint_of, signed_write, state_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.space import require_space
from retro_mcore.project.stages import check_stage, finish_stage, input_digests

STAGE = "build_index"
#: Chunks that the lexical embedder takes the rarity of words from.
_WEIGHED_CHUNKS = 200_000


@dataclass
class BuildIndexOptions:
    """Embed the chunk database and build the index that neighbors are searched in."""

    project_dir: str
    """Project directory, after build_db."""
    embedder: str = DEFAULT_EMBEDDER
    """"minilm" (an installed package), "lexical" (hashed words, no model), a sentence-transformers
    or Hugging Face model's folder, or its hub name."""
    embedder_pooling: Literal["mean", "cls"] | None = None
    """Pooling of a Hugging Face model (default: as the model says, else mean)."""
    embed_fp16: bool = False
    """Embed in half precision, on a GPU."""
    embed_batch_size: int = 16
    """Chunks per forward pass of the embedder."""
    index_str: str | None = None
    """Faiss factory string (default: from the number of chunks)."""
    nprobe: int | None = None
    """Lists to search per query (default: measured, for a recall@2 of 0.95)."""
    ef_search: int | None = None
    """Breadth of graph searches (default: 256)."""
    device: str = "auto"
    """Where the embedder runs: auto, cpu or cuda."""


@dataclass(frozen=True)
class BuiltIndex:
    """What `build_index` made or found."""

    choice: IndexChoice
    embedded: ShardReport
    recall: Recall
    reused: bool


def build_index(options: BuildIndexOptions) -> BuiltIndex:
    """Build index/ of a project.

    Raises:
        ProjectError: build_db has not run, the index was built with other options, another run
            works on the project, or the disk is full.
        ConfigurationError: the embedder or the index string cannot work.
        CorruptFileError: the database is damaged.
    """
    initialize()
    with stage_lock(ProjectPaths(options.project_dir), STAGE):
        return _embed_and_index(options)


def _embed_and_index(options: BuildIndexOptions) -> BuiltIndex:
    with raise_together():
        for flag in ("embed_batch_size", "nprobe", "ef_search"):
            value = getattr(options, flag)
            if value is not None and value < 1:
                raise ConfigurationError(
                    f"--{flag.replace('_', '-')}", str(value), "Give at least 1"
                )
        if options.device not in ("auto", "cpu", "cuda"):
            raise ConfigurationError("--device", options.device, "Choose auto, cpu or cuda")
        paths = ProjectPaths(options.project_dir)
        config = ProjectConfig.load(paths.root)
        database = ChunkDatabase.open(paths.root, own=True)
        inputs = input_digests(paths, [paths.merged_db("train"), paths.dataset_infos])
        embed_options = {
            "--embedder": options.embedder,
            "--embed-batch-size": options.embed_batch_size,
            "retro_block_size": config.retro_block_size,
            # Only where they are set: projects made before they existed go on.
            **({"--embedder-pooling": pooling} if (pooling := options.embedder_pooling) else {}),
            **({"--embed-fp16": True} if options.embed_fp16 else {}),
        }
        index_options = {
            "--index-str": options.index_str,
            "--nprobe": options.nprobe,
            "--ef-search": options.ef_search,
        }
        stage_options = {**embed_options, **index_options}
        settings = ProjectSettings.load(paths.root)
        device = setup_device(options.device)  # type: ignore[arg-type]
        tokenizer = load_project_tokenizer(config, paths)
        embed_fingerprint = fingerprint_of([embed_options, inputs])
        shards = cut(paths.embeddings, len(database), config.retro_block_size, settings.growth)
        growth = Growth.of(paths, settings)
        if growth and growth.embedded_with(embed_options) and get_rank() == 0:
            growth.take_over_embeddings(shards, embed_fingerprint)
        if options.embedder == LEXICAL_EMBEDDER and get_rank() == 0:
            _weigh_words(database, tokenizer, paths.lexical_weights, embed_fingerprint)
    with raise_together():
        register_megatron_bert()
        embedder = build_embedder(
            options.embedder,
            options.embed_batch_size,
            str(device),
            options.embedder_pooling,
            options.embed_fp16,
            paths.lexical_weights,
        )
        choice = choose_index_string(len(database), embedder.dimension)
        if options.index_str is not None:
            choice = IndexChoice(options.index_str, "as --index-str says")
        added = paths.added_index(choice.string)
        fingerprint = check_stage(paths, STAGE, stage_options, inputs, added)
        if growth and growth.embedded_with(embed_options) and get_rank() == 0:
            growth.take_over_training(choice.string, fingerprint)
    embedded = embed_database(database, tokenizer, embedder, shards, embed_fingerprint)
    outcome: tuple[Recall, bool] | None = None
    with raise_together():
        if get_rank() == 0:
            embeddings = Embeddings(shards)
            reused = _build(choice.string, embeddings, paths, fingerprint)
            index = load_index(added)
            recall = measure_recall(index, embeddings, options.nprobe, options.ef_search)
            report = {**asdict(choice), "num_vectors": len(embeddings), **asdict(recall)}
            write_json(paths.recall_report(choice.string), report)
            settings.embedder = options.embedder
            settings.embedder_pooling = options.embedder_pooling
            settings.embedding_dimension = embedder.dimension
            settings.index_string = choice.string
            settings.nprobe, settings.ef_search = recall.nprobe, recall.ef_search
            settings.save(paths.root)
            finish_stage(paths, STAGE, stage_options, inputs)
            outcome = recall, reused
    barrier()
    recall, reused = broadcast_object(outcome)  # type: ignore[misc]
    rows = {
        "embedder": f"{options.embedder}, dimension {embedder.dimension}",
        "embeddings": f"{len(database)} chunks in files {embedded}",
        "index": f"{choice.string}: {choice.reason}{' (reused)' if reused else ''}",
        "search": ", ".join(
            f"{name} {value}"
            for name, value in (("nprobe", recall.nprobe), ("efSearch", recall.ef_search))
            if value is not None
        )
        or "exhaustive",
        "recall against exact search": ", ".join(
            f"@{k} {value:.3f}" for k, value in recall.at.items()
        )
        + f" ({recall.num_queries} queries)",
    }
    print_summary(STAGE, rows)
    return BuiltIndex(choice, embedded, recall, reused)


def _weigh_words(
    database: ChunkDatabase, tokenizer: Tokenizer, path: Path, fingerprint: str
) -> None:
    """Save how rare words are, from evenly spaced chunks of the database."""
    if state_of(path, fingerprint) is FileState.COMPLETE:
        return
    count = min(len(database), _WEIGHED_CHUNKS)
    rows = np.linspace(0, len(database) - 1, count).astype(np.int64)
    batches = (rows[start : start + 4096] for start in range(0, count, 4096))
    texts = (text for ids in batches for text in chunk_texts(tokenizer, database.tokens(ids)))
    with signed_write(path, fingerprint) as temporary, temporary.open("wb") as file:
        np.save(file, bucket_weights(texts))


def _build(
    index_string: str, embeddings: Embeddings, paths: ProjectPaths, fingerprint: str
) -> bool:
    """Train and fill the index; whether it was there already."""
    empty, added = paths.empty_index(index_string), paths.added_index(index_string)
    if state_of(added, fingerprint) is FileState.COMPLETE:
        return True
    if state_of(empty, fingerprint) is not FileState.COMPLETE:
        trained = train_index(index_string, embeddings, _training_rows(paths))
        with signed_write(empty, fingerprint) as temporary:
            save_index(trained, temporary)
    index = load_index(empty)
    require_space(added, stored_bytes(index, len(embeddings)), "the index's vectors")
    add_to_index(index, embeddings, index_string)
    with signed_write(added, fingerprint) as temporary:
        save_index(index, temporary)
    return False


def _training_rows(paths: ProjectPaths) -> np.ndarray:
    """Rows of train.hdf5 that sampled.hdf5 holds: the first ones of each dataset."""
    rows, start = [], 0
    for values in read_json_list(paths.dataset_infos):
        info = DatasetInfo(**values)
        rows.append(np.arange(start, start + info.n_chunks_sampled))
        start += info.n_chunks_train
    return np.concatenate(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(BuildIndexOptions, build_index, argv)
