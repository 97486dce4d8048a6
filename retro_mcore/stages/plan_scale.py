"""Plan a database from flags: with given, published or measured rates."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import numpy as np

from retro_mcore.chunking import SampleLayout
from retro_mcore.data.tokens.token_file import TokenFile, bin_path, idx_path
from retro_mcore.distributed import initialize
from retro_mcore.errors import ConfigurationError, flag_of, raise_problems, too_small
from retro_mcore.platform import choose_device
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.index.breadth import FEWEST_LISTS
from retro_mcore.retrieval.index.choice import MEMORY_SHARE, parse_bytes
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.index.measured import measure_index_rates
from retro_mcore.retrieval.measured_rates import mean_document_tokens, measure_rates
from retro_mcore.retrieval.neighbor_search import NUM_QUERY, narrow_candidates
from retro_mcore.retrieval.scale import (
    LARGEST_UNCOMPRESSED,
    Node,
    Rates,
    ScalePlan,
    Workload,
    count_chunks,
    index_for,
    parse_count,
    plan_scale,
)
from retro_mcore.retrieval.stored_types import StoredType
from retro_mcore.stages.build_index import STAGE as INDEX
from retro_mcore.stages.build_index import BuildIndexConfig, stored_embeddings
from retro_mcore.stages.configuration import recorded_config

logger = logging.getLogger(__name__)

#: Vectors of the project that a small index is filled with, for measuring.
_MEASURED_VECTORS = 50_000

_CHUNK_LENGTH, _DIMENSION = 64, 1024
_DOCUMENT_TOKENS, _VOCABULARY, _NEIGHBORS = 1150.0, 50_257, 20
_POSITIVE = (
    "retro_chunk_length", "document_tokens", "vocab_size", "embedding_dimension", "hours",
    "num_neighbors_save", "cores_per_node", "node_memory", "embedder_rate", "query_rate",
)  # fmt: skip


@dataclass
class PlanScaleConfig:
    """Configuration of `plan_scale`."""

    tokens: str
    """Tokens to retrieve from, such as 1B, 100B or 1.2T."""
    samples: SampleLayout | None = None
    """Layout of the samples: aligned searches the chunks of the database, packed those of the
    samples (default: the project's, or aligned)."""
    training_tokens: str | None = None
    """Tokens of the packed samples whose neighbors are searched (default: as many as --tokens)."""
    retro_chunk_length: int | None = None
    """Tokens per chunk (default: the project's, or 64)."""
    document_tokens: float | None = None
    """Mean tokens per document (default: the project's, or 1150)."""
    vocab_size: int | None = None
    """Vocabulary size of the tokenizer. Decides the bytes per token (default: the project's, or
    50257)."""
    embedding_dimension: int | None = None
    """Dimension of the embedder's vectors (default: the measured embedder's, the project's, or
    1024)."""
    num_neighbors_save: int | None = None
    """Neighbors saved per chunk (default: the project's, or 20)."""
    hours: float = 24.0
    """Most hours that a stage may take."""
    gpus_per_node: int = 8
    """GPUs per node. With 0, cores embed."""
    cores_per_node: int = 128
    """Processor cores per node."""
    node_memory: float = 2000.0
    """Memory per node in GB."""
    index_memory: str | None = None
    """Memory that the index may take on a node, as --index-memory of build_index (default: three
    quarters of --node-memory). Up to 20M chunks it decides the codes; a larger index is split."""
    embedder_rate: float | None = None
    """Chunks embedded per second and GPU, or core (default: 1728, BERT-large on an A100)."""
    query_rate: float | None = None
    """Chunks searched per second and node (default: 250)."""
    project_dir: str | None = None
    """Project like the planned one. Decides the chunk length, the mean length of documents and the
    bytes per token; once it has an index, dimension and type of the stored vectors; once it has
    neighbors, their number."""
    measure: bool = False
    """Measure the rates on this machine, with the project's chunks (after build_db). After
    build_index, those of training, filling and searching an index of up to 20M chunks are measured
    too, on the CPU."""
    embedder: str | None = None
    """Embedder to measure (default: the project's, or minilm)."""
    device: str = "auto"
    """Device of the embedder to measure: auto, cpu or cuda."""


@dataclass(frozen=True)
class PlannedScale:
    """A plan, and what it was computed from."""

    plan: ScalePlan
    workload: Workload
    rates: Rates
    node: Node


def run(config: PlanScaleConfig) -> PlannedScale:
    """Plan a database, and measure rates if asked to.

    Raises:
        ConfigurationError: a number is out of range.
        ProjectError: the project has no database to measure with.
    """
    values = {name: getattr(config, name) for name in _POSITIVE}
    raise_problems(
        [
            ConfigurationError(flag_of(name), str(value), "Give more than 0")
            for name, value in values.items()
            if value is not None and not 0 < value < math.inf
        ]
        + list(too_small(config, {"gpus_per_node": 0}))
    )
    _refuse_unread(config)
    work = _workload(config)
    node = Node(config.gpus_per_node, config.cores_per_node, config.node_memory * 1e9)
    memory = MEMORY_SHARE * node.memory
    if config.index_memory is not None:
        memory = parse_bytes("--index-memory", config.index_memory)
    rates, work = _rates(config, work, memory)
    plan = plan_scale(work, rates, node, config.hours, memory)
    if plan.chunks <= LARGEST_UNCOMPRESSED and plan.index_bytes > memory:
        logger.warning(
            "no index of %d vectors fits --index-memory: build_index would refuse it. The smallest "
            "is planned, %s",
            plan.chunks,
            plan.index,
        )
    return PlannedScale(plan, work, rates, node)


@dataclass(frozen=True)
class _Like:
    """What is known of a project like the planned one; None: unknown."""

    chunk_length: int | None = None
    document_tokens: float | None = None
    token_bytes: int | None = None
    dimension: int | None = None
    neighbors_saved: int | None = None
    stored_as: StoredType | None = None
    samples: SampleLayout | None = None

    @classmethod
    def of(cls, project_dir: str, embedder: str | None) -> _Like:
        """Read a project; `embedder` is the one to plan for, None: its own."""
        paths = ProjectPaths(project_dir)
        config, settings = ProjectConfig.load(paths.root), ProjectSettings.load(paths.root)
        used = ProjectSettings.load(config.database_paths(paths.root).root)
        return cls(
            chunk_length=config.retro_gpt_chunk_length,
            document_tokens=mean_document_tokens(paths),
            token_bytes=_token_bytes(config, paths),
            # Another embedder is measured later.
            dimension=used.embedding_dimension if embedder in (None, used.embedder) else None,
            neighbors_saved=settings.num_neighbors_save,
            stored_as=used.embeddings_dtype if used.embedder is not None else None,
            samples=settings.samples,
        )


def _token_bytes(config: ProjectConfig, paths: ProjectPaths) -> int | None:
    """Bytes of a token; None if a dataset is not there."""
    files = [paths.data / prefix for prefix in config.blend[1]]
    if not all(path(file).is_file() for file in files for path in (bin_path, idx_path)):
        return None
    return max(TokenFile(file).tokens.dtype.itemsize for file in files)


def _workload(config: PlanScaleConfig) -> Workload:
    """The work that the configuration and the project describe."""
    tokens = parse_count("--tokens", config.tokens)
    asked = config.training_tokens
    like = _Like() if config.project_dir is None else _Like.of(config.project_dir, config.embedder)
    chunk_length = _agreed(config, "retro_chunk_length", like.chunk_length) or _CHUNK_LENGTH
    dimension = _agreed(config, "embedding_dimension", like.dimension) or _DIMENSION
    samples = config.samples or like.samples or "aligned"
    if samples == "aligned" and asked is not None:
        raise ConfigurationError(
            "--training-tokens",
            f"{asked}, but aligned samples need no search of their own",
            "Leave it out, or add --samples packed",
        )
    token_bytes = like.token_bytes
    if token_bytes is None or config.vocab_size is not None:
        token_bytes = 2 if (config.vocab_size or _VOCABULARY) < 65_500 else 4
    return Workload(
        tokens=tokens,
        training_tokens=tokens if asked is None else parse_count("--training-tokens", asked),
        chunk_length=chunk_length,
        document_tokens=config.document_tokens or like.document_tokens or _DOCUMENT_TOKENS,
        token_bytes=token_bytes,
        dimension=dimension,
        neighbors_saved=config.num_neighbors_save or like.neighbors_saved or _NEIGHBORS,
        samples=samples,
        stored_as=like.stored_as if samples == like.samples else None,
    )


def _refuse_unread(config: PlanScaleConfig) -> None:
    """Reject options of a measurement that is not made."""
    given = {"embedder": config.embedder is not None, "device": config.device != "auto"}
    raise_problems(
        [
            ConfigurationError(flag_of(name), "given without --measure", "Add --measure")
            for name, is_given in given.items()
            if is_given and not config.measure
        ]
    )


def _agreed(config: PlanScaleConfig, name: str, found: int | None) -> int | None:
    """What is given, or what the project or the measured embedder has.

    Raises:
        ConfigurationError: both are there, and they differ.
    """
    given = getattr(config, name)
    if given is not None and found is not None and given != found:
        raise ConfigurationError(
            flag_of(name), f"{given}, but it is {found} in --project-dir", "Leave it out"
        )
    return found if given is None else given


def _rates(config: PlanScaleConfig, work: Workload, memory: float) -> tuple[Rates, Workload]:
    """The rates as measured and given, and the work with the measured embedder's dimension.

    Args:
        config: What is asked for.
        work: The work, as planned so far.
        memory: Bytes that the index may take.
    """
    rates = Rates()
    if config.measure:
        if config.project_dir is None:
            raise ConfigurationError("--measure", "no --project-dir given", "Name a project")
        initialize()
        device = str(choose_device(config.device))  # type: ignore[arg-type]
        rates, dimension = measure_rates(config.project_dir, config.embedder, device)
        _agreed(config, "embedding_dimension", dimension)
        work = replace(work, dimension=dimension)
        rates = _with_index(config, rates, work, memory)
    asked = {"embedded": config.embedder_rate, "queried": config.query_rate}
    given = {name: value for name, value in asked.items() if value is not None}
    return replace(rates, **given), work


def _with_index(config: PlanScaleConfig, rates: Rates, work: Workload, memory: float) -> Rates:
    """The rates of the planned index, measured on the CPU with the project's vectors."""
    assert config.project_dir is not None
    paths = ProjectConfig.load(config.project_dir).database_paths(config.project_dir)
    settings = ProjectSettings.load(paths.root)
    built = recorded_config(paths, INDEX, BuildIndexConfig)
    chunks = count_chunks(work)
    planned = index_for(chunks, work.dimension, memory)
    index, lists = planned.string, planned.lists
    shares = config.embedder in (None, settings.embedder)
    if built is None or not shares or settings.embedding_dimension != work.dimension:
        return _unmeasured(rates, index, f"{paths.root} has no vectors of the planned embedder")
    if chunks > LARGEST_UNCOMPRESSED:
        return _unmeasured(rates, index, "product quantizers with rotations are not measured")
    embeddings = Embeddings(stored_embeddings(paths).shards)
    count = min(len(embeddings), _MEASURED_VECTORS)
    if lists and count * lists < FEWEST_LISTS * chunks:
        needed = math.ceil(FEWEST_LISTS * chunks / lists)
        return _unmeasured(rates, index, f"the project has {count} vectors of {needed}")
    rows = np.linspace(0, len(embeddings) - 1, count).astype(np.int64)
    vectors = embeddings.rows(rows)
    owners = ChunkDatabase.open(paths.root, own=True).documents(rows)
    documents = np.unique(owners, axis=0, return_inverse=True)[1].reshape(-1)
    candidates = min(settings.num_neighbors_query or NUM_QUERY, len(embeddings))
    narrow = candidates if built.rescore else narrow_candidates(work.neighbors_saved)
    found = measure_index_rates(
        vectors, chunks, lists, built.index_recall, candidates, narrow, planned.code, documents
    )
    lists_visited = f"about {found.nprobe} lists, expected from {count} vectors"
    visited = lists_visited if found.nprobe else "all vectors"
    logger.info("%s is measured on the CPU; for a chunk a search visits %s", index, visited)
    cores = config.cores_per_node
    trained = found.trained * cores if found.trained else rates.trained
    return replace(rates, trained=trained, added=found.added, queried=found.queried * cores)


def _unmeasured(rates: Rates, index: str, reason: str) -> Rates:
    logger.warning("training, filling and searching %s keep published rates: %s", index, reason)
    return rates
