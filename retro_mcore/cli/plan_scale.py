"""`plan_scale`: chunks, disk, memory and hours of a database that is not built yet."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from retro_mcore.cli.command import run_command
from retro_mcore.cli.tables.scale import print_plan
from retro_mcore.distributed import initialize
from retro_mcore.errors import ConfigurationError, flag_of, raise_problems
from retro_mcore.evaluation.results import require_writable
from retro_mcore.platform import setup_device
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.retrieval import scale
from retro_mcore.retrieval.measured_rates import measure_rates
from retro_mcore.retrieval.scale import Node, Rates, ScalePlan, Workload, parse_count

_POSITIVE = (
    "retro_chunk_length", "document_tokens", "vocab_size", "embedding_dimension", "hours",
    "num_neighbors_save", "cores_per_node", "node_memory", "embedder_rate", "query_rate",
)  # fmt: skip


@dataclass
class PlanScaleOptions:
    """Plan a database: chunks, disk, memory, index, hours and ranks of every stage.

    Rates are published ones unless given or measured; docs/scaling.md names the sources.
    """

    tokens: str
    """Tokens to retrieve from, such as 1B, 100B or 1.2T."""
    training_tokens: str | None = None
    """Tokens of the samples whose neighbors are searched (default: as many as --tokens)."""
    retro_chunk_length: int = 64
    """Tokens per chunk."""
    document_tokens: float = 1150.0
    """Mean tokens per document."""
    vocab_size: int = 50257
    """Vocabulary size of the tokenizer. Decides the bytes per token."""
    embedding_dimension: int = 1024
    """Dimension of the embedder's vectors."""
    num_neighbors_save: int = 20
    """Neighbors saved per chunk."""
    hours: float = 24.0
    """Most hours that a stage may take."""
    gpus_per_node: int = 8
    """GPUs per node. With 0, cores embed."""
    cores_per_node: int = 128
    """Processor cores per node."""
    node_memory: float = 2000.0
    """Memory per node in GB."""
    embedder_rate: float | None = None
    """Chunks embedded per second and GPU, or core (default: 1728, BERT-large on an A100)."""
    query_rate: float | None = None
    """Chunks searched per second and node (default: 250)."""
    project_dir: str | None = None
    """Project like the planned one. Sets the chunk length and, once the project has an index, the
    embedder's dimension."""
    measure: bool = False
    """Measure the rates of tokenizing, chunking and embedding on this machine, with the project's
    chunks (after build_db)."""
    embedder: str | None = None
    """Embedder to measure (default: the project's, or minilm)."""
    device: str = "auto"
    """Device of the embedder to measure: auto, cpu or cuda."""
    json: str | None = None
    """File to write the plan to."""


def plan_scale(options: PlanScaleOptions) -> ScalePlan:
    """Print the plan, and write it if a file is named.

    Raises:
        ConfigurationError: a number is out of range.
        ProjectError: the project has no database to measure with.
    """
    values = {name: getattr(options, name) for name in _POSITIVE}
    raise_problems(
        [
            ConfigurationError(flag_of(name), str(value), "Give more than 0")
            for name, value in values.items()
            if value is not None and not 0 < value < math.inf
        ]
    )
    if options.json is not None:
        require_writable(Path(options.json), "--json")
    work = _workload(options)
    rates, work = _rates(options, work)
    node = Node(options.gpus_per_node, options.cores_per_node, options.node_memory * 1e9)
    plan = scale.plan_scale(work, rates, node, options.hours)
    print_plan(plan, work, rates, node)
    if options.json is not None:
        parts = {"workload": asdict(work), "rates": asdict(rates), "node": asdict(node)}
        write_json(options.json, {**parts, "plan": {**asdict(plan), "disk": plan.disk}})
    return plan


def _workload(options: PlanScaleOptions) -> Workload:
    """The work that the options and the project describe."""
    tokens = parse_count("--tokens", options.tokens)
    asked, dimension = options.training_tokens, options.embedding_dimension
    chunk_length = options.retro_chunk_length
    if options.project_dir is not None:
        config = ProjectConfig.load(options.project_dir)
        used = ProjectSettings.load(config.database_paths(options.project_dir).root)
        dimension = used.embedding_dimension or dimension
        chunk_length = config.retro_gpt_chunk_length
    return Workload(
        tokens=tokens,
        training_tokens=tokens if asked is None else parse_count("--training-tokens", asked),
        chunk_length=chunk_length,
        document_tokens=options.document_tokens,
        token_bytes=2 if options.vocab_size < 65_500 else 4,
        dimension=dimension,
        neighbors_saved=options.num_neighbors_save,
    )


def _rates(options: PlanScaleOptions, work: Workload) -> tuple[Rates, Workload]:
    """The rates as measured and given, and the work with the measured embedder's dimension."""
    rates = Rates()
    if options.measure:
        if options.project_dir is None:
            raise ConfigurationError("--measure", "no --project-dir given", "Name a project")
        initialize()
        device = str(setup_device(options.device))  # type: ignore[arg-type]
        rates, dimension = measure_rates(options.project_dir, options.embedder, device)
        work = replace(work, dimension=dimension)
    asked = {"embedded": options.embedder_rate, "queried": options.query_rate}
    given = {name: value for name, value in asked.items() if value is not None}
    return replace(rates, **given), work


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PlanScaleOptions, plan_scale, argv)


if __name__ == "__main__":
    sys.exit(main())
