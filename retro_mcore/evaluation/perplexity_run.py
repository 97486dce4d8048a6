"""Run a perplexity evaluation: load a model, measure both protocols, write the results.

Import it after `setup_device`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retro_mcore import session
from retro_mcore.data.tokens.splits import parse_split
from retro_mcore.distributed import get_rank, raise_together
from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.evaluation.attribution import NeighborGain, document_gains, sample_gains
from retro_mcore.evaluation.bits_per_byte import BitsPerByte, DocumentEvaluation
from retro_mcore.evaluation.database_fraction import NeighborsOfFraction
from retro_mcore.evaluation.leakage import DEFAULT_ALPHAS, LeakagePoint, plot_leakage
from retro_mcore.evaluation.neighbor_sources import NeighborKind, possible_kinds
from retro_mcore.evaluation.perplexity import Perplexity, measure_perplexity
from retro_mcore.evaluation.perplexity_config import EvaluatePerplexityConfig
from retro_mcore.evaluation.repeats import distinct_text
from retro_mcore.evaluation.results import require_writable, write_results
from retro_mcore.model.options import ModelArguments
from retro_mcore.project.config import SPLITS, ProjectConfig
from retro_mcore.samples.retro_dataset import (
    RetroDataset,
    build_retro_datasets,
    note_of_mixed_chunks,
    note_of_short_neighbors,
)
from retro_mcore.session import LoadedModel
from retro_mcore.training.loop.sample_reader import require_split
from retro_mcore.training.options.documents import DocumentOptions
from retro_mcore.training.setup.build import uses_transformer_engine
from retro_mcore.training.setup.fits_project import check_sample_length

_LOG = logging.getLogger(__name__)

PERPLEXITY_FILE = "perplexity.json"
BITS_PER_BYTE_FILE = "bits_per_byte.json"
ATTRIBUTION_FILE = "attribution.json"
LEAKAGE_FILE = "leakage.json"
LEAKAGE_PLOT = "leakage.png"


@dataclass(frozen=True)
class EvaluatePerplexityResult:
    """Measurements of a perplexity evaluation.

    Attributes:
        perplexities: One per split and kind of neighbors, over samples.
        bits_per_byte: One per split and kind of neighbors, over documents.
        leakage: Leakage curve of each split.
        gains: With --attribute, the credit of the neighbors of each rank.
        output: The JSON file of `perplexities`; `file_beside` gives the names of the others.
    """

    perplexities: list[Perplexity]
    bits_per_byte: list[BitsPerByte]
    leakage: dict[str, list[LeakagePoint]]
    gains: list[NeighborGain]
    output: Path

    def perplexity(self, neighbors: str, split: str = "valid") -> float:
        """Perplexity over the samples of one split with one kind of neighbors."""
        return next(
            row.perplexity
            for row in self.perplexities
            if (row.neighbors, row.split) == (neighbors, split)
        )

    def write(self) -> None:
        """Write all measurements. Call this on one rank only.

        Raises:
            ConfigurationError: a file cannot be written.
            ProjectError: the disk is full.
        """
        output = self.output
        if self.perplexities:
            write_results(output, [_as_json(row) for row in self.perplexities])
        if self.bits_per_byte:
            rows = [_without_none(asdict(row)) for row in self.bits_per_byte]
            write_results(file_beside(output, BITS_PER_BYTE_FILE), rows)
        if self.gains:
            rows = [asdict(gain) for gain in self.gains]
            write_results(file_beside(output, ATTRIBUTION_FILE), rows)
        if self.leakage:
            curves = {
                split: [point.as_json() for point in points]
                for split, points in self.leakage.items()
            }
            write_results(file_beside(output, LEAKAGE_FILE), curves)
            plot_leakage(self.leakage, file_beside(output, LEAKAGE_PLOT))


def _without_none(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out intervals that were not requested."""
    return {name: value for name, value in row.items() if value is not None}


def _as_json(row: Perplexity) -> dict[str, Any]:
    return {**asdict(row), "repeats": row.repeats}


