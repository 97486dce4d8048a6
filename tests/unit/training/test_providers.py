"""Retro in Megatron-LM's trainer, through a stand-in for its call order."""

from __future__ import annotations

import sys
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
        ([], {"num_experts": 2}, "--num-experts: 2"),
        ([], {"mtp_num_layers": 1}, "--mtp-num-layers: 1"),
        ([], {"multi_latent_attention": True}, "--multi-latent-attention: given"),
        ([], {"context_parallel_size": 2}, "--context-parallel-size: 2"),
        ([], {"window_size": (100, 0)}, "--window-size"),
        ([], {"softmax_type": "off-by-one"}, "--softmax-type: off-by-one"),
        ([], {"position_embedding_type": "yarn"}, "--position-embedding-type: yarn"),
        ([], {"data_path": ["x"]}, "--data-path"),
        ([], {"yaml_cfg": "x.yaml"}, "--yaml-cfg"),
        (["--split", "90,10,0"], {}, "--split: 90,10,0, and the project was built with 60,20,20"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], {}, "--tokenizer-type"),
        (["--retro-mup-base-hidden-size", "16"], {}, "--retro-mup-base-hidden-size: 16"),
        (["--retro-drop-chunks", "1.5"], {}, "--retro-drop-chunks: 1.5"),
        (["--vocab-size", "9"], {}, "--vocab-size: 9, but the tokenizer"),
        ([], {"vocab_extra_ids": 100}, "--vocab-extra-ids: 100"),
        ([], {"logits_load_dir": "teacher"}, "--logits-load-dir: teacher"),
        (["--retro-encoder-hidden-size", "0"], {}, "--retro-encoder-hidden-size: 0"),
        (["--retro-attention-gate", "nan"], {}, "retro_attention_gate: nan"),
        (["--retro-encoder-hidden-dropout", "1.5"], {}, "retro_encoder_hidden_dropout: 1.5"),
    ],
)
def test_what_is_not_covered_is_refused(megatron, flags, defaults, message):
    with pytest.raises(ConfigurationError, match=message):
        pretrain(*flags, **defaults)


@pytest.mark.parametrize("name", ["num_experts", "mtp_num_layers", "context_parallel_size"])
def test_the_gpt_twin_refuses_what_its_layers_do_not_have(megatron, name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigurationError, match=f"{flag}: 2"):
        pretrain(retriever=False, **{name: 2})


def test_the_gpt_twin_refuses_noise_on_neighbors_that_it_does_not_read(megatron):
    with pytest.raises(ConfigurationError, match="--retro-drop-chunks: given without --retro-add"):
        pretrain("--retro-drop-chunks", "0.5", retriever=False)


def test_all_that_is_refused_is_told_at_once(megatron):
    noise = ("--retro-drop-chunks", "1.5", "--retro-replace-tokens", "-1")
    with pytest.raises(ConfigurationError) as caught:
        pretrain("--seq-length", "128", *noise, num_experts=2, mock_data=True)
    told = ["--seq-length: 128", "--num-experts: 2", "--mock-data: given"]
    for flag in (*told, "--retro-drop-chunks: 1.5", "--retro-replace-tokens: -1.0"):
        assert flag in str(caught.value)


def parse(*flags, extra=()):
    """The arguments of a parser of Megatron-LM's that also has the flags of `extra`."""
    from retro_mcore.training import providers

    class Wider(MegatronLM):
        def parse(self, extra_args_provider=None, args_defaults=None):
            def provider(parser):
                for flag, keywords in extra:
                    parser.add_argument(flag, **keywords)
                return extra_args_provider(parser)

            return super().parse(provider, args_defaults)

    there = Wider(command_line(*flags))
    with there.installed():
        return there.parse(providers.extra_args_provider)


NEW = [
    ("--moe-router-topk", {"type": int, "default": 2}),
    ("--multi-latent-attention", {"action": "store_true"}),
    ("--recompute-granularity", {"default": None}),
    ("--clip-grad", {"type": float, "default": 1.0}),
]


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (["--moe-router-topk", "4"], "--moe-router-topk: 4"),
        (["--moe-router-topk=4"], "--moe-router-topk: 4"),
        (["--multi-latent-attention"], "--multi-latent-attention: given"),
        (["--moe-router-topk", "2"], None),
        (["--recompute-granularity", "full", "--clip-grad", "0.5"], None),
        ([], None),
    ],
)
def test_a_flag_of_the_model_that_nobody_here_knows_is_refused(megatron, flags, refused):
    """Megatron-LM gets new kinds of layers with every release; ours must not ignore them."""
    from retro_mcore.training.provider_flags import check_arguments

    args = parse(*flags, extra=NEW)
    if refused is None:
        check_arguments(args)
    else:
        with pytest.raises(ConfigurationError, match=refused):
            check_arguments(args)


