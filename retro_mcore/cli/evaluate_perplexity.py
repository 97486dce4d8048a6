"""`evaluate_perplexity`: what a model makes of held-out documents, with and without neighbors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from retro_mcore import distributed
from retro_mcore.cli.command import run_command
from retro_mcore.cli.perplexity_tables import print_tables
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.splits import parse_split
from retro_mcore.distributed import get_rank
from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.neighbor_sources import NeighborKind, possible_kinds
from retro_mcore.evaluation.results import require_writable, write_results
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project.config import SPLITS, ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.options.pretrain import ParallelOptions

if TYPE_CHECKING:
    from retro_mcore.evaluation.bits_per_byte import BitsPerByte
    from retro_mcore.evaluation.leakage import LeakagePoint
    from retro_mcore.evaluation.perplexity import Perplexity
    from retro_mcore.model.options import ModelArguments

_LOG = logging.getLogger(__name__)

PERPLEXITY_FILE = "perplexity.json"
BITS_PER_BYTE_FILE = "bits_per_byte.json"
LEAKAGE_FILE = "leakage.json"
LEAKAGE_PLOT = "leakage.png"


@dataclass(kw_only=True)
class EvaluatePerplexityOptions:
    """Measure perplexity on held-out documents with real, shuffled, random and no neighbors.

    Shuffled: each chunk is given the neighbors of a chunk of another text. Random: chunks of the
    database. The model is rebuilt from its checkpoint alone.
    """

    project_dir: str
    """The project directory."""
    load: str
    """Directory of checkpoints; the latest is evaluated."""
    split: Literal["valid", "test", "both"] = "valid"
    """Which held-out documents."""
    protocol: Literal["samples", "documents", "both"] = "samples"
    """samples: Megatron's validation loss, over the samples that query_neighbors found neighbors
    for. documents: bits per byte of whole documents through overlapping windows, with neighbors
    searched for their own chunks."""
    retro_eval_neighbors: list[Literal["real", "shuffled", "random", "none"]] = field(
        default_factory=list
    )
    """Which neighbors to give. Default: real, shuffled and none, as far as the model reads any;
    without shuffled where one text holds more than half of the chunks."""
    retro_attention_gate: float | None = None
    """Scale of what the model reads in its neighbors. Default: the checkpoint's; a model that was
    tuned with 0 needs 1 here to read any."""
    eval_iters: int | None = None
    """Global batches of samples to evaluate. Default: all samples of the split."""
    eval_documents: int | None = None
    """Documents of each corpus to evaluate, its first. Default: all of the split."""
    overlapping_eval: int | None = None
    """Tokens by which a window starts behind its predecessor. Default: half a window, in whole
    chunks."""
    leakage: bool = False
    """Also tell bits per byte by how much of a chunk its neighbors hold (protocol documents)."""
    leakage_neighbors: int = 10
    """Neighbors of each chunk that its overlap is measured against."""
    leakage_alphas: list[float] = field(default_factory=list)
    """Largest overlaps, each from 0 to 1. Default: 0.125, 0.25, … 1."""
    micro_batch_size: int = 4
    """Samples or windows per process and forward pass."""
    num_workers: int = 0
    """Processes that read samples, for each process."""
    seed: int = 1234
    """Seed of the shuffling and of the draws."""
    output: str | None = None
    """JSON file of the samples' measurements. Default: perplexity.json in --load. Others lie beside
    it: bits_per_byte.json, leakage.json and leakage.png, or NAME.bits_per_byte.json, … for
    --output NAME.json (NAME_bits_per_byte.json, … for --output NAME)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: CUDA where there is one, else the CPU."""
    tensor_model_parallel_size: int = 1
    """Processes that share one copy of the model; need not be as in training."""
    sequence_parallel: bool = False
    """Split the norms' activations over the tensor parallel processes."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into; need not be as in training."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers' implementation."""
    verify: bool = False
    """Compare the checksums of all files that are read, however large; else of 8 GiB a process."""

    @property
    def splits(self) -> tuple[Literal["valid", "test"], ...]:
        """The splits that --split names."""
        return ("valid", "test") if self.split == "both" else (self.split,)

    def parallel(self) -> ParallelOptions:
        """The layout that the model is loaded into."""
        return ParallelOptions(
            device=self.device,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            sequence_parallel=self.sequence_parallel,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            transformer_impl=self.transformer_impl,
        )


@dataclass(frozen=True)
class EvaluatePerplexityResult:
    """What was measured.

    Attributes:
        perplexities: One per split and kind of neighbors, over samples.
        bits_per_byte: One per split and kind of neighbors, over documents.
        leakage: The curve of each split.
        output: The JSON file of `perplexities`; `file_beside` names the others.
    """

    perplexities: list[Perplexity]
    bits_per_byte: list[BitsPerByte]
    leakage: dict[str, list[LeakagePoint]]
    output: Path

    def perplexity(self, neighbors: str, split: str = "valid") -> float:
        """The perplexity of one row of the samples' table."""
        return next(
            row.perplexity
            for row in self.perplexities
            if (row.neighbors, row.split) == (neighbors, split)
        )


