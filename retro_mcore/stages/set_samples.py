"""Change how samples are cut from the documents of a project, without a new search.

In an aligned project every chunk has neighbors of its own, whatever sample it lies in. So the
seed, the length and the number of samples, the batch size and the weights of the datasets can
change at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from retro_mcore.data.tokens.token_file import open_token_files
from retro_mcore.distributed import barrier, get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError, ProjectError, flag_of, raise_problems
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import finish_stage, read_stage_record, recorded_options
from retro_mcore.samples.passes import SplitPasses, count_passes
from retro_mcore.stages.build_db import STAGE as BUILD_DB
from retro_mcore.stages.configuration import Project, project_paths
from retro_mcore.stages.grown_project import origin_of
from retro_mcore.stages.preprocess_corpus import STAGE as PREPROCESS
from retro_mcore.stages.preprocessing.config import (
    PreprocessCorpusConfig,
    problems_of,
    sample_options,
)
from retro_mcore.stages.preprocessing.project_config import with_samples

STAGE = "set_samples"
#: Key of config.json, and of the record of build_db, that names the datasets with their weights.
_DATA_PATH = "retro_gpt_data_path"


@dataclass(kw_only=True)
class SetSamplesConfig:
    """Configuration of `set_samples`. What is not given stays as it is."""

    input_weights: list[float] = field(default_factory=list)
    """Share of each input in the samples."""
    seq_length: int | None = None
    """Tokens per sample, a multiple of --retro-chunk-length."""
    train_samples: int | None = None
    """Number of training samples in the whole training."""
    train_epochs: float | None = None
    """Passes over the training documents, from which the number of samples follows."""
    global_batch_size: int | None = None
    """Samples per training step."""
    eval_interval: int | None = None
    """Training steps between evaluations."""
    eval_iters: int | None = None
    """Batches per evaluation."""
    seed: int | None = None
    """Seed for the order of the samples."""


@dataclass(frozen=True)
class SetSamplesReport:
    """Result of `set_samples`.

    Attributes:
        config: Configuration that was written to config.json.
        changed: Keys of config.json that changed, with the values before and after.
        passes: Samples of each split, and how often they repeat its documents.
    """

    config: ProjectConfig
    changed: dict[str, tuple[Any, Any]]
    passes: tuple[SplitPasses, ...]


def run(project: Project, config: SetSamplesConfig) -> SetSamplesReport:
    """Rewrite the samples' settings in config.json and in the record of preprocess_corpus.

    Args:
        project: Project directory, after preprocess_corpus.
        config: What to change.

    Raises:
        ConfigurationError: a value cannot work.
        ProjectError: the project is packed and its neighbors are searched, its database depends
            on the weights, update_db or another program made it, or another run works on it.
    """
    initialize()
    paths = project_paths(project)
    with stage_lock(paths, STAGE):
        with raise_together():
            report = _change(paths, config)
        barrier()
    return report


def _change(paths: ProjectPaths, config: SetSamplesConfig) -> SetSamplesReport:
    before = ProjectConfig.load(paths.root)
    _refuse_grown(paths)
    record = _record(paths)
    new = _preprocessing(record["options"], before, config)
    raise_problems(list(problems_of(new)))
    datasets = open_token_files(before, paths)
    made = with_samples(before, new, datasets)
    changed = _differences(before, made)
    if changed:
        _refuse_searched(paths, before, next(iter(changed)))
        _refuse_sampled(paths, made)
    passes = count_passes(made, datasets)
    if get_rank() == 0:
        made.save(paths.root)
        options = {**record["options"], **sample_options(new)}
        report = _with_passes(record.get("report", {}), passes)
        finish_stage(paths, PREPROCESS, options, record.get("inputs", {}), report)
    return SetSamplesReport(made, changed, tuple(passes))


def _refuse_grown(paths: ProjectPaths) -> None:
    """Reject a project that update_db made from another: nothing is trained on its samples."""
    if ProjectSettings.load(paths.root).grown_from:
        raise ProjectError(
            paths.root,
            "update_db made this project to extend the database of another, whose samples are used",
            f"Run set_samples --project-dir {origin_of(paths).root}",
        )


def _record(paths: ProjectPaths) -> dict[str, dict[str, Any]]:
    path = paths.stage_record(PREPROCESS)
    if not path.is_file():
        raise ProjectError(
            path,
            "no such file: another program made the project",
            "Run preprocess_corpus on the text, or on the .bin and .idx files",
        )
    return read_stage_record(path)


def _preprocessing(
    recorded: Mapping[str, Any], project: ProjectConfig, config: SetSamplesConfig
) -> PreprocessCorpusConfig:
    """The configuration of preprocess_corpus that gives the samples wanted."""
    if config.train_samples is not None and config.train_epochs is not None:
        raise ConfigurationError("--train-samples and --train-epochs", "both given", "Give one")
    names = [each.name for each in fields(SetSamplesConfig)]
    given = {name: getattr(config, name) for name in names}
    given = {name: value for name, value in given.items() if value not in (None, [])}
    if config.train_epochs is not None:
        given["train_samples"] = None
    kept = {name: recorded.get(flag_of(name)) for name in [*names, "retro_block_size"]}
    if config.train_samples is not None:
        kept["train_epochs"] = None
    return PreprocessCorpusConfig(
        input=list(recorded["--input"]),
        retro_chunk_length=project.retro_gpt_chunk_length,
        split=project.retro_gpt_split,
        **{**kept, **given},
    )


def _differences(before: ProjectConfig, made: ProjectConfig) -> dict[str, tuple[Any, Any]]:
    pairs = {key: (value, getattr(made, key)) for key, value in vars(before).items()}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _refuse_searched(paths: ProjectPaths, config: ProjectConfig, key: str) -> None:
    """Reject a change of samples whose neighbors were searched.

    Raises:
        ProjectError: the project is packed, and names neighbors.
    """
    settings = ProjectSettings.load(paths.root)
    if settings.samples == "packed" and config.neighbor_dirs(settings):
        raise ProjectError(
            paths.config,
            f"cannot change {key}: the project is packed, and its neighbors were searched for "
            "these samples",
            "Make another project with preprocess_corpus; with --samples aligned, its samples can "
            "change",
        )


def _refuse_sampled(paths: ProjectPaths, made: ProjectConfig) -> None:
    """Reject other weights where build_db recorded them; its next run would be refused."""
    recorded = recorded_options(paths, BUILD_DB)
    if recorded.get(_DATA_PATH) in (None, made.retro_gpt_data_path, made.blend[1]):
        return
    found = (
        f"the database was built with {' '.join(map(str, recorded[_DATA_PATH]))}"
        if recorded.get("--retro-index-ntrain") is None
        else f"build_db took the {recorded['--retro-index-ntrain']} chunks of "
        "--retro-index-ntrain by the weights"
    )
    raise ProjectError(
        "--input-weights", f"cannot change: {found}", "Make another project with preprocess_corpus"
    )


def _with_passes(report: Mapping[str, Any], passes: list[SplitPasses]) -> dict[str, Any]:
    splits = report.get("splits", {})
    return {
        **report,
        "splits": {split.name: {**splits.get(split.name, {}), **split.report} for split in passes},
    }
