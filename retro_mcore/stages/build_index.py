"""`build_index`: embed the chunk database and index it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro

from retro_mcore.cli.command import print_summary
from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import (
    barrier,
    broadcast_object,
    get_rank,
    get_world_size,
    initialize,
    raise_together,
)
from retro_mcore.errors import ConfigurationError, CorruptFileError
from retro_mcore.platform import setup_device
from retro_mcore.project.arrays import save_array
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import (
    FileState,
    fingerprint_of,
    read_marker,
    signed_write,
    state_of,
)
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import check_stage, finish_stage, input_digests
from retro_mcore.project.shards import Shard, ShardReport, Share, cut
from retro_mcore.retrieval.chunk_text import DocumentEnds, chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.database_build import read_dataset_infos
from retro_mcore.retrieval.embedders.base import (
    DEFAULT_EMBEDDER,
    LEXICAL_EMBEDDER,
    Embedder,
    build_embedder,
)
from retro_mcore.retrieval.embedders.lexical import count_texts, weights_of
from retro_mcore.retrieval.embedders.megatron_bert import register as register_megatron_bert
from retro_mcore.retrieval.index import (
    AUTO,
    IndexChoice,
    Recall,
    embed_database,
    embed_held_out,
    parse_bytes,
)
from retro_mcore.retrieval.index.build import IndexBuild, read_recall
from retro_mcore.retrieval.index.embeddings import count_embedded
from retro_mcore.retrieval.index.gpu import num_gpus
from retro_mcore.retrieval.index.inherited import Growth
from retro_mcore.retrieval.vectors import EmbeddingCounts

STAGE = "build_index"
Step = Literal["embed", "train", "add", "merge"]
STEPS: tuple[Step, ...] = ("embed", "train", "add", "merge")
#: Steps that jobs of an array share.
_SHARED_STEPS = ("embed", "add")
#: Chunks that the lexical embedder takes the rarity of words from.
_WEIGHED_CHUNKS = 200_000
#: Training a large index keeps the other ranks waiting.
_TIMEOUT_MINUTES = 24 * 60.0


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
    index: Annotated[str, tyro.conf.arg(aliases=("--index-str",))] = AUTO
    """Faiss factory string, or "auto": the most exact that fits the memory and reaches the
    recall."""
    index_memory: str | None = None
    """Memory that the index may take when it is searched, such as 24G (default: three quarters of
    this machine's). A named index that takes more stays on the disk."""
    index_recall: float = 0.95
    """Recall@2 wanted, against exact search: decides nprobe, efSearch and the automatic index."""
    nprobe: int | None = None
    """Lists to search per query (default: measured)."""
    ef_search: int | None = None
    """Breadth of graph searches (default: measured)."""
    on_disk: bool = False
    """Keep the lists in a file that is searched where it lies; auto then compresses nothing."""
    split_index: bool = False
    """Leave the index in parts, which the ranks of query_neighbors share."""
    faiss_gpu: bool = True
    """Use the GPUs where Faiss has any."""
    stage: Step | None = None
    """Do one step only (default: all)."""
    shard: str | None = None
    """I/N: do the I-th of N shares of --stage embed or add, as one job of an array."""
    device: str = "auto"
    """Where the embedder runs: auto, cpu or cuda."""
    verify: bool = False
    """Compare the checksums of all files that are read, however large; else of 8 GiB a process."""


@dataclass(frozen=True)
class BuiltIndex:
    """What `build_index` made or found; None where another step or job makes it."""

    choice: IndexChoice | None
    embeddings: ShardReport | None
    parts: ShardReport | None
    recall: Recall | None
    reused: bool


def build_index(options: BuildIndexOptions) -> BuiltIndex:
    """Fill index/ of a project.

    Raises:
        ProjectError: build_db or an earlier step has not run, the index was built with other
            options, another run works on the project, or the disk is full.
        ConfigurationError: the embedder or the index string cannot work, or no index reaches the
            recall in the memory.
        CorruptFileError: the database is damaged.
    """
    initialize(timeout_minutes=_TIMEOUT_MINUTES)
    with raise_together():
        _check_options(options)
    job = None
    if options.shard is not None:
        job = f"{options.stage}-{options.shard.replace('/', '-of-')}"
    with stage_lock(ProjectPaths(options.project_dir), STAGE, job=job):
        return _Run(options).run()


def _check_options(options: BuildIndexOptions) -> None:
    for flag in ("embed_batch_size", "nprobe", "ef_search"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{flag.replace('_', '-')}", str(value), "Give at least 1")
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError("--device", options.device, "Choose auto, cpu or cuda")
    if options.stage not in (None, *STEPS):
        raise ConfigurationError("--stage", str(options.stage), f"Choose {', '.join(STEPS)}")
    if options.shard is not None:
        Share.parse(options.shard)
        if options.stage not in _SHARED_STEPS:
            raise ConfigurationError(
                "--shard", f"{options.shard} of --stage {options.stage}", "Only embed and add share"
            )
    if not 0 < options.index_recall <= 1:
        raise ConfigurationError("--index-recall", str(options.index_recall), "Give 0 < r <= 1")
    if options.split_index and options.on_disk:
        raise ConfigurationError("--split-index", "with --on-disk", "Give one: parts are mapped")


class _Run:
    """One run of the command: the project as it was asked to be built."""

    def __init__(self, options: BuildIndexOptions) -> None:
        self.options = options
        self.steps = STEPS if options.stage is None else (options.stage,)
        self.share = None if options.shard is None else Share.parse(options.shard)
        self._max_tokens: int | None = None
        with raise_together():
            self._open()

    def _open(self) -> None:
        options = self.options
        self.paths = ProjectPaths(options.project_dir)
        self.config = ProjectConfig.load(self.paths.root)
        self.database = ChunkDatabase.open(self.paths.root, own=True)
        self.settings = ProjectSettings.load(self.paths.root)
        infos = read_dataset_infos(self.paths)
        if sum(info.n_chunks_train for info in infos) != len(self.database):
            raise CorruptFileError(
                self.paths.dataset_infos,
                f"counts other chunks than the {len(self.database)} of {self.database.path.name}",
                f"Run build_db --project-dir {self.paths.root} again",
            )
        files = [self.paths.merged_db("train"), self.paths.dataset_infos]
        self.inputs = input_digests(self.paths, files)
        embed_options = self._embed_options()
        self.stage_options = {**embed_options, **self._index_options()}
        shards = cut(
            self.paths.embeddings,
            len(self.database),
            self.config.retro_block_size,
            self.settings.growth,
        )
        self._choose_document_ends(shards, [embed_options, self.inputs])
        growth = Growth.of(self.paths, self.settings)
        if growth and not growth.embedded_with(embed_options):
            growth = None
        if growth and get_rank() == 0 and "embed" in self.steps and self.share is None:
            growth.take_over_embeddings(shards, self.embed_fingerprint)
        string = self.settings.index_string if options.index == AUTO else options.index
        fingerprint = check_stage(
            self.paths,
            STAGE,
            self.stage_options,
            self.inputs,
            self.paths.added_index(string or "none"),
        )
        self.index = IndexBuild(
            self.paths,
            shards,
            self.config.retro_block_size,
            self.embed_fingerprint,
            fingerprint,
            options.index,
            parse_bytes("--index-memory", options.index_memory) if options.index_memory else None,
            options.index_recall,
            options.nprobe,
            options.ef_search,
            options.on_disk,
            options.split_index,
            options.faiss_gpu and num_gpus() > 0,
            growth.take_over_training if growth else None,
        )

    def _choose_document_ends(self, shards: Sequence[Shard], made_from: list[Any]) -> None:
        """Megatron's way, but for a project that was indexed, or begun, before there were two."""
        before = fingerprint_of(made_from)
        self._document_ends: DocumentEnds = "detokenized"
        if self.settings.embedder is not None:
            self._document_ends = self.settings.document_ends
        elif any((read_marker(shard.path) or {}).get("fingerprint") == before for shard in shards):
            self._document_ends = "line break"
        ends = self._document_ends
        # The line break of earlier versions is not named, so that their files are as they were.
        named = [] if ends == "line break" else [ends]
        self.embed_fingerprint = fingerprint_of([*made_from, *named])

    def _embed_options(self) -> dict[str, Any]:
        options = self.options
        return {
            "--embedder": options.embedder,
            "--embed-batch-size": options.embed_batch_size,
            "retro_block_size": self.config.retro_block_size,
            # Only where they are set: projects made before they existed go on.
            **({"--embedder-pooling": pooling} if (pooling := options.embedder_pooling) else {}),
            **({"--embed-fp16": True} if options.embed_fp16 else {}),
        }

    def _index_options(self) -> dict[str, Any]:
        options = self.options
        flags = ("nprobe", "ef_search", "index_memory", "index_recall", "on_disk", "split_index")
        # Only where they are set: projects made before they existed go on.
        changed = {flag: getattr(options, flag) for flag in ("index", *flags)}
        defaults = {field.name: field.default for field in fields(options)}
        return {
            f"--{flag.replace('_', '-')}": value
            for flag, value in changed.items()
            if value != defaults[flag]
        }

    def run(self) -> BuiltIndex:
        """Do the steps; rank 0 tells of them."""
        embedded = self._embed() if "embed" in self.steps else None
        reused, added, recall = True, None, None
        if self.steps != ("embed",) and not self.index.is_complete():
            reused = False
            if "train" in self.steps:
                self.index.train()
            if "add" in self.steps:
                added = self.index.add(self.share)
            if "merge" in self.steps:
                recall = self.index.merge()
        choice = self.index.choice
        if "merge" in self.steps:
            assert choice is not None
            recall = recall or read_recall(self.paths, choice.string)
            with raise_together():
                if get_rank() == 0:
                    self._finish(choice, recall)
            barrier()
        self._tell(choice, embedded, added, recall, reused)
        return BuiltIndex(choice, embedded, added, recall, reused)

    def _embed(self) -> ShardReport:
        """Embeddings of the database, and of the queries that recall is measured with."""
        with raise_together():
            device = setup_device(self.options.device)  # type: ignore[arg-type]
            register_megatron_bert()
            tokenizer = load_project_tokenizer(self.config, self.paths)
        if self.options.embedder == LEXICAL_EMBEDDER:
            _weigh_words(
                self.database, tokenizer, self.paths.lexical_weights, self.embed_fingerprint
            )
        with raise_together():
            embedder = self._embedder(str(device))
            self._max_tokens = embedder.max_tokens
        shards = self.index.embedding_shards
        report = embed_database(
            self.database,
            tokenizer,
            embedder,
            self.share.of(shards) if self.share else shards,
            self.embed_fingerprint,
            self._document_ends,
        )
        with raise_together():
            if get_rank() == 0 and (self.share is None or self.share.index == 0):
                self._embed_held_out(tokenizer, embedder)
        return report

    def _embedder(self, device: str) -> Embedder:
        return build_embedder(
            self.options.embedder,
            self.options.embed_batch_size,
            device,
            self.options.embedder_pooling,
            self.options.embed_fp16,
            self.paths.lexical_weights,
        )

    def _embed_held_out(self, tokenizer: Tokenizer, embedder: Embedder) -> None:
        held_out = None
        if self.paths.merged_db("valid").is_file():
            held_out = ChunkDatabase.open(self.paths.root, "valid", own=True)
        embed_held_out(
            self.database,
            held_out,
            tokenizer,
            embedder,
            self.paths.held_out,
            self.embed_fingerprint,
            self._document_ends,
        )

    def _finish(self, choice: IndexChoice, recall: Recall) -> None:
        settings = self.settings
        settings.document_ends = self._document_ends
        settings.embedder = self.options.embedder
        settings.embedder_pooling = self.options.embedder_pooling
        settings.embedding_dimension = self.index.embeddings.dimension
        settings.index_string, settings.index_split = choice.string, self.options.split_index
        settings.nprobe, settings.ef_search = recall.nprobe, recall.ef_search
        settings.save(self.paths.root)
        counts = count_embedded(self.index.embedding_shards)
        report = asdict(counts) if counts.chunks else None
        finish_stage(self.paths, STAGE, self.stage_options, self.inputs, report)

    def _losses(self) -> dict[str, object]:
        shards = self.index.embedding_shards
        return told_losses(
            count_embedded(self.share.of(shards) if self.share else shards), self._max_tokens
        )

    def _tell(
        self,
        choice: IndexChoice | None,
        embedded: ShardReport | None,
        added: ShardReport | None,
        recall: Recall | None,
        reused: bool,
    ) -> None:
        rows: dict[str, object] = {"embedder": self.options.embedder}
        if embedded is not None:
            rows["embeddings"] = f"{len(self.database)} chunks in files {embedded}"
            rows |= self._losses()
        if choice is not None:
            rows["index"] = f"{choice.string}: {choice.reason}{' (reused)' if reused else ''}"
        if added is not None:
            rows["parts"] = f"{added}"
        if recall is not None:
            where = " on the disk" if choice is not None and choice.on_disk else ""
            where = " in parts" if self.options.split_index else where
            rows["search"] = _breadth(recall) + where
            rows["recall against exact search"] = _show_recall(recall, self.options.index_recall)
        title = STAGE if self.options.stage is None else f"{STAGE} --stage {self.options.stage}"
        print_summary(title + (f" --shard {self.options.shard}" if self.share else ""), rows)


def told_losses(counts: EmbeddingCounts, max_tokens: int | None = None) -> dict[str, object]:
    """Rows of a summary: what the embedder could not take as it was."""
    reads = f"; the embedder reads {max_tokens} tokens" if max_tokens else ""
    rows: dict[str, object] = {}
    if counts.chunks_cut:
        rows["cut by the embedder"] = (
            f"{counts.told}{reads}. Use an --embedder that reads more, or smaller chunks "
            "(preprocess_corpus --retro-chunk-length)"
        )
    if counts.in_full:
        rows["beyond half precision"] = f"{counts.in_full} texts, embedded in single precision"
    if counts.zero:
        rows["vectors of zeros"] = f"{counts.zero} of {counts.chunks}: nothing to embed in them"
    return rows


def _breadth(recall: Recall) -> str:
    named = (("nprobe", recall.nprobe), ("efSearch", recall.ef_search))
    told = ", ".join(f"{name} {value}" for name, value in named if value is not None)
    return told or "exhaustive"


def _show_recall(recall: Recall, wanted: float) -> str:
    shares = ", ".join(f"@{k} {value:.3f}" for k, value in recall.at.items())
    missed = "" if recall.decisive >= wanted else f", below the {wanted} wanted"
    queries = f"{recall.num_queries} queries, {recall.num_held_out} of held-out documents"
    return f"{shares} ({queries}){missed}"


def _weigh_words(
    database: ChunkDatabase, tokenizer: Tokenizer, path: Path, fingerprint: str
) -> None:
    """Save how rare words are, from evenly spaced chunks of the database; all ranks count."""
    with raise_together():
        weighed = get_rank() == 0 and state_of(path, fingerprint) is FileState.COMPLETE
    if broadcast_object(weighed):
        return
    count = min(len(database), _WEIGHED_CHUNKS)
    rows = np.linspace(0, len(database) - 1, count).astype(np.int64)
    batches = np.array_split(rows, math.ceil(count / 1024))[get_rank() :: get_world_size()]
    texts = (text for ids in batches for text in chunk_texts(tokenizer, database.tokens(ids)))
    with raise_together():
        counts = torch.from_numpy(count_texts(texts))
    dist.all_reduce(counts)
    with raise_together():
        if get_rank() == 0:
            with signed_write(path, fingerprint) as temporary:
                save_array(temporary, weights_of(counts.numpy()))
