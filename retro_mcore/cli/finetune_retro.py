"""`finetune_retro`: instruction tuning of a pretrained Retro model (InstructRetro, RETRO++)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retro_mcore.cli.command import run_command
from retro_mcore.cli.tables.training import print_training
from retro_mcore.distributed import initialize
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.training.options.finetune import FinetuneOptions

if TYPE_CHECKING:
    from retro_mcore.training.loop.trainer import TrainingResult


@dataclass(kw_only=True)
class FinetuneRetroOptions(FinetuneOptions):
    """Tune a pretrained Retro model on questions with passages, instructions and chats.

    Start with --load PRETRAINED --finetune; the model's options come from its checkpoint. Run
    again, and it resumes from --save. See docs/instruction_tuning.md.
    """


def finetune_retro(options: FinetuneRetroOptions) -> TrainingResult:
    """Tune, or resume, or find that the tuning is already finished.

    Raises:
        RetroError: options, data, checkpoint and processes do not fit together.
    """
    device = setup_device(options.device)
    initialize(distributed_backend(), options.distributed_timeout_minutes)
    from retro_mcore.training.finetuning import finetune

    plan, result = finetune(options, device)
    print_training("finetune_retro", plan, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(FinetuneRetroOptions, finetune_retro, argv)


if __name__ == "__main__":
    sys.exit(main())