@dataclass(frozen=True)
class _Evaluation:
    """What both protocols share."""

    options: EvaluatePerplexityOptions
    project: ProjectConfig
    model: torch.nn.Module
    arguments: ModelArguments
    kinds: list[NeighborKind]
    device: torch.device
    vocab_size: int


def evaluate_perplexity(options: EvaluatePerplexityOptions) -> EvaluatePerplexityResult:
    """Measure, print tables and write them as JSON.

    Raises:
        RetroError: options, project and checkpoint do not fit together.
    """
    device = setup_device(options.device)
    distributed.initialize(distributed_backend())
    # Megatron is imported only after the device is set up.
    from retro_mcore.session import load_project_model
    from retro_mcore.training.setup.fits_project import check_shape

    with distributed.raise_together():
        _check(options)
        project = ProjectConfig.load(options.project_dir)
        _check_splits(options, project)
        output = Path(options.output or Path(options.load) / PERPLEXITY_FILE)
        _require_own_name(output)
        vocab_size = load_project_tokenizer(project, ProjectPaths(options.project_dir)).vocab_size
    loaded = load_project_model(
        options.project_dir, options.load, options.parallel(), options.retro_attention_gate
    )
    model, arguments = loaded.model, loaded.arguments
    with distributed.raise_together():
        check_shape(arguments, project, options.project_dir)
        if get_rank() == 0 and project.retro_gpt_seq_length > arguments.seq_length:
            found = f"Samples have {project.retro_gpt_seq_length} tokens, but the checkpoint was"
            found = f"{found} trained on {arguments.seq_length}: at later positions it is guessing"
            _LOG.warning("%s", found)
        kinds = _neighbor_kinds(options, arguments)
        if get_rank() == 0:
            for path in _files(options, output):
                require_writable(path)
    evaluation = _Evaluation(options, project, model, arguments, kinds, device, vocab_size)
    rows = _measure_samples(evaluation) if options.protocol != "documents" else []
    bits: list[BitsPerByte] = []
    curves: dict[str, list[LeakagePoint]] = {}
    if options.protocol != "samples":
        for split in options.splits:
            split_bits, curve = _measure_documents(evaluation, split)
            bits += split_bits
            if curve:
                curves[split] = curve
    result = EvaluatePerplexityResult(rows, bits, curves, output)
    with distributed.raise_together():
        if get_rank() == 0:
            print_tables(result.perplexities, result.bits_per_byte, result.leakage)
            _write(result)
    return result


