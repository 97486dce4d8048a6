"""A complete pretraining run: plan, then train, resume, or evaluate a loaded model.

Import it after `setup_device`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from retro_mcore import distributed
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.token_file import open_token_files
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.lock import directory_lock
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.samples.neighbor_noise import NeighborNoise
from retro_mcore.samples.passes import count_passes
from retro_mcore.samples.retro_dataset import build_retro_datasets
from retro_mcore.training.loop.sample_reader import document_tokens, require_split
from retro_mcore.training.loop.trainer import Trainer, TrainingResult, finished_run
from retro_mcore.training.options.run import PretrainOptions
from retro_mcore.training.setup.data_contents import contents_of_project
from retro_mcore.training.setup.plan import TrainingPlan, make_plan


def pretrain(options: PretrainOptions, device: torch.device) -> tuple[TrainingPlan, TrainingResult]:
    """Train or resume, unless the run is already finished. All ranks call it together.

    Args:
        options: The run's configuration.
        device: Device to train on, from `setup_device`.

    Raises:
        RetroError: options, project, checkpoint and processes do not match.
    """
    paths = ProjectPaths(options.project_dir)
    with distributed.raise_together():
        project = ProjectConfig.load(options.project_dir)
        tokenizer = load_project_tokenizer(project, paths)
        _check(options, tokenizer.vocab_size)
        plan = make_plan(options, project, tokenizer.vocab_size, tokenizer.used_vocab_size)
        plan.check_layers()
    contents = distributed.on_first_rank(lambda: contents_of_project(project, paths))
    with distributed.raise_together():
        passes = count_passes(project, open_token_files(project, paths))
        plan = replace(
            plan,
            contents=contents,
            passes=tuple(passes),
            document_tokens=document_tokens(tokenizer),
        )
        result = None if options.skip_train else finished_run(plan)
    if result is None:
        with save_lock("pretrain_retro", options.save) as alone:
            result = _run(plan, device, options.skip_train, alone)
    return plan, result


def _check(options: PretrainOptions, vocab_size: int) -> None:
    """Reject options that differ from the run's actual values."""
    for flag, given, fixed in (
        ("--vocab-size", options.vocab_size, vocab_size),
        ("--world-size", options.world_size, distributed.get_world_size()),
    ):
        if given is not None and given != fixed:
            raise ConfigurationError(flag, f"{given}, but it is {fixed}", "Leave the flag out")
    if options.skip_train and options.load is None and options.load_gpt is None:
        raise ConfigurationError("--skip-train", "given without a model", "Add --load")
    if options.skip_train and options.save is not None:
        raise ConfigurationError(
            "--skip-train", "given with --save", "Nothing is saved; leave it out"
        )


def save_lock(command: str, save: str | None) -> AbstractContextManager[bool]:
    """Lock --save for this run, if given; yields whether the lock is held.

    Raises:
        ProjectError: another run uses it.
    """
    return nullcontext(True) if save is None else directory_lock(Path(save), command)


def _run(plan: TrainingPlan, device: torch.device, skip_train: bool, alone: bool) -> TrainingResult:
    options = plan.options
    noise = NeighborNoise.from_options(options, plan.project.retro_gpt_seed)
    datasets = build_retro_datasets(
        options.project_dir,
        options.retro_num_neighbors,
        options.retro_num_retrieved_chunks,
        noise,
        plan.documents,
    )
    with distributed.raise_together():
        train = require_split(datasets, "train", options.project_dir)
    trainer = Trainer(plan, train, datasets.get("valid"), device, alone)
    if not skip_train:
        return trainer.train()
    if not trainer.has_loaded:
        raise CheckpointError(
            f"--load {options.load}", "holds no checkpoint to evaluate", "Name a run's --save"
        )
    return trainer.evaluate(datasets.get("test"))
