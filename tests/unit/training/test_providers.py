"""Retro in Megatron-LM's trainer, through a stand-in for its call order."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from retro_mcore.errors import ConfigurationError, MissingDependencyError
from tests.unit.data.projects import built_project
from tests.unit.training.megatron_lm import MegatronLM

SPEC = ["--spec", "retro_mcore.model.specs", "get_retro_decoder_block_spec"]


def command_line(*flags, retriever=True):
    sizes = {"num-layers": 2, "hidden-size": 32, "num-attention-heads": 4,
             "micro-batch-size": 1, "train-iters": 2}  # fmt: skip
    argv = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    argv += ["--retro-project-dir", str(built_project())]
    argv += ["--retro-encoder-hidden-dropout", "0", "--retro-encoder-attention-dropout", "0"]
    argv += ["--retro-add-retriever", "--retro-decoder-layers", "2"] if retriever else []
    return [*argv, *flags]


def pretrain(*flags, release=(0, 17), retriever=True, **defaults):
    from retro_mcore.training import providers

    with MegatronLM(
        command_line(*flags, retriever=retriever), release, **defaults
    ).installed() as there:
        providers.main()
    return there


@cache
def our_losses(**changes):
    """The same run by tools/pretrain_retro.py's trainer, with a constant learning rate."""
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro
    from tests.unit.training.small import NO_DROPOUT

    options = PretrainRetroOptions(
        project_dir=str(built_project()),
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "retro_decoder_layers": [2],
            "position_embedding_type": "rope",
            "micro_batch_size": 1,
            "train_iters": 2,
            "lr": 1e-2,
            "lr_decay_style": "constant",
            "num_workers": 0,
            "device": "cpu",
            "make_vocab_size_divisible_by": 512,
            **NO_DROPOUT,
            **changes,
        },
    )
    return pretrain_retro(options).train_losses


@pytest.mark.parametrize("release", [(0, 17), (0, 18), (0, 19)])
def test_the_losses_are_those_of_our_own_trainer(megatron, release):
    there = pretrain(*SPEC, release=release)
    assert there.losses == pytest.approx(our_losses(), abs=1e-5)
    assert there.args.seq_length == 64  # config.json's, by default
    assert there.args.retro_chunk_length == 16
    assert there.losses[1] != there.losses[0]


def test_the_gpt_twin(megatron):
    from megatron.core.models.gpt import GPTModel

    there = pretrain(retriever=False)
    assert type(there.model.module) is GPTModel
    assert there.losses == pytest.approx(our_losses(no_retrieval=True), abs=1e-5)


def test_the_numerics_of_an_origin(megatron):
    from retro_mcore.training import providers

    there = MegatronLM(command_line("--retro-origin", "mcore-0.15"))
    with there.installed():
        there.parse(providers.extra_args_provider)
        config = providers.model_provider().config
    assert config.retro_chunk_alignment == "right"
    assert not config.retro_final_layernorm


@pytest.mark.parametrize(
    ("flags", "defaults", "message"),
    [
        (["--seq-length", "128"], {}, "--seq-length: 128, and the project was built with 64"),
        (["--train-iters", "100"], {}, "--train-iters or --train-samples: 200 samples"),
        ([], {"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size: 2"),
        ([], {"eod_mask_loss": True}, "--eod-mask-loss: given"),
    ],
)
def test_what_is_not_covered_is_refused(megatron, flags, defaults, message):
    with pytest.raises(ConfigurationError, match=message):
        pretrain(*flags, **defaults)


def test_a_loss_that_is_not_finite_is_told(megatron):
    from retro_mcore.training import providers
    from retro_mcore.training.loss import NonFiniteLossError

    there = MegatronLM(command_line())
    there.args = SimpleNamespace(check_for_nan_in_loss_and_grad=True)
    batch = providers.RetroBatch(*[torch.ones(1, 2)] * 4, None, None, [])
    with there.installed(), pytest.raises(NonFiniteLossError):
        providers._loss(batch, torch.tensor([[1.0, float("nan")]]))


def test_without_megatron_lm_the_command_is_named(megatron):
    from retro_mcore.training import providers

    with pytest.raises(MissingDependencyError, match=r"tools/pretrain_retro\.py"):
        providers.main()
