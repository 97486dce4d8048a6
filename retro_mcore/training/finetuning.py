"""A complete run of instruction tuning: plan, then train or resume. Import it after
`setup_device`."""

from __future__ import annotations

from dataclasses import replace

import torch

from retro_mcore import distributed
from retro_mcore.data.instruction.blend import parse_blend
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.loop.sample_reader import document_tokens
from retro_mcore.training.loop.trainer import Trainer, TrainingResult, finished_run
from retro_mcore.training.options.finetune import FinetuneOptions
from retro_mcore.training.pretraining import save_lock
from retro_mcore.training.setup.data_contents import contents_of_blend
from retro_mcore.training.setup.finetune_plan import (
    FinetunePlan,
    build_instruction_datasets,
    count_all_cuts,
    make_finetune_plan,
)


def finetune(options: FinetuneOptions, device: torch.device) -> tuple[FinetunePlan, TrainingResult]:
    """Tune or resume, unless the run is already finished. All ranks call it together.

    Args:
        options: The run's configuration.
        device: Device to train on, from `setup_device`.

    Raises:
        RetroError: options, data, checkpoint and processes do not match.
    """
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
    return plan, result