def _check(options: EvaluatePerplexityOptions) -> None:
    for flag in (
        "micro_batch_size",
        "eval_iters",
        "eval_documents",
        "leakage_neighbors",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    ):
        value = getattr(options, flag)
        if value is not None and value < 1:
            name = f"--{flag.replace('_', '-')}"
            raise ConfigurationError(name, str(value), "Choose at least 1")
    for alpha in options.leakage_alphas:
        if not 0 <= alpha <= 1:
            raise ConfigurationError("--leakage-alphas", str(alpha), "Give numbers from 0 to 1")
    asked = {
        "--leakage": options.leakage,
        "--overlapping-eval": options.overlapping_eval is not None,
        "--eval-documents": options.eval_documents is not None,
    }
    for flag, given in asked.items():
        if given and options.protocol == "samples":
            raise ConfigurationError(
                flag, "given with --protocol samples", "Add --protocol documents, or both"
            )
    if options.leakage_alphas and not options.leakage:
        raise ConfigurationError("--leakage-alphas", "given without --leakage", "Add --leakage")
    if options.eval_iters is not None and options.protocol == "documents":
        raise ConfigurationError(
            "--eval-iters", "given with --protocol documents", "Give --eval-documents"
        )


def _check_splits(options: EvaluatePerplexityOptions, project: ProjectConfig) -> None:
    """Refuse a split that the project gives no documents to, or no samples."""
    parts = dict(zip(SPLITS, parse_split(project.retro_gpt_split), strict=True))
    for split in options.splits:
        subject = f"--split {options.split}"
        if not parts[split]:
            raise ConfigurationError(
                subject,
                f"{options.project_dir} was preprocessed with --split {project.retro_gpt_split}, "
                f"which gives {split} no documents",
                "Evaluate another split, or preprocess with a --split that gives it some",
            )
        if options.protocol != "documents" and not project.num_samples(split):
            raise ConfigurationError(
                subject,
                f"{options.project_dir} was preprocessed with --eval-iters "
                f"{project.retro_gpt_eval_iters}, which gives {split} no samples",
                "Add --protocol documents, or preprocess with more --eval-iters",
            )


def _neighbor_kinds(
    options: EvaluatePerplexityOptions, arguments: ModelArguments
) -> list[NeighborKind]:
    from retro_mcore.session import require_reading

    asked: list[NeighborKind] = list(dict.fromkeys(options.retro_eval_neighbors))
    if not asked:
        reads = not arguments.no_retrieval and arguments.retro_attention_gate != 0.0
        if not reads and get_rank() == 0:
            _LOG.warning("The model reads no neighbors, so it is measured without.")
        return ["real", "shuffled", "none"] if reads else ["none"]
    if set(asked) - {"none"}:
        require_reading(arguments, f"--retro-eval-neighbors {' '.join(asked)}", "Say none")
    return asked


def _measure_samples(evaluation: _Evaluation) -> list[Perplexity]:
    from retro_mcore.evaluation.perplexity import measure_perplexity
    from retro_mcore.evaluation.repeats import distinct_text
    from retro_mcore.samples.retro_dataset import build_retro_datasets
    from retro_mcore.training.loop.sample_reader import require_split

    options, arguments = evaluation.options, evaluation.arguments
    datasets = build_retro_datasets(
        options.project_dir, arguments.retro_num_neighbors, arguments.retro_num_retrieved_chunks
    )
    with distributed.raise_together():
        chosen = {
            split: require_split(datasets, split, options.project_dir) for split in options.splits
        }
    rows = []
    for split, dataset in chosen.items():
        batch = evaluation.project.retro_gpt_global_batch_size
        limit = (options.eval_iters or len(dataset)) * batch
        num_samples = min(len(dataset), limit)
        if options.eval_iters and num_samples < limit:
            _tell(f"--eval-iters {options.eval_iters} asks for {limit} samples", split, num_samples)
        with distributed.raise_together():
            distinct = distinct_text(dataset.samples, num_samples)
            owners = np.repeat(np.arange(len(dataset)), dataset.chunks_per_sample)
            kinds = possible_kinds(evaluation.kinds, owners, bool(options.retro_eval_neighbors))
        rows += [
            measure_perplexity(
                evaluation.model,
                dataset,
                split,
                kind,
                num_samples=num_samples,
                micro_batch_size=options.micro_batch_size,
                num_workers=options.num_workers,
                seed=options.seed,
                corpora=evaluation.project.blend[1],
                vocab_size=evaluation.vocab_size,
                distinct=distinct,
            )
            for kind in kinds
        ]
    return rows


