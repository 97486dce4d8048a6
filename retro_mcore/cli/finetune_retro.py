"""`finetune_retro`: instruction tuning of a pretrained Retro model (InstructRetro, RETRO++)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from retro_mcore import distributed
from retro_mcore.cli.command import run_command
from retro_mcore.cli.pretrain_retro import save_lock, summarize
from retro_mcore.data.instruction.blend import parse_blend
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
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
    distributed.initialize(distributed_backend())
    # Megatron is imported only after the device is set up.
    from retro_mcore.training.loop.sample_reader import document_tokens
    from retro_mcore.training.loop.trainer import Trainer, finished_run
    from retro_mcore.training.setup.data_contents import contents_of_blend
    from retro_mcore.training.setup.finetune_plan import (
        build_instruction_datasets,
        count_all_cuts,
        make_finetune_plan,
    )

    with distributed.raise_together():
        project = ProjectConfig.load(options.project_dir)
        tokenizer = load_project_tokenizer(project, ProjectPaths(options.project_dir))
        plan = make_finetune_plan(options, project, tokenizer.vocab_size)
        plan.check_layers()
        parts = parse_blend(options.data_path, options.data_folder)
    contents = distributed.on_first_rank(lambda: contents_of_blend(parts))
    with distributed.raise_together():
        plan = replace(plan, contents=contents, document_tokens=document_tokens(tokenizer))
        result = finished_run(plan)
    if result is None:
        with save_lock("finetune_retro", options.save) as alone:
            with distributed.raise_together():
                train, valid = build_instruction_datasets(plan, tokenizer)
            plan = replace(plan, passes=count_all_cuts(plan, (train, valid), tokenizer))
            result = Trainer(plan, train, valid, device, alone).train()
    summarize("finetune_retro", plan, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(FinetuneRetroOptions, finetune_retro, argv)


if __name__ == "__main__":
    sys.exit(main())