def file_beside(output: Path, name: str) -> Path:
    """Path of another result file, distinct for each output in a folder.

    Args:
        output: The file of the samples' measurements.
        name: Name of the other file for the default output.
    """
    if output.name == PERPLEXITY_FILE:
        return output.with_name(name)
    if output.suffix == ".json":
        return output.with_name(f"{output.name.removesuffix('.json')}.{name}")
    return output.with_name(f"{output.name}_{name}")  # NAME and NAME.json must have different files


def _require_own_name(output: Path) -> None:
    """Reject an output named like a result file of another output."""
    for name in (BITS_PER_BYTE_FILE, ATTRIBUTION_FILE, LEAKAGE_FILE, LEAKAGE_PLOT):
        if output.name == name or output.name.endswith((f".{name}", f"_{name}")):
            raise ConfigurationError(
                f"--output {output}",
                f"{name} is written beside the measurements of samples",
                f"Choose a name that does not end in {name}",
            )


def _result_files(config: EvaluatePerplexityConfig, output: Path) -> list[Path]:
    names = [BITS_PER_BYTE_FILE] if config.protocol != "samples" else []
    names += [ATTRIBUTION_FILE] if config.attribute else []
    names += [LEAKAGE_FILE, LEAKAGE_PLOT] if config.leakage else []
    return [output, *(file_beside(output, name) for name in names)]


def run(config: EvaluatePerplexityConfig) -> EvaluatePerplexityResult:
    """Measure a model's perplexity on all ranks together. Does not write the results.

    Raises:
        RetroError: configuration, project and checkpoint do not match, or the results could not be
            written.
    """
    output = Path(config.output or Path(config.load) / PERPLEXITY_FILE)
    with raise_together():
        config.check()
        project = ProjectConfig.load(config.project_dir)
        _check_splits(config, project)
        _require_own_name(output)
    loaded = session.load_model(
        config.project_dir,
        config.load,
        layout=config.parallel(),
        retro_attention_gate=config.retro_attention_gate,
    )
    with raise_together():
        _check_samples(loaded, project, config.project_dir)
        kinds = _neighbor_kinds(config, loaded.arguments)
        if config.attribute:
            session.require_reading(loaded.arguments, "--attribute", "Leave it out")
        if get_rank() == 0:
            for path in _result_files(config, output):
                require_writable(path)
    evaluation = _Evaluation(config, project, loaded, kinds)
    result = EvaluatePerplexityResult([], [], {}, [], output)
    if config.protocol != "documents":
        for split, dataset in evaluation.open_samples().items():
            rows, gains = evaluation.measure_samples(split, dataset)
            result.perplexities.extend(
                replace(row, database_fraction=config.database_fraction) for row in rows
            )
            result.gains.extend(gains)
    if config.protocol != "samples":
        for split in config.splits:
            documents, gains, curve = evaluation.measure_documents(split)
            result.bits_per_byte.extend(documents)
            result.gains.extend(gains)
            if curve:
                result.leakage[split] = curve
    return result


def _check_splits(config: EvaluatePerplexityConfig, project: ProjectConfig) -> None:
    """Reject a split without documents or samples in the project."""
    parts = dict(zip(SPLITS, parse_split(project.retro_gpt_split), strict=True))
    for split in config.splits:
        subject = f"--split {config.split}"
        if not parts[split]:
            raise ConfigurationError(
                subject,
                f"{config.project_dir} was preprocessed with --split {project.retro_gpt_split}, "
                f"which gives {split} no documents",
                "Evaluate another split, or preprocess with a --split that gives it some",
            )
        if config.protocol != "documents" and not project.num_samples(split):
            raise ConfigurationError(
                subject,
                f"{config.project_dir} was preprocessed with --eval-iters "
                f"{project.retro_gpt_eval_iters}, which gives {split} no samples",
                "Add --protocol documents, or give the project some: set_samples --eval-iters",
            )