def _tell(asked: str, split: str, found: object) -> None:
    """Say that a split holds less than was asked for."""
    if get_rank() == 0:
        message = f"{asked}, but {split} has {found}: no more are read"
        _LOG.warning("%s", message)


def _measure_documents(
    evaluation: _Evaluation, split: Literal["valid", "test"]
) -> tuple[list[BitsPerByte], list[LeakagePoint]]:
    from retro_mcore.evaluation.bits_per_byte import DocumentEvaluation
    from retro_mcore.evaluation.leakage import DEFAULT_ALPHAS

    options, arguments = evaluation.options, evaluation.arguments
    documents = DocumentEvaluation.open(
        options.project_dir,
        split,
        num_neighbors=arguments.retro_num_neighbors,
        num_retrieved_chunks=arguments.retro_num_retrieved_chunks,
        stride=options.overlapping_eval,
        limit=options.eval_documents,
    )
    if options.eval_documents is not None:
        found = documents.documents.num_in_split
        if min(found) < options.eval_documents:
            asked = f"--eval-documents {options.eval_documents} of each corpus"
            _tell(asked, split, " and ".join(map(str, found)))
    with distributed.raise_together():
        given = bool(options.retro_eval_neighbors)
        kinds = possible_kinds(evaluation.kinds, documents.documents.owners, given)
    needed = max(
        arguments.retro_num_neighbors if kinds != ["none"] else 0,
        options.leakage_neighbors if options.leakage else 0,
    )
    if needed:
        documents.search_neighbors(needed, str(evaluation.device))
    rows = [
        documents.measure(evaluation.model, kind, options.micro_batch_size, options.seed)
        for kind in kinds
    ]
    if not options.leakage:
        return rows, []
    alphas = sorted(options.leakage_alphas) or DEFAULT_ALPHAS
    return rows, documents.leakage_curve(options.leakage_neighbors, alphas)


def file_beside(output: Path, name: str) -> Path:
    """Where another file of the same command lies, so that two outputs in a folder share none.

    Args:
        output: The samples' measurements.
        name: What the file is called beside the default output.
    """
    if output.name == PERPLEXITY_FILE:
        return output.with_name(name)
    if output.suffix == ".json":
        return output.with_name(f"{output.name.removesuffix('.json')}.{name}")
    return output.with_name(f"{output.name}_{name}")  # NAME and NAME.json share none


def _require_own_name(output: Path) -> None:
    """Refuse an output with the name of a file that lies beside another output."""
    for name in (BITS_PER_BYTE_FILE, LEAKAGE_FILE, LEAKAGE_PLOT):
        if output.name == name or output.name.endswith((f".{name}", f"_{name}")):
            raise ConfigurationError(
                f"--output {output}",
                f"{name} is written beside the measurements of samples",
                f"Choose a name that does not end in {name}",
            )


def _files(options: EvaluatePerplexityOptions, output: Path) -> list[Path]:
    names = [BITS_PER_BYTE_FILE] if options.protocol != "samples" else []
    names += [LEAKAGE_FILE, LEAKAGE_PLOT] if options.leakage else []
    return [output, *(file_beside(output, name) for name in names)]


def _write(result: EvaluatePerplexityResult) -> None:
    output = result.output
    if result.perplexities:
        write_results(output, [_as_json(row) for row in result.perplexities])
    if result.bits_per_byte:
        rows = [asdict(row) for row in result.bits_per_byte]
        write_results(file_beside(output, BITS_PER_BYTE_FILE), rows)
    if result.leakage:
        from retro_mcore.evaluation.leakage import plot_leakage

        curves = {
            split: [point.as_json() for point in points] for split, points in result.leakage.items()
        }
        write_results(file_beside(output, LEAKAGE_FILE), curves)
        plot_leakage(result.leakage, file_beside(output, LEAKAGE_PLOT))


def _as_json(row: Perplexity) -> dict[str, Any]:
    return {**asdict(row), "repeats": row.repeats}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(EvaluatePerplexityOptions, evaluate_perplexity, argv)


if __name__ == "__main__":
    sys.exit(main())
