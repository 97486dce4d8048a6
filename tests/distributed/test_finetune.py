"""Instruction tuning on two processes gives the losses of one: packed, with and without encoder."""

from __future__ import annotations

import json

import pytest

from tests.processes import run_ranks
from tests.unit.data.projects import built_project

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODES = {
    "gate 0": {},
    "encoder": {"retro_attention_gate": 1.0, "retro_num_neighbors": 1, "pack_samples": True},
}
LAYOUTS = {
    "pipeline": {"pipeline_model_parallel_size": 2},
    "tensor and sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "distributed optimizer": {"use_distributed_optimizer": True},
    "context": {"context_parallel_size": 2},
}


def losses(project, pretrained, data, **changes):
    from retro_mcore.cli.finetune_retro import FinetuneRetroOptions, finetune_retro

    options = FinetuneRetroOptions(
        project_dir=project,
        load=pretrained,
        finetune=True,
        data_path=[data],
        passages="retrieved",
        prompt_format="reformat_prompt_short",
        seq_length=128,
        micro_batch_size=2,
        global_batch_size=4,
        train_iters=3,
        lr=1e-3,
        num_workers=0,
        device="cpu",
        **changes,
    )
    return finetune_retro(options).train_losses


def pretrain(project, folder):
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro

    pretrain_retro(
        PretrainRetroOptions(
            project_dir=project,
            save=folder,
            num_layers=4,
            hidden_size=32,
            num_attention_heads=2,
            retro_decoder_layers=[3],
            retro_encoder_num_layers=1,
            position_embedding_type="rope",
            make_vocab_size_divisible_by=64,
            micro_batch_size=2,
            train_iters=2,
            lr=1e-3,
            num_workers=0,
            device="cpu",
        )
    )


def on_one_rank(project, pretrained, data):
    return {
        (mode, layout): losses(project, pretrained, data, **MODES[mode], **LAYOUTS[layout])
        for mode in MODES
        for layout in LAYOUTS
    }


def test_every_layout_gives_the_losses_of_one_process(tmp_path):
    project, pretrained, data = str(built_project()), str(tmp_path / "model"), tmp_path / "qa.jsonl"
    passages = [{"title": "t", "text": "some words"}, {"title": "u", "text": "other words"}]
    records = [{"question": f"{n}?", "answer": f"{n % 3}", "ctxs": passages} for n in range(8)]
    data.write_text("\n".join(map(json.dumps, records)))
    pretrain(project, pretrained)
    found = run_ranks(2, on_one_rank, project, pretrained, str(data))[0]
    for mode, options in MODES.items():
        expected = losses(project, pretrained, str(data), **options)
        for layout in LAYOUTS:
            assert found[mode, layout] == pytest.approx(expected, rel=1e-5), (mode, layout)
