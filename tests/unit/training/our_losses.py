"""A small run of tools/pretrain_retro.py's trainer, and the same run's flags for Megatron-LM."""

from __future__ import annotations

from functools import cache
from typing import Any

from tests.unit.data.projects import built_project


def command_line(*flags: str, retriever: bool = True) -> list[str]:
    """Flags for Megatron-LM's trainer."""
    sizes = {"num-layers": 2, "hidden-size": 32, "num-attention-heads": 4, "micro-batch-size": 1}
    argv = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    argv += ["--retro-project-dir", str(built_project())]
    argv += ["--retro-encoder-hidden-dropout", "0", "--retro-encoder-attention-dropout", "0"]
    argv += ["--retro-add-retriever", "--retro-decoder-layers", "2"] if retriever else []
    return [*argv, *flags]


@cache
def our_run(**changes: Any) -> Any:
    """The result of our trainer with a constant learning rate: 4 iterations."""
    from retro_mcore.cli.pretrain_retro import pretrain_retro

    return pretrain_retro(our_options(**changes))


def our_options(**changes: Any) -> Any:
    """The options of `our_run`."""
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions
    from tests.unit.training.small import NO_DROPOUT

    return PretrainRetroOptions(
        project_dir=str(built_project()),
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "retro_decoder_layers": [2],
            "position_embedding_type": "rope",
            "micro_batch_size": 1,
            "lr": 1e-2,
            "lr_decay_style": "constant",
            "num_workers": 0,
            "device": "cpu",
            "make_vocab_size_divisible_by": 512,
            **NO_DROPOUT,
            **changes,
        },
    )
