"""`pretrain_retro`: train a Retro model, or its GPT twin, on a project's samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retro_mcore import distributed
from retro_mcore.cli.command import print_summary, run_command
from retro_mcore.cli.dry_run import DryRun, dry_run
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.token_file import open_token_files
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.lock import directory_lock
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.options.pretrain import TrainingOptions

if TYPE_CHECKING:
    from retro_mcore.training.loop.trainer import TrainingResult
    from retro_mcore.training.setup.plan import TrainingPlan


@dataclass(kw_only=True)
class PretrainRetroOptions(TrainingOptions):
    """Train a Retro model on a project's samples and neighbors.

    Flags have Megatron's names. What the project's config.json fixes is taken from there. Under
    torchrun the model is trained by all processes; run again with --load, it resumes.
    """

    dry_run: bool = False
    """Print parameters, memory per GPU and FLOPs per token of this run, and stop. The project need
    not exist yet; then --seq-length, --global-batch-size, --train-samples, --vocab-size say it."""
    skip_train: bool = False
    """Train nothing: the loaded model's loss on the first --eval-iters batches of the validation
    and test samples. evaluate_perplexity tells more."""
    world_size: int | None = None
    """Processes of the run: what --dry-run counts with; a run with another number is refused."""
    vocab_size: int | None = None
    """The tokenizer's vocabulary. Fixed by the project."""


def pretrain_retro(options: PretrainRetroOptions) -> TrainingResult | DryRun:
    """Train, or resume, or find that the training is already finished; or try a run dry.

    Raises:
        RetroError: options, project, checkpoint and processes do not fit together.
    """
    if options.dry_run:
        setup_device("cpu")
        return dry_run(options, options.world_size, options.vocab_size)
    device = setup_device(options.device)
    distributed.initialize(distributed_backend())
    # Megatron is imported only after the device is set up.
    from retro_mcore.samples.passes import count_passes
    from retro_mcore.training.loop.sample_reader import document_tokens
    from retro_mcore.training.loop.trainer import finished_run
    from retro_mcore.training.setup.data_contents import contents_of_project
    from retro_mcore.training.setup.plan import make_plan

    paths = ProjectPaths(options.project_dir)
    with distributed.raise_together():
        project = ProjectConfig.load(options.project_dir)
        tokenizer = load_project_tokenizer(project, paths)
        _check(options, tokenizer.vocab_size)
        plan = make_plan(options, project, tokenizer.vocab_size, tokenizer.used_vocab_size)
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
    summarize("pretrain_retro", plan, result)
    return result


def _check(options: PretrainRetroOptions, vocab_size: int) -> None:
    """What the run itself fixes may be repeated as flags, and is refused if it differs."""
    for flag, given, fixed in (
        ("--vocab-size", options.vocab_size, vocab_size),
        ("--world-size", options.world_size, distributed.get_world_size()),
    ):
        if given is not None and given != fixed:
            raise ConfigurationError(flag, f"{given}, but it is {fixed}", "Leave the flag out")
    if options.skip_train and options.load is None and options.load_gpt is None:
        raise ConfigurationError("--skip-train", "given without a model", "Add --load")
    if options.skip_train and options.save is not None:
        raise ConfigurationError("--skip-train", "given with --save", "Nothing is saved; leave it")


def save_lock(command: str, save: str | None) -> AbstractContextManager[bool]:
    """Keep --save to this run, if it has one; yields whether that could be done.

    Raises:
        ProjectError: another run trains into it.
    """
    return nullcontext(True) if save is None else directory_lock(Path(save), command)


def _run(plan: TrainingPlan, device: torch.device, skip_train: bool, alone: bool) -> TrainingResult:
    from retro_mcore.samples.neighbor_noise import NeighborNoise
    from retro_mcore.samples.retro_dataset import build_retro_datasets
    from retro_mcore.training.loop.sample_reader import require_split
    from retro_mcore.training.loop.trainer import Trainer

    options = plan.options
    noise = NeighborNoise(
        seed=plan.project.retro_gpt_seed,
        drop_chunks=options.retro_drop_chunks,
        drop_neighbors=options.retro_drop_neighbors,
        replace_neighbors=options.retro_replace_neighbors,
        replace_tokens=options.retro_replace_tokens,
    )
    datasets = build_retro_datasets(
        options.project_dir, options.retro_num_neighbors, options.retro_num_retrieved_chunks, noise
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


def summarize(command: str, plan: TrainingPlan, result: TrainingResult) -> None:
    """Print what came of a run."""
    rows: dict[str, object] = {}
    if result.reused:
        rows["reused"] = "this training is already finished"
    rows["iterations"] = f"{result.iteration} of {plan.train_iters}"
    if result.stopped_by is not None:
        rows["stopped by"] = f"{result.stopped_by}; run it again to go on"
    rows["samples"] = result.consumed_samples
    if result.num_parameters:
        rows["parameters"] = f"{result.num_parameters:,}"
    if result.train_losses:
        rows["training loss"] = f"{result.train_losses[0]:.4f} -> {result.train_losses[-1]:.4f}"
    if result.valid_losses:
        rows["validation loss"] = f"{result.valid_losses[-1][1]:.4f}"
    if result.test_loss is not None:
        rows["test loss"] = f"{result.test_loss:.4f}"
    rows |= {f"{split} samples": text for split, text in plan.repetitions.items()}
    for name, path in (("checkpoint", result.checkpoint), ("loss curve", result.loss_curve)):
        if path is not None:
            rows[name] = path
    if not result.reused:
        rows["seconds"] = f"{result.seconds:.1f}"
    print_summary(command, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(PretrainRetroOptions, pretrain_retro, argv)


if __name__ == "__main__":
    sys.exit(main())
