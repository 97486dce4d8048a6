"""`plan_scale`: chunks, disk, memory and hours of a database that is not built yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from retro_mcore.cli.command import print_summary, run_command
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.distributed import get_rank, initialize
from retro_mcore.errors import ConfigurationError
from retro_mcore.platform import setup_device
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.retrieval import scale
from retro_mcore.retrieval.bert_tokens import BertTokenCounter
from retro_mcore.retrieval.chunk_text import chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders import build_embedder
from retro_mcore.retrieval.scale import Node, Rates, ScalePlan, Workload

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_MEASURED_CHUNKS = 512


@dataclass
class PlanScaleOptions:
    """Plan a database: chunks, disk, memory, the index, hours and ranks of every stage.

    The rates are published ones unless they are given or measured; docs/scaling.md says whose.
    """

    tokens: str
    """Tokens to retrieve from, such as 1B, 100B or 1.2T."""
    training_tokens: str | None = None
    """Tokens of the samples whose neighbors are searched (default: as many)."""
    retro_chunk_length: int = 64
    """Tokens per chunk."""
    document_tokens: float = 1150.0
    """Mean tokens of a document."""
    vocab_size: int = 50257
    """Of the tokenizer: sets the bytes of a token."""
    embedding_dimension: int = 1024
    """Of the embedder."""
    num_neighbors_save: int = 20
    """Neighbors saved per chunk."""
    hours: float = 24.0
    """How long a stage may take."""
    gpus_per_node: int = 8
    """GPUs; 0: cores embed."""
    cores_per_node: int = 128
    """Processor cores."""
    node_memory: float = 2000.0
    """Memory of a node in GB."""
    embedder_rate: float | None = None
    """Chunks that a GPU (or a core) embeds in a second (default: 1728, BERT-large on an A100)."""
    query_rate: float | None = None
    """Chunks that a node searches in a second (default: 250)."""
    project_dir: str | None = None
    """A project like the one that is planned: its chunk length, and its embedder's dimension once
    it has an index."""
    measure: bool = False
    """Measure the rates of tokenizing, chunking and embedding here, on the project's chunks (after
    build_db)."""
    embedder: str | None = None
    """With --measure: the embedder (default: the project's, or minilm)."""
    device: str = "auto"
    """With --measure: where the embedder runs: auto, cpu or cuda."""
    json: str | None = None
    """Write the plan to this file too."""


def plan_scale(options: PlanScaleOptions) -> ScalePlan:
    """Print the plan, and write it if a file is named.

    Raises:
        ConfigurationError: a number that cannot be.
        ProjectError: the project has no database to measure with.
    """
    for flag in (
        "retro_chunk_length", "document_tokens", "vocab_size", "embedding_dimension", "hours",
        "num_neighbors_save", "cores_per_node", "node_memory", "embedder_rate", "query_rate",
    ):  # fmt: skip
        value = getattr(options, flag)
        if value is not None and value <= 0:
            raise ConfigurationError(f"--{flag.replace('_', '-')}", str(value), "Give more than 0")
    tokens = parse_count("--tokens", options.tokens)
    asked = options.training_tokens
    work = Workload(
        tokens,
        tokens if asked is None else parse_count("--training-tokens", asked),
        options.retro_chunk_length,
        options.document_tokens,
        2 if options.vocab_size < 65_500 else 4,
        options.embedding_dimension,
        options.num_neighbors_save,
    )
    rates = Rates()
    if options.project_dir is not None:
        config = ProjectConfig.load(options.project_dir)
        used = ProjectSettings.load(config.database_paths(options.project_dir).root)
        dimension = used.embedding_dimension or options.embedding_dimension
        work = replace(work, chunk_length=config.retro_gpt_chunk_length, dimension=dimension)
    if options.measure:
        if options.project_dir is None:
            raise ConfigurationError("--measure", "no --project-dir given", "Name a project")
        rates, dimension = measure_rates(options, options.project_dir)
        work = replace(work, dimension=dimension)
    given = {"embedded": options.embedder_rate, "queried": options.query_rate}
    rates = replace(rates, **{name: value for name, value in given.items() if value is not None})
    node = Node(options.gpus_per_node, options.cores_per_node, options.node_memory * 1e9)
    plan = scale.plan_scale(work, rates, node, options.hours)
    _show(plan, work, rates, node)
    if options.json is not None:
        write_json(
            options.json,
            {
                "workload": asdict(work),
                "rates": asdict(rates),
                "node": asdict(node),
                "plan": {**asdict(plan), "disk": plan.disk},
            },
        )
    return plan


def parse_count(flag: str, text: str) -> float:
    """A number with K, M, B or T behind it.

    Raises:
        ConfigurationError: something else, or not above 0.
    """
    unit = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigurationError(flag, repr(text), "Give a number such as 1B, 100B or 1.2T")
    return value


def measure_rates(options: PlanScaleOptions, project_dir: str) -> tuple[Rates, int]:
    """Rates of this machine on a project's own chunks, and the embedder's dimension."""
    initialize()
    device = str(setup_device(options.device))  # type: ignore[arg-type]
    paths = ProjectConfig.load(project_dir).database_paths(project_dir)
    config, settings = ProjectConfig.load(paths.root), ProjectSettings.load(paths.root)
    database = ChunkDatabase.open(paths.root, own=True)
    tokenizer = load_project_tokenizer(config, paths)
    ids = np.linspace(0, len(database) - 1, min(32 * _MEASURED_CHUNKS, len(database))).astype(int)
    counter = BertTokenCounter(paths.root / str(config.retro_bert_vocab_file))
    tokens = [chunk.tolist() for chunk in database.tokens(ids)]
    start = time.process_time()
    texts = tokenizer.detokenize_batch(tokens)
    counter.count(texts)
    chunked = len(ids) / (time.process_time() - start)
    start = time.process_time()
    tokenized = sum(map(len, tokenizer.tokenize_batch(texts))) / (time.process_time() - start)
    name = options.embedder or settings.embedder or "minilm"
    embedder = build_embedder(name, device=device, weights=paths.lexical_weights)
    texts = chunk_texts(tokenizer, database.tokens(ids[:: max(len(ids) // _MEASURED_CHUNKS, 1)]))
    embedder.embed(texts[:32])
    start = time.perf_counter()
    embedder.embed(texts)
    embedded = len(texts) / (time.perf_counter() - start)
    rates = Rates(tokenized=tokenized, chunked=chunked, embedded=embedded)
    return rates, embedder.dimension


def _show(plan: ScalePlan, work: Workload, rates: Rates, node: Node) -> None:
    unit = "GPU" if node.gpus else "core"
    rows = {
        "chunks": f"{plan.chunks:,} of {work.tokens:,.0f} tokens",
        "chunks to search for": f"{plan.query_chunks:,}",
        "index": f"{plan.index}, trained on {plan.training_vectors:,} vectors",
        "index, bytes": f"{_bytes(plan.index_bytes)}"
        + (f", split over {plan.index_shares} nodes" if plan.index_shares > 1 else ""),
        "disk, all stages": _bytes(plan.disk),
        "rates": f"{rates.tokenized:,.0f} tokens and {rates.chunked:,.0f} chunks per core, "
        f"{rates.embedded:,.0f} chunks embedded per {unit}, {rates.added:,.0f} vectors added per "
        f"core, {rates.queried:,.0f} chunks searched per node, in a second",
    }
    print_summary("plan_scale", rows)
    if get_rank() != 0:
        return
    table = Table()
    for heading in ("stage", "hours", "nodes", "ranks", "disk", "memory of a rank"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in plan.stages:
        hours = f"{stage.hours:,.1f} {stage.worker}-hours"
        disk = _bytes(stage.disk) if stage.disk else ""
        ranks = f"{stage.nodes:,}", f"{stage.ranks:,}"
        table.add_row(stage.name, hours, *ranks, disk, _bytes(stage.memory))
    Console(width=120).print(table)


def _bytes(count: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PlanScaleOptions, plan_scale, argv)
