"""`pretrain_retro`: train a Retro model, or its GPT twin, on a project's samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retro_mcore.cli.command import run_command
from retro_mcore.cli.tables.training import print_dry_run, print_training
from retro_mcore.distributed import initialize
from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.evaluation.results import require_writable
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project.atomic import write_json
from retro_mcore.training.options.run import PretrainOptions

if TYPE_CHECKING:
    from retro_mcore.training.loop.trainer import TrainingResult
    from retro_mcore.training.setup.dry_run import DryRun


@dataclass(kw_only=True)
class PretrainRetroOptions(PretrainOptions):
    """Train a Retro model on a project's samples and neighbors.

    Flags have Megatron's names. What the project's config.json fixes is taken from there. Under
    torchrun the model is trained by all processes; run again with --load, it resumes.
    """

    dry_run: bool = False
    """Print parameters, memory per GPU and FLOPs per token of this run, and stop. The project need
    not exist yet; then --seq-length, --global-batch-size, --train-samples, --vocab-size say it."""
    simulate: bool = False
    """With --dry-run: also simulate a training step of a process of each pipeline stage, in this
    process and without a GPU. Print its memory, the bytes that it sends, and its FLOPs."""
    json: str | None = None
    """With --dry-run: file to write the numbers to."""


def pretrain_retro(options: PretrainRetroOptions) -> TrainingResult | DryRun:
    """Train, or resume, or find that the training is already finished; or plan a dry run.

    Raises:
        RetroError: options, project, checkpoint and processes do not fit together.
    """
    _check_dry_run(options)
    device = setup_device("cpu" if options.dry_run else options.device)
    if options.dry_run:
        from retro_mcore.training.setup.dry_run import dry_run

        planned = dry_run(options, options.simulate)
        print_dry_run(planned)
        if options.json is not None:
            write_json(options.json, planned.as_json())
        return planned
    initialize(distributed_backend(), options.distributed_timeout_minutes)
    from retro_mcore.training.pretraining import pretrain

    plan, result = pretrain(options, device)
    print_training("pretrain_retro", plan, result)
    return result


def _check_dry_run(options: PretrainRetroOptions) -> None:
    """Reject what only a dry run reads, and a file that cannot be written."""
    for name in ("simulate", "json"):
        value = getattr(options, name)
        if value and not options.dry_run:
            found = "given" if value is True else value
            raise ConfigurationError(
                flag_of(name), f"{found} without --dry-run", "Add --dry-run, or leave it out"
            )
    if options.json is not None:
        require_writable(Path(options.json), "--json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(PretrainRetroOptions, pretrain_retro, argv)


if __name__ == "__main__":
    sys.exit(main())