def test_every_option_of_our_model_and_of_noise_has_its_flag(megatron):
    from dataclasses import fields

    from retro_mcore.model.options import ModelOptions
    from retro_mcore.training.options.noise import NeighborNoiseOptions

    args = parse()
    for options in (ModelOptions, NeighborNoiseOptions):
        for field in fields(options):
            if field.name.startswith("retro_") and field.name != "retro_decoder_layers":
                given = getattr(args, field.name)
                assert given == field.default or field.name.endswith("_dropout"), field.name
    assert parse("--retro-encoder-layers", "3").retro_encoder_num_layers == 3


def test_the_encoders_sizes_reach_the_model(megatron):
    flags = ["--retro-encoder-hidden-size", "16", "--retro-encoder-num-attention-heads", "2"]
    flags += ["--retro-encoder-ffn-hidden-size", "24", "--retro-deepnorm"]
    flags += ["--retro-cross-attention-positions", "rotary", "--retro-drop-neighbors", "0.5"]
    config = pretrain(*flags).model.module.config
    assert config.encoder_config().hidden_size == 16
    assert config.encoder_config().ffn_hidden_size == 24
    assert config.retro_deepnorm
    assert config.retro_cross_attention_positions == "rotary"


def test_the_vocabulary_is_the_projects_without_a_tokenizer_of_megatrons(megatron):
    """GPT-2's vocabulary is looked up on a hub by Megatron-LM; clusters have none."""
    from retro_mcore.data.tokenizers.loading import load_project_tokenizer
    from retro_mcore.project import ProjectConfig, ProjectPaths

    project = ProjectConfig.load(built_project())
    size = load_project_tokenizer(project, ProjectPaths(built_project())).vocab_size
    there = pretrain(padded_vocab_size=None, make_vocab_size_divisible_by=7)
    assert there.args.tokenizer_type == "NullTokenizer"
    assert there.args.vocab_size == size
    assert there.args.padded_vocab_size == -(-size // 7) * 7
    assert there.model.module.vocab_size == there.args.padded_vocab_size
    with pytest.raises(ConfigurationError, match="--padded-vocab-size: 9"):
        pretrain(padded_vocab_size=9, use_checkpoint_args=True)


@pytest.mark.parametrize("release", [(0, 17), (0, 18), (0, 19)])
def test_a_script_without_a_main_guard_can_save(megatron, monkeypatch, release):
    """Megatron's saver would run the script again; its results go through a file instead."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from retro_mcore.platform import compatibility

    seen = []
    monkeypatch.setattr(
        MegatronLM, "train", lambda self, *_: seen.append(filesystem_async._results_queue)
    )
    before = filesystem_async._results_queue
    pretrain(release=release)
    assert isinstance(seen[0], compatibility._FileQueue)
    assert filesystem_async._results_queue is before


@pytest.mark.parametrize("error", [ConfigurationError("--flag", "x", "y"), ValueError("x")])
def test_a_refusal_ends_a_script_in_one_line_and_with_exit_code_2(monkeypatch, capsys, error):
    from retro_mcore.training.providers import end_refusals_in_one_line

    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: others.append(args))
    end_refusals_in_one_line()
    end_refusals_in_one_line()
    if isinstance(error, ValueError):
        sys.excepthook(ValueError, error, None)
        assert others == [(ValueError, error, None)]
        return
    with pytest.raises(SystemExit) as ended:
        sys.excepthook(type(error), error, None)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --flag: x. y\n"
    assert not others


def test_an_error_of_ours_survives_how_megatron_raises_it_again():
    error = ConfigurationError("--flag", "found", "Mend")
    again = type(error)(f"{error} in layer 3")
    assert str(again) == "--flag: found. Mend in layer 3"


def test_a_loss_that_is_not_finite_is_told(megatron):
    from retro_mcore.training import providers
    from retro_mcore.training.loop.loss import NonFiniteLossError

    there = MegatronLM(command_line())
    there.args = SimpleNamespace(check_for_nan_in_loss_and_grad=True)
    batch = providers.RetroBatch(*[torch.ones(1, 2)] * 4, None, None, [])
    with there.installed(), pytest.raises(NonFiniteLossError):
        providers._loss(batch, torch.tensor([[1.0, float("nan")]]))


def test_without_megatron_lm_the_command_is_named(megatron, monkeypatch):
    from retro_mcore.training import providers

    # Wheels of megatron-core from 0.17 on hold it.
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    with pytest.raises(MissingDependencyError, match=r"tools/pretrain_retro\.py"):
        providers.main()


@pytest.mark.parametrize("aligned", [False, True])
def test_batches_of_aligned_projects_have_their_loss_mask(megatron, aligned):
    from retro_mcore.training.providers import get_batch

    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    data = {"text": torch.arange(8).reshape(2, 4), **({"loss_mask": mask} if aligned else {})}
    batch = get_batch(iter([data]), retrieval=False)
    assert batch.loss_mask.tolist() == (mask if aligned else torch.ones(2, 3)).tolist()
