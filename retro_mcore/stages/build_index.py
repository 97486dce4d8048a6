"""Embed a project's chunk database and build its index."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from retro_mcore.distributed import barrier, broadcast_object, get_rank, initialize, raise_together
from retro_mcore.errors import (
    ConfigurationError,
    CorruptFileError,
    ProjectError,
    flag_of,
    raise_problems,
    too_small,
)
from retro_mcore.platform import is_cpu_in_use
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.integrity import verifying
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import (
    check_stage,
    finish_stage,
    input_digests,
    recorded_inputs,
    recorded_options,
)
from retro_mcore.project.shards import ShardReport, Share
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.dataset_infos import read_dataset_infos
from retro_mcore.retrieval.embedders import default_batch_tokens, default_precision
from retro_mcore.retrieval.embedders.base import DEFAULT_EMBEDDER
from retro_mcore.retrieval.index import AUTO, IndexChoice, Recall, parse_bytes
from retro_mcore.retrieval.index.build import IndexBuild, IndexOptions, read_recall
from retro_mcore.retrieval.index.compacted import CompactedIndex
from retro_mcore.retrieval.index.embeddings import EmbeddingFiles, count_embedded
from retro_mcore.retrieval.index.gpu import num_gpus
from retro_mcore.retrieval.index.inherited import InheritedIndex
from retro_mcore.retrieval.stored_types import StoredType
from retro_mcore.stages.configuration import Project, project_paths, recorded_config
from retro_mcore.stages.cut_chunks import warn_of_cut_chunks
from retro_mcore.stages.database_embedding import (
    DatabaseEmbedding,
    EmbeddedDatabase,
    EmbedderOptions,
)
from retro_mcore.stages.embedding_choice import (
    Automatic,
    Batches,
    Wanted,
    WantedPrecision,
    explicit_precision,
    refuse_unused_batches,
)
from retro_mcore.time_limit import DataTimeLimit

STAGE = "build_index"
Step = Literal["embed", "train", "add", "merge"]
STEPS: tuple[Step, ...] = ("embed", "train", "add", "merge")
#: Steps that can be divided among array jobs.
_SHARED_STEPS = ("embed", "add")
_LEAST = {"embed_batch_size": 1, "embed_batch_tokens": 1, "nprobe": 1, "ef_search": 1}
#: Options of the index that are recorded only if they differ from the default, so that projects
#: built before an option existed remain valid.
_RECORDED = (
    "index", "nprobe", "ef_search", "index_memory", "index_recall", "on_disk", "split_index",
    "rescore",
)  # fmt: skip


@dataclass(kw_only=True)
class BuildIndexConfig(DataTimeLimit):
    """Configuration of `build_index`."""

    embedder: str = DEFAULT_EMBEDDER
    """Embedder: "minilm" (an installed package), "static" (means of token vectors, from the package
    wordllama), "lexical" (hashed words, no model), the folder of a sentence-transformers, Hugging
    Face or model2vec model or of a Megatron BERT checkpoint, or a hub name."""
    embedder_pooling: Literal["mean", "cls"] | None = None
    """Pooling of a Hugging Face model (default: the model's own, otherwise mean)."""
    embed_precision: WantedPrecision = "auto"
    """Precision of the embedder: fp32; fp16 (GPU); bf16 (GPU, or a processor with AMX or
    AVX512-BF16); int8 (CPU with ONNX Runtime; faster only with VNNI or AMX); or auto: as the
    project was begun, and for a new one with aligned samples bf16 on a GPU or on a CPU with AMX or
    AVX512-BF16, fp16 on a GPU without bf16, otherwise fp32. Recorded in the project."""
    embed_fp16: bool = False
    """The same as --embed-precision fp16."""
    embed_batch_size: int | None = None
    """Chunks per forward pass of the embedder (default: as the project was begun; in a new one with
    aligned samples, for an encoder, --embed-batch-tokens 1024 on a CPU and 16384 on a GPU, else
    16). "static" and "lexical" have none."""
    embed_batch_tokens: int | None = None
    """Tokens per forward pass of the embedder, padding included, instead of a number of chunks."""
    embeddings_dtype: StoredType | None = None
    """Type that embeddings are stored in: fp16, or fp32 for exchange with other programs (default:
    as the project was begun; in a new one fp16, if its samples are aligned)."""
    index: str = AUTO
    """Faiss factory string, or "auto": the most exact index that fits into memory and reaches the
    recall."""
    index_memory: str | None = None
    """Memory that the index may take when it is searched, such as 24G (default: three quarters of
    this machine's memory). A named index that needs more stays on disk."""
    index_recall: float = 0.95
    """Target recall@2, relative to exact search. Determines nprobe, efSearch and the automatic
    index."""
    nprobe: int | None = None
    """Lists to search per query (default: measured)."""
    ef_search: int | None = None
    """Breadth of graph searches, Faiss's efSearch (default: measured)."""
    on_disk: bool = False
    """Keep the lists in a file that is searched on disk. The automatic index then does not compress
    vectors."""
    split_index: bool = False
    """Keep the index in parts, which are divided among the ranks of query_neighbors."""
    rescore: bool = False
    """Choose and measure the index for candidates that query_neighbors sorts by the stored vectors,
    which it then does by default. Much smaller indexes reach the recall; "auto" takes the one that
    is scanned fastest."""
    faiss_gpu: bool = True
    """Use GPUs if Faiss supports them."""
    stage: Step | None = None
    """Run only one step (default: all)."""
    shard: str | None = None
    """Part of --stage embed or add to run, as I/N: the I-th of N array jobs."""
    device: str = "auto"
    """Device of the embedder: auto, cpu or cuda."""
    verify: bool = False
    """Verify the checksums of all files that are read, however large (default: up to 8 GiB per
    process)."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps to run."""
        return STEPS if self.stage is None else (self.stage,)

    @property
    def share(self) -> Share | None:
        """This job's share of a step; None: all of it."""
        return None if self.shard is None else Share.parse(self.shard)


@dataclass(frozen=True)
class BuildIndexReport:
    """The result of `run`.

    Attributes:
        config: The configuration of the run.
        choice: The chosen index; None before the step "train".
        embedded: Result of the step "embed"; None if it did not run.
        parts: Files of the step "add"; None if it did not run.
        recall: The measured recall; None before the step "merge".
        reused: Whether the index was complete already.
    """

    config: BuildIndexConfig
    choice: IndexChoice | None
    embedded: EmbeddedDatabase | None
    parts: ShardReport | None
    recall: Recall | None
    reused: bool

    @property
    def embeddings(self) -> ShardReport | None:
        """Files of the step "embed"; None if it did not run."""
        return self.embedded.files if self.embedded else None


def run(project: Project, config: BuildIndexConfig) -> BuildIndexReport:
    """Build index/ of a project, or one step of it, on all ranks together.

    Args:
        project: Project directory, after build_db.
        config: Configuration of this stage.

    Raises:
        ProjectError: build_db or an earlier step has not run, the index was built with other
            options, another run works on the project, or the disk is full.
        ConfigurationError: the embedder or the index string is unusable, or no index reaches the
            recall in the memory.
        CorruptFileError: the database is damaged.
    """
    initialize(
        timeout_minutes=config.distributed_timeout_minutes,
        stall_minutes=config.stall_timeout_minutes,
    )
    with raise_together():
        _check(config)
        # Rank 0 alone asks a hub.
        automatic = _automatic(config) if get_rank() == 0 else Automatic()
    automatic = broadcast_object(automatic)  # type: ignore[assignment]
    paths = project_paths(project)
    job = None
    if config.shard is not None:
        job = f"{config.stage}-{config.shard.replace('/', '-of-')}"
    with stage_lock(paths, STAGE, job=job), verifying(config.verify):
        with raise_together():
            stage = _Run(paths, config, automatic)
        return stage.run()


def _automatic(config: BuildIndexConfig) -> Automatic:
    device = "cpu" if config.device == "auto" and is_cpu_in_use() else config.device
    batches = Batches(tokens=default_batch_tokens(config.embedder, device))
    asked = explicit_precision(config.embed_precision, config.embed_fp16)
    return Automatic(asked or default_precision(config.embedder, device), batches)


def _check(config: BuildIndexConfig) -> None:
    raise_problems(list(too_small(config, _LEAST)))
    explicit_precision(config.embed_precision, config.embed_fp16)
    if config.embeddings_dtype not in (None, "fp16", "fp32"):
        found = str(config.embeddings_dtype)
        raise ConfigurationError("--embeddings-dtype", found, "Choose fp16 or fp32")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError("--device", config.device, "Choose auto, cpu or cuda")
    if config.stage not in (None, *STEPS):
        raise ConfigurationError("--stage", str(config.stage), f"Choose {', '.join(STEPS)}")
    if config.share is not None and config.stage not in _SHARED_STEPS:
        raise ConfigurationError(
            "--shard",
            f"{config.shard} of --stage {config.stage}",
            "Only embed and add can be sharded",
        )
    if not 0 < config.index_recall <= 1:
        raise ConfigurationError("--index-recall", str(config.index_recall), "Give 0 < r <= 1")
    if config.split_index and config.on_disk:
        raise ConfigurationError("--split-index", "with --on-disk", "Give one: parts are mapped")


class _Run:
    """One run of the stage on one project."""

    def __init__(self, paths: ProjectPaths, config: BuildIndexConfig, automatic: Automatic) -> None:
        self._paths, self._config = paths, config
        project = ProjectConfig.load(paths.root)
        database = ChunkDatabase.open(paths.root, own=True)
        self._settings = ProjectSettings.load(paths.root)
        self._refuse_unread()
        _check_counts(paths, database)
        if not (self._settings.grown_from or self._settings.compacted_from):
            _check_batches(config, Batches.recorded(recorded_options(paths, STAGE)))
        files = [paths.merged_db("train"), paths.dataset_infos]
        self._inputs = input_digests(paths, files)
        self._embedding = _database_embedding(
            paths, project, self._settings, database, config, automatic, self._inputs
        )
        self._options = {**self._embedding.options, **_index_options(config)}
        inherited = self._inherit(self._embedding.options)
        self._build = IndexBuild(
            paths,
            self._embedding.embedded,
            block_size=project.retro_block_size,
            fingerprint=self._check_stage(),
            wanted=_wanted_index(config),
            inherited=inherited,
            growth=self._settings.growth,
        )

    def _refuse_unread(self) -> None:
        """Reject a breadth of search that the named index does not have.

        Earlier versions ignored it; what they finished goes on.
        """
        if recorded_options(self._paths, STAGE):
            return
        config, problems = self._config, []
        for name, kinds, what in (
            ("nprobe", ("IVF", "IMI"), "lists"),
            ("ef_search", ("HNSW", "NSG"), "graph"),
        ):
            has = config.index == AUTO or any(kind in config.index for kind in kinds)
            if getattr(config, name) is not None and not has:
                found = f"given with --index {config.index}, which has no {what}"
                problems.append(ConfigurationError(flag_of(name), found, "Leave it out"))
        lists = re.search(r"IVF(\d+)(?![\dkM])", config.index)
        if config.nprobe is not None and lists and config.nprobe > int(lists[1]):
            found = f"{config.nprobe} with --index {config.index}, which has fewer lists"
            problems.append(ConfigurationError("--nprobe", found, f"Give at most {lists[1]}"))
        raise_problems(problems)

    def _inherit(self, embedding_options: dict[str, Any]) -> InheritedIndex | None:
        """The index of the project that this one was extended from; its embeddings are linked."""
        inherited = _inherited(self._paths, self._settings)
        if inherited is None or not inherited.embedded_with(embedding_options):
            return None
        config, embedded = self._config, self._embedding.embedded
        if get_rank() == 0 and "embed" in config.steps and config.share is None:
            inherited.link_embeddings(embedded.shards, embedded.fingerprint)
        return inherited

    def _check_stage(self) -> str:
        index = self._config.index
        string = self._settings.index_string if index == AUTO else index
        output = self._paths.added_index(string or "none")
        return check_stage(self._paths, STAGE, self._options, self._inputs, output)

    def run(self) -> BuildIndexReport:
        """Run the steps."""
        config, build, embedded = self._config, self._build, None
        if "embed" in config.steps:
            inherited = self._build.inherited
            if isinstance(inherited, CompactedIndex) and config.share is None:
                files = self._embedding.embedded
                dtype = self._embedding.embedded_as.dtype
                inherited.copy_embeddings(files.shards, files.fingerprint, dtype)
            embedded = self._embedding.run(_embedder_options(config), config.share)
            warn_of_cut_chunks(STAGE, {"database": embedded.counts}, embedded.max_tokens)
        reused, parts, recall = True, None, None
        if config.steps != ("embed",) and not build.is_complete():
            reused = False
            if "train" in config.steps:
                build.train()
            if "add" in config.steps:
                parts = build.add(config.share)
            if "merge" in config.steps:
                recall = build.merge()
        if "merge" in config.steps:
            recall = self._finish(recall, reused)
        return BuildIndexReport(config, build.choice, embedded, parts, recall, reused)

    def _finish(self, recall: Recall | None, reused: bool) -> Recall:
        """Record the index in the project; all ranks call it. Returns its recall."""
        choice = self._build.choice
        assert choice is not None
        recall = recall or read_recall(self._paths, choice.string)
        with raise_together():
            if get_rank() == 0:
                if not reused or not recorded_options(self._paths, STAGE):
                    self._settings.index_faiss_gpu = self._config.faiss_gpu
                self._save_settings(choice, recall)
                counts = count_embedded(self._embedding.embedded.shards)
                report = asdict(counts) if counts.chunks else None
                finish_stage(self._paths, STAGE, self._options, self._inputs, report)
        barrier()
        return recall

    def _save_settings(self, choice: IndexChoice, recall: Recall) -> None:
        settings, config = self._settings, self._config
        embedded_as = self._embedding.embedded_as
        settings.document_ends = embedded_as.document_ends
        settings.embed_precision = embedded_as.precision
        settings.embeddings_dtype = embedded_as.dtype
        settings.embedder = config.embedder
        settings.embedder_pooling = config.embedder_pooling
        settings.embedder_digests = self._embedding.digests
        settings.embedding_dimension = self._build.embeddings.dimension
        settings.index_string, settings.index_split = choice.string, config.split_index
        settings.nprobe, settings.ef_search = recall.nprobe, recall.ef_search
        settings.index_rescored = config.rescore
        settings.save(self._paths.root)


def _inherited(paths: ProjectPaths, settings: ProjectSettings) -> InheritedIndex | None:
    """What a project takes over from the one that its database was made from; None: nothing."""
    if settings.compacted_from:
        return CompactedIndex(paths, settings)
    return InheritedIndex.of(paths, settings)


def stored_embeddings(paths: ProjectPaths) -> EmbeddingFiles:
    """The files of the vectors that a project's finished index was built from.

    Raises:
        ProjectError: build_index has not finished, or the database is missing.
    """
    config = recorded_config(paths, STAGE, BuildIndexConfig)
    if config is None:
        record = paths.stage_record(STAGE)
        raise ProjectError(record, "no such file", f"Run build_index --project-dir {paths.root}")
    project, settings = ProjectConfig.load(paths.root), ProjectSettings.load(paths.root)
    database = ChunkDatabase.open(paths.root, own=True)
    inputs = recorded_inputs(paths, STAGE)
    # The project says how it was embedded, so what is automatic is not used.
    made_as = _database_embedding(paths, project, settings, database, config, Automatic(), inputs)
    return made_as.embedded


def _check_batches(config: BuildIndexConfig, recorded: Batches | None) -> None:
    given = Batches.of(config.embed_batch_size, config.embed_batch_tokens)
    refuse_unused_batches(config.embedder, given, recorded)


def _check_counts(paths: ProjectPaths, database: ChunkDatabase) -> None:
    infos = read_dataset_infos(paths)
    if sum(info.n_chunks_train for info in infos) != len(database):
        raise CorruptFileError(
            paths.dataset_infos,
            f"counts other chunks than the {len(database)} of {database.path.name}",
            f"Run build_db --project-dir {paths.root} again",
        )


def _database_embedding(
    paths: ProjectPaths,
    project: ProjectConfig,
    settings: ProjectSettings,
    database: ChunkDatabase,
    config: BuildIndexConfig,
    automatic: Automatic,
    inputs: dict[str, str],
) -> DatabaseEmbedding:
    precision = explicit_precision(config.embed_precision, config.embed_fp16)
    batches = Batches.of(config.embed_batch_size, config.embed_batch_tokens)
    wanted = Wanted(precision, config.embeddings_dtype, batches, automatic)
    options = _embedding_options(config, project)
    return DatabaseEmbedding(paths, project, settings, database, wanted, options, inputs)


def _embedding_options(config: BuildIndexConfig, project: ProjectConfig) -> dict[str, Any]:
    """The options that the embeddings depend on, by flag; see `EmbeddedAs` for the others."""
    return {
        "--embedder": config.embedder,
        "retro_block_size": project.retro_block_size,
        # Only if set, so that projects built before they existed remain valid.
        **({"--embedder-pooling": pooling} if (pooling := config.embedder_pooling) else {}),
    }


def _embedder_options(config: BuildIndexConfig) -> EmbedderOptions:
    return EmbedderOptions(
        name=config.embedder,
        pooling=config.embedder_pooling,
        device=config.device,
    )


def _index_options(config: BuildIndexConfig) -> dict[str, Any]:
    """The options that the index depends on and that differ from the default, by flag."""
    defaults = {field.name: field.default for field in fields(BuildIndexConfig)}
    values = {name: getattr(config, name) for name in _RECORDED}
    return {flag_of(name): value for name, value in values.items() if value != defaults[name]}


def _wanted_index(config: BuildIndexConfig) -> IndexOptions:
    memory = config.index_memory
    return IndexOptions(
        string=config.index,
        memory=parse_bytes("--index-memory", memory) if memory else None,
        recall=config.index_recall,
        nprobe=config.nprobe,
        ef_search=config.ef_search,
        on_disk=config.on_disk,
        split=config.split_index,
        gpu=config.faiss_gpu and num_gpus() > 0,
        rescore=config.rescore,
    )
