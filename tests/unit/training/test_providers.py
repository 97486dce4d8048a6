"""Retro's flags in Megatron-LM's parser. `tests/distributed/test_megatron_lm.py` trains there."""

from __future__ import annotations

import argparse
import io
import sys

import pytest
import torch

from retro_mcore.errors import ConfigurationError, MissingDependencyError
from tests.unit.data.projects import built_project
from tests.unit.training.our_losses import command_line

SIZES = ("num-layers", "hidden-size", "num-attention-heads", "micro-batch-size", "train-iters")
FIXED = ("seq-length", "global-batch-size", "seed", "eval-interval", "eval-iters", "vocab-size")


def parse(*flags, extra=(), retriever=True, **defaults):
    """Arguments from Retro's flags and those that Megatron-LM's parser has in every release."""
    from retro_mcore.training.providers import extra_args_provider

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in (*SIZES, *FIXED):
        parser.add_argument(f"--{name}", type=int)
    for name in ("tokenizer-type", "split"):
        parser.add_argument(f"--{name}")
    for flag, keywords in extra:
        parser.add_argument(flag, **keywords)
    argv = sys.argv
    sys.argv = ["pretrain_retro.py", *command_line(*flags, retriever=retriever)]
    try:
        return argparse.Namespace(**{**vars(extra_args_provider(parser).parse_args()), **defaults})
    finally:
        sys.argv = argv


def check(*flags, **changes):
    from retro_mcore.training.provider_flags import check_arguments, set_tokenizer

    args = parse(*flags, **changes)
    check_arguments(args)
    set_tokenizer(args)
    return args


def test_the_projects_values_are_the_defaults(megatron):
    args = parse()
    assert args.seq_length == 64  # config.json's
    assert args.retro_chunk_length == 16
    assert args.tokenizer_type == "NullTokenizer"


STAGES = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("flags", "defaults", "message"),
    [
        (["--seq-length", "128"], {}, "--seq-length: 128, and the project was built with 64"),
        ([], STAGES | {"virtual_pipeline_model_parallel_size": 2}, "-parallel-size: 2. Leave out"),
        ([], STAGES | {"cuda_graph_impl": "local"}, "--cuda-graph-impl: local"),
        ([], STAGES | {"use_megatron_fsdp": True}, "--use-megatron-fsdp: given"),
        ([], STAGES | {"init_model_with_meta_device": True}, "--init-model-with-meta-device"),
        ([], {"eod_mask_loss": True}, "--eod-mask-loss: given"),
        ([], {"num_experts": 2}, "--num-experts: 2"),
        ([], {"mtp_num_layers": 1}, "--mtp-num-layers: 1"),
        ([], {"multi_latent_attention": True}, "--multi-latent-attention: given"),
        ([], {"context_parallel_size": 2}, "--context-parallel-size: 2"),
        (["--sliding-window", "8"], {"window_size": (8, 0)}, "--sliding-window: 8, and --window"),
        ([], {"window_attn_skip_freq": [1, 0]}, "--window-attn-skip-freq: .* without --sliding"),
        ([], {"no_rope_freq": [1, 0]}, "--no-rope-freq: .* --no-rope-layers"),
        (["--softmax-scale", "0"], {}, "--softmax-scale: 0.0"),
        (["--rotary-local-base", "0"], {}, "--rotary-local-base: 0"),
        (["--geglu"], {"swiglu": True}, "--swiglu: given together with --geglu"),
        ([], {"softmax_type": "off-by-one"}, "--softmax-type: off-by-one"),
        ([], {"position_embedding_type": "yarn"}, "--position-embedding-type: yarn"),
        ([], {"optimizer": "muon"}, "--optimizer: muon"),
        ([], {"data_path": ["x"]}, "--data-path"),
        ([], {"yaml_cfg": "x.yaml"}, "--yaml-cfg"),
        (["--split", "90,10,0"], {}, "--split: 90,10,0, and the project was built with 60,20,20"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], {}, "--tokenizer-type"),
        (["--retro-mup-base-hidden-size", "16"], {}, "-size: 16.*one learning rate"),
        (["--retro-drop-chunks", "1.5"], {}, "--retro-drop-chunks: 1.5"),
        (["--vocab-size", "9"], {}, "--vocab-size: 9, but the tokenizer"),
        ([], {"vocab_extra_ids": 100}, "--vocab-extra-ids: 100"),
        ([], {"logits_load_dir": "teacher"}, "--logits-load-dir: teacher"),
        (["--retro-encoder-hidden-size", "0"], {}, "--retro-encoder-hidden-size: 0"),
        (["--retro-attention-gate", "nan"], {}, "--retro-attention-gate: nan"),
        (["--retro-encoder-hidden-dropout", "1.5"], {}, "--retro-encoder-hidden-dropout: 1.5"),
    ],
)
def test_what_is_not_covered_is_refused(megatron, flags, defaults, message):
    with pytest.raises(ConfigurationError, match=message):
        check(*flags, **defaults)


@pytest.mark.parametrize("name", ["num_experts", "mtp_num_layers", "context_parallel_size"])
def test_the_gpt_twin_refuses_what_its_layers_do_not_have(megatron, name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigurationError, match=f"{flag}: 2"):
        check(retriever=False, **{name: 2})


