"""`pretrain_retro`: train a Retro model, or its GPT twin, on a project's samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retro_mcore.cli.command import run_command
from retro_mcore.cli.tables.training import print_dry_run, print_training
from retro_mcore.distributed import initialize
from retro_mcore.platform import distributed_backend, setup_device
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


def pretrain_retro(options: PretrainRetroOptions) -> TrainingResult | DryRun:
    """Train, or resume, or find that the training is already finished; or plan a dry run.

    Raises:
        RetroError: options, project, checkpoint and processes do not fit together.
    """
    device = setup_device("cpu" if options.dry_run else options.device)
    if options.dry_run:
        from retro_mcore.training.setup.dry_run import dry_run

        planned = dry_run(options)
        print_dry_run(planned)
        return planned
    initialize(distributed_backend(), options.distributed_timeout_minutes)
    from retro_mcore.training.pretraining import pretrain

    plan, result = pretrain(options, device)
    print_training("pretrain_retro", plan, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(PretrainRetroOptions, pretrain_retro, argv)


if __name__ == "__main__":
    sys.exit(main())