def _check_samples(loaded: LoadedModel, project: ProjectConfig, project_dir: str) -> None:
    check_sample_length(loaded.arguments, project, project_dir)
    length, trained_on = project.retro_gpt_seq_length, loaded.arguments.seq_length
    if get_rank() == 0 and length > trained_on:
        found = f"Samples have {length} tokens, but the checkpoint was"
        found = f"{found} trained on {trained_on}: at later positions it is guessing"
        _LOG.warning("%s", found)


def _neighbor_kinds(
    config: EvaluatePerplexityConfig, arguments: ModelArguments
) -> list[NeighborKind]:
    asked: list[NeighborKind] = list(dict.fromkeys(config.retro_eval_neighbors))
    if not asked:
        reads = not arguments.no_retrieval and arguments.retro_attention_gate != 0.0
        if not reads and get_rank() == 0:
            _LOG.warning("The model reads no neighbors, so it is measured without.")
        return ["real", "shuffled", "none"] if reads else ["none"]
    if set(asked) - {"none"}:
        subject = f"--retro-eval-neighbors {' '.join(asked)}"
        session.require_reading(arguments, subject, "Say none")
    return asked


@dataclass(frozen=True)
class _Evaluation:
    """State shared by both protocols."""

    config: EvaluatePerplexityConfig
    project: ProjectConfig
    loaded: LoadedModel
    kinds: list[NeighborKind]

    def open_samples(self) -> dict[str, RetroDataset]:
        """The samples of each split to evaluate."""
        arguments = self.loaded.arguments
        datasets = build_retro_datasets(
            self.config.project_dir,
            arguments.retro_num_neighbors,
            arguments.retro_num_retrieved_chunks,
            documents=self._documents(),
        )
        with raise_together():
            opened = {
                split: require_split(datasets, split, self.config.project_dir)
                for split in self.config.splits
            }
            return {split: self._of_fraction(split, opened[split]) for split in opened}

    def _of_fraction(self, split: str, dataset: RetroDataset) -> RetroDataset:
        """The samples with the neighbors of a smaller database, if one was requested."""
        fraction, num_neighbors = self.config.database_fraction, dataset.num_neighbors
        if fraction == 1:
            return dataset
        part = NeighborsOfFraction(dataset.neighbors, dataset.database, fraction, self.config.seed)
        if get_rank() == 0 and (short := part.share_short(num_neighbors)):
            _LOG.warning(
                "%s: %.1f%% of the chunks keep fewer than %d of their %d saved neighbors at "
                "--database-fraction %g. Save more: query_neighbors --num-neighbors-save",
                *(split, 100 * short, num_neighbors, part.num_saved, fraction),
            )
        neighbors: Any = part
        return replace(dataset, neighbors=neighbors)

    def _documents(self) -> dict[str, bool]:
        """How documents of a sample were kept apart in training.

        Raises:
            ConfigurationError: Transformer Engine's attention cannot do that.
        """
        training = self.loaded.training
        names = [option.name for option in fields(DocumentOptions)]
        documents = {name: bool(training.get(name, False)) for name in names}
        if documents["reset_attention_mask"]:
            with raise_together():
                if uses_transformer_engine(self.config.parallel()):
                    raise ConfigurationError(
                        f"--load {self.config.load}",
                        "was trained with --reset-attention-mask, and Transformer Engine's causal "
                        "attention takes no mask of documents",
                        "Add --transformer-impl local, or --protocol documents",
                    )
        if any(documents.values()) and get_rank() == 0:
            named = ", ".join(flag_of(name) for name in names if documents[name])
            _LOG.info("note: samples are read as in training, with %s", named)
        return documents

    def measure_samples(
        self, split: str, dataset: RetroDataset
    ) -> tuple[list[Perplexity], list[NeighborGain]]:
        """Measure Megatron's validation loss for each kind of neighbors, and their credit."""
        config = self.config
        limit = (config.eval_iters or len(dataset)) * self.project.retro_gpt_global_batch_size
        num_samples = min(len(dataset), limit)
        if config.eval_iters and num_samples < limit:
            asked = f"--eval-iters {config.eval_iters} asks for {limit} samples"
            _report_fewer(asked, split, num_samples)
        with raise_together():
            distinct = distinct_text(dataset.samples, num_samples)
            owners = np.repeat(np.arange(len(dataset)), dataset.chunks_per_sample)
            if "shuffled" in self.kinds:  # among the chunks that have neighbors
                owners = owners[dataset.neighbors.searched()]
            kinds = possible_kinds(self.kinds, owners, bool(config.retro_eval_neighbors))
        if kinds != ["none"]:
            for note in (note_of_short_neighbors(dataset), note_of_mixed_chunks(dataset)):
                if note and get_rank() == 0:
                    _LOG.info("note: %s samples: %s", split, note)
        rows = [
            measure_perplexity(
                self.loaded.model,
                dataset,
                split,
                kind,
                num_samples=num_samples,
                micro_batch_size=config.micro_batch_size,
                num_workers=config.num_workers,
                seed=config.seed,
                corpora=self.project.blend[1],
                vocab_size=self.loaded.tokenizer.vocab_size,
                distinct=distinct,
            )
            for kind in kinds
        ]
        if not config.attribute:
            return rows, []
        return rows, sample_gains(
            self.loaded,
            dataset,
            split,
            num_samples=num_samples,
            micro_batch_size=config.micro_batch_size,
            num_workers=config.num_workers,
        )

    def measure_documents(
        self, split: Literal["valid", "test"]
    ) -> tuple[list[BitsPerByte], list[NeighborGain], list[LeakagePoint]]:
        """Measure bits per byte for each kind of neighbors; credit and leakage if requested."""
        config, model = self.config, self.loaded.model
        documents = DocumentEvaluation.open(
            self.config.project_dir,
            split,
            num_neighbors=self.loaded.arguments.retro_num_neighbors,
            num_retrieved_chunks=self.loaded.arguments.retro_num_retrieved_chunks,
            stride=config.overlapping_eval,
            limit=config.eval_documents,
        )
        if config.eval_documents is not None:
            found = documents.documents.num_in_split
            if min(found) < config.eval_documents:
                asked = f"--eval-documents {config.eval_documents} of each corpus"
                _report_fewer(asked, split, " and ".join(map(str, found)))
        with raise_together():
            given = bool(config.retro_eval_neighbors)
            kinds = possible_kinds(self.kinds, documents.documents.owners, given)
        needed = self._num_searched(kinds)
        if needed:
            documents.search_neighbors(needed, str(next(model.parameters()).device))
            with raise_together():  # chunks without words were not searched
                kinds = possible_kinds(kinds, documents.searched_owners, given)
        rows = [
            documents.measure(model, kind, config.micro_batch_size, config.seed) for kind in kinds
        ]
        if config.bootstrap:
            rows = self._with_intervals(documents, rows)
        gains = []
        if config.attribute:
            gains = document_gains(self.loaded, documents, config.micro_batch_size)
        if not config.leakage:
            return rows, gains, []
        alphas = sorted(config.leakage_alphas) or DEFAULT_ALPHAS
        return rows, gains, documents.leakage_curve(config.num_leakage_neighbors, alphas)

    def _with_intervals(
        self, documents: DocumentEvaluation, rows: list[BitsPerByte]
    ) -> list[BitsPerByte]:
        if len(documents.documents) > 1:
            return documents.with_intervals(rows, self.config.bootstrap, self.config.seed)
        if get_rank() == 0:
            _LOG.warning("There is a single document, so --bootstrap has nothing to resample.")
        return rows

    def _num_searched(self, kinds: list[NeighborKind]) -> int:
        """Number of neighbors to search for each chunk of the documents."""
        reads = kinds != ["none"] or self.config.attribute
        read = self.loaded.arguments.retro_num_neighbors if reads else 0
        return max(read, self.config.num_leakage_neighbors if self.config.leakage else 0)


def _report_fewer(asked: str, split: str, found: object) -> None:
    """Warn that a split holds less than requested."""
    if get_rank() == 0:
        _LOG.warning("%s, but %s has %s: no more are read", asked, split, found)