def test_the_gpt_twin_refuses_noise_on_neighbors_that_it_does_not_read(megatron):
    with pytest.raises(ConfigurationError, match="--retro-drop-chunks: given without --retro-add"):
        check("--retro-drop-chunks", "0.5", retriever=False)


def test_the_gpt_twin_refuses_what_would_change_its_decoder(megatron):
    with pytest.raises(ConfigurationError, match="--retro-deepnorm: True, without --retro-add"):
        check("--retro-deepnorm", retriever=False)


def test_a_flag_that_a_release_has_itself_is_not_added_again(megatron):
    args = parse("--softmax-scale", "0.5", extra=[("--softmax-scale", {"type": float})])
    assert args.softmax_scale == 0.5


def test_all_that_is_refused_is_told_at_once(megatron):
    noise = ("--retro-drop-chunks", "1.5", "--retro-replace-tokens", "-1")
    with pytest.raises(ConfigurationError) as caught:
        check("--seq-length", "128", *noise, num_experts=2, mock_data=True)
    told = ["--seq-length: 128", "--num-experts: 2", "--mock-data: given"]
    for flag in (*told, "--retro-drop-chunks: 1.5", "--retro-replace-tokens: -1.0"):
        assert flag in str(caught.value)


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
    from retro_mcore.training.provider_flags import OURS

    args = parse()
    for options in (ModelOptions, NeighborNoiseOptions):
        for field in fields(options):
            added = field.name.startswith("retro_") or field.name in OURS
            if added and field.name != "retro_decoder_layers":
                given = getattr(args, field.name)
                assert given == field.default or field.name.endswith("_dropout"), field.name
    assert parse("--retro-encoder-layers", "3").retro_encoder_num_layers == 3


def test_more_samples_than_the_project_has_are_refused(megatron, monkeypatch):
    from retro_mcore.training import providers

    there = argparse.Namespace(get_args=check)
    monkeypatch.setattr(providers, "_megatron", lambda: there)
    with pytest.raises(ConfigurationError, match="--train-iters or --train-samples: 200 samples"):
        providers.train_valid_test_datasets_provider([200, 0, 0])


def test_the_vocabulary_is_the_projects_without_a_tokenizer_of_megatrons(megatron):
    """GPT-2's vocabulary is looked up on a hub by Megatron-LM; clusters have none."""
    from retro_mcore.data.tokenizers.loading import load_project_tokenizer
    from retro_mcore.project import ProjectConfig, ProjectPaths

    project = ProjectConfig.load(built_project())
    size = load_project_tokenizer(project, ProjectPaths(built_project())).vocab_size
    args = check(padded_vocab_size=None, make_vocab_size_divisible_by=7)
    assert args.tokenizer_type == "NullTokenizer"
    assert args.vocab_size == size
    assert args.padded_vocab_size == -(-size // 7) * 7
    with pytest.raises(ConfigurationError, match="--padded-vocab-size: 9"):
        check(padded_vocab_size=9, use_checkpoint_args=True)


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


def test_a_refusal_is_shown_when_torch_collects_the_output_of_its_hook(monkeypatch):
    """Its hook, which process groups install, calls ours with a buffer in place of stderr."""
    from retro_mcore.training.providers import _RefusalHook

    shown = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", shown)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit):
        _RefusalHook(print)(ConfigurationError, ConfigurationError("--flag", "x", "y"), None)
    assert shown.getvalue() == "error: --flag: x. y\n"


def test_an_error_of_ours_survives_how_megatron_raises_it_again():
    error = ConfigurationError("--flag", "found", "Mend")
    again = type(error)(f"{error} in layer 3")
    assert str(again) == "--flag: found. Mend in layer 3"


def test_a_loss_that_is_not_finite_is_reported(megatron, monkeypatch):
    from retro_mcore.training import providers
    from retro_mcore.training.loop.loss import NonFiniteLossError

    args = argparse.Namespace(check_for_nan_in_loss_and_grad=True)
    there = argparse.Namespace(get_args=lambda: args)
    monkeypatch.setattr(providers, "_megatron", lambda: there)
    batch = providers.RetroBatch(*[torch.ones(1, 2)] * 4, None, None, [])
    with pytest.raises(NonFiniteLossError):
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


def test_changes_of_the_model_are_told_from_those_of_its_layout(megatron):
    from retro_mcore.training.options.pretrain import ParallelOptions, RecomputeOptions
    from retro_mcore.training.provider_flags import changed_fields
    from retro_mcore.training.setup.model_config import build_config
    from tests.unit.checkpoint.test_huggingface import arguments

    def config(layout=None, recompute=None, **options):
        sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
        parallel = ParallelOptions(device="cpu", **(layout or {}))
        return build_config(
            arguments(**sizes, **options), parallel, RecomputeOptions(**(recompute or {}))
        )

    made = config()
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "bf16": True}
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    assert not list(changed_fields(config(layout, {**full, "recompute_num_layers": 1}), made))
    for change, field in (
        ({"sliding_window": 32}, "window_size"),
        ({"swiglu": True}, "gated_linear_unit"),
        ({"squared_relu": True}, "activation_func"),
        ({"hidden_dropout": 0.3}, "hidden_dropout"),
        ({"normalization": "RMSNorm"}, "normalization"),
        ({"retro_encoder_num_layers": 1}, "retro_encoder_num_layers"),
        ({"num_experts": 2, "disable_bias_linear": True}, "num_moe_experts"),
    ):
        assert field in changed_fields(config(**change), made), change
