"""Flags: megatron's names and defaults, refusals by name, and the resolved flags for a next run."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import yaml

from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions
from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.config_fields import config_fields
from retro_mcore.training.options import local_checkpoints
from retro_mcore.training.options import megatron as megatron_flags
from retro_mcore.training.options.pretrain import TrainingOptions
from retro_mcore.training.options.unsupported import UnsupportedOptions
from tests.unit.training.small import small_plan, small_trainer

REQUIRED = (
    "--project-dir p --num-layers 2 --hidden-size 8 --num-attention-heads 2 --micro-batch-size 1 "
    "--lr 1e-3 "
)


def parse(flags):
    return parse_options(PretrainRetroOptions, (REQUIRED + flags).split())


@pytest.mark.usefixtures("megatron")
def test_generated_flags_have_the_defaults_of_the_installed_megatron():
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    for flags, config, options in (
        (megatron_flags.LAYER_FLAGS, TransformerConfig, megatron_flags.LayerFlags),
        (
            megatron_flags.DATA_PARALLEL_FLAGS,
            DistributedDataParallelConfig,
            megatron_flags.DataParallelFlags,
        ),
        (megatron_flags.OPTIMIZER_FLAGS, OptimizerConfig, megatron_flags.OptimizerFlags),
    ):
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        generated = {field.name: field.default for field in dataclasses.fields(options)}
        assert generated == {flag: defaults[name] for flag, name in flags.items()}


def test_a_command_line_of_megatrons_is_read():
    options = parse(
        "--swiglu --normalization RMSNorm --disable-bias-linear --rotary-percent 0.5 "
        "--group-query-attention --num-query-groups 2 --kv-channels 4 "
        "--untie-embeddings-and-output-weights --init-method-std 0.01 "
        "--no-masked-softmax-fusion --no-bias-swiglu-fusion --no-fp8-wgrad "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--fp8-format hybrid --recompute-granularity selective --attention-backend flash "
        "--exit-signal-handler --initial-loss-scale 65536 --decoupled-lr 1e-4"
    )
    assert options.overlap_param_gather
    assert options.no_bias_swiglu_fusion
    assert not options.fp8_wgrad
    assert options.fp8_format == "hybrid"
    assert options.exit_signal_handler
    assert (options.initial_loss_scale, options.decoupled_lr) == (65536, 1e-4)
    assert not parse("--no-exit-signal-handler").exit_signal_handler


def test_generated_flags_take_only_what_megatron_takes(capsys):
    with pytest.raises(SystemExit):
        parse("--fp8-format e5m2")
    assert "hybrid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"context_parallel_size": 4}, "--context-parallel-size: 4, for samples of 32 tokens"),
        ({"context_parallel_size": 0}, "--context-parallel-size: 0"),
        ({"cp_comm_type": "p2p"}, "--cp-comm-type: p2p, which has no effect"),
        ({"tp_comm_overlap": True}, "--tp-comm-overlap: given"),
        ({"cpu_offloading": True}, "--cpu-offloading: given"),
        ({"fine_grained_activation_offloading": True}, "--fine-grained-activation-offloading"),
        ({"optimizer": "adagrad"}, "--optimizer: adagrad"),
        ({"reset_position_ids": True}, "--reset-position-ids: given with rotary positions"),
        (
            {"save": "run", "non_persistent_ckpt_type": "global"},
            "--non-persistent-ckpt-type: global, but",
        ),
        (
            {"save": "run", "non_persistent_ckpt_type": "in_memory"},
            "--non-persistent-ckpt-type: in_memory, which",
        ),
        (
            {"save": "run", "non_persistent_ckpt_type": "local"},
            "--non-persistent-ckpt-type: local without --non-persistent-save-interval",
        ),
        (
            {"non_persistent_ckpt_type": "local"},
            "--non-persistent-ckpt-type: given without --save",
        ),
        (
            {"non_persistent_save_interval": 2},
            "--non-persistent-save-interval: given without --non-persistent-ckpt-type",
        ),
        (
            {"save": "run", "save_interval": 3, "non_persistent_save_interval": 6},
            "--non-persistent-save-interval: 6, with --save-interval 3, which is due at all",
        ),
        ({"non_persistent_local_ckpt_dir": "x"}, "--non-persistent-local-ckpt-dir: given without"),
        ({"non_persistent_local_ckpt_algo": "atomic"}, "--non-persistent-local-ckpt-algo: given"),
        ({"non_persistent_global_ckpt_dir": "x"}, "--non-persistent-global-ckpt-dir: x, but"),
        ({"replication": True}, "--replication: given without --non-persistent-ckpt-type"),
        ({"replication_jump": 2}, "--replication-jump: given without --replication"),
        ({"replication_factor": 3}, "--replication-factor: given without --replication"),
        (
            {"load": "run", "override_opt_param_scheduler": True, "finetune": True},
            "--override-opt-param-scheduler: given together with --finetune",
        ),
        ({"fp8_format": "hybrid"}, "--fp8-format: hybrid without --bf16"),
        ({"overlap_param_gather": True}, "--overlap-param-gather: given without --use-dist"),
        ({"swiglu": True, "squared_relu": True}, "--squared-relu: given together with --swiglu"),
        ({"group_query_attention": True}, "--group-query-attention: given without"),
        ({"recompute_modules": ["mlp"]}, "--recompute-modules: mlp, which has no effect"),
        ({"lr_decay_style": "WSD"}, "--lr-decay-style: WSD without a decay"),
        ({"lr_wsd_decay_iters": 2}, "--lr-wsd-decay-iters: given with --lr-decay-style linear"),
        ({"lr_decay_iters": 2, "lr_decay_samples": 8}, "--lr-decay-iters: given together with"),
        ({"lr_warmup_samples": 24}, "--lr-warmup-samples: 24"),
        ({"lr_warmup_init": 1.0}, "--lr-warmup-init: 1.0"),
        ({"start_weight_decay": 0.1}, "--weight-decay-incr-style: constant, with"),
        ({"weight_decay_incr_style": "linear"}, "--start-weight-decay: None"),
        ({"wandb_exp_name": "x"}, "--wandb-project: not given"),
        ({"wandb_project": "x"}, "--wandb-exp-name: not given"),
        ({"device_peak_tflops": 0.0}, "--device-peak-tflops: 0.0"),
        ({"rampup_batch_size": [2, 2]}, "--rampup-batch-size: 2 2"),
        ({"rampup_batch_size": [1, 2, 8]}, "--rampup-batch-size: 1 2 8"),
        (
            {"rampup_batch_size": [2, 2, 8], "train_iters": 2},
            "--train-iters: given with --rampup-batch-size",
        ),
    ],
)
@pytest.mark.usefixtures("megatron")
def test_what_cannot_work_is_refused_by_name(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        small_plan(**flags)


@pytest.mark.usefixtures("megatron")
def test_local_checkpoints_without_their_package_are_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(local_checkpoints, "find_spec", lambda name: None)
    flags = {
        "save": "run",
        "non_persistent_ckpt_type": "local",
        "non_persistent_save_interval": 2,
        "non_persistent_local_ckpt_dir": "node",
    }
    with pytest.raises(ConfigurationError, match=r"nvidia-resiliency-ext is missing.*pip install"):
        small_plan(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--fp8-recipe mxfp8", "--fp8-recipe: mxfp8, which has no effect"),
        ("--no-fp8-wgrad", "--fp8-wgrad: False, which has no effect"),
        ("--bf16 --fp8-format hybrid --no-fp8-wgrad", "--fp8-wgrad: False, which has no effect"),
        (
            "--bf16 --fp8-format hybrid --fp8-recipe mxfp8 --fp8-margin 1",
            "--fp8-margin: 1, which the recipe mxfp8 does not read",
        ),
        (
            "--bf16 --fp8-format hybrid --fp8-recipe blockwise --fp8-dot-product-attention",
            "--fp8-dot-product-attention: True, which the recipe blockwise",
        ),
        ("--bf16 --fp8-format hybrid --fp8-recipe custom", "--fp8-recipe: custom"),
        (
            "--bf16 --fp8-format hybrid --num-layers-at-end-in-bf16 2",
            "--num-layers-at-end-in-bf16: 2, which has no effect",
        ),
        ("--optimizer sgd --adam-beta1 0.5", "--adam-beta1: given with --optimizer sgd"),
        ("--optimizer muon --bf16 --loss-scale 8", "--loss-scale: given with --optimizer muon"),
        ("--offload-modules mlp_norm", "--offload-modules: "),
        ("--optimizer-cpu-offload", "--optimizer-cpu-offload: given"),
        ("--optimizer-offload-fraction 0.5", "--optimizer-offload-fraction: 0.5, but"),
        ("--bf16 --fp8-format hybrid --fp8-param-gather", "--fp8-param-gather: given"),
        ("--fp4-format e2m1", "--fp4-format: e2m1, but"),
    ],
)
def test_low_precision_and_offloading_without_effect_are_refused_by_name(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        parse(flags).check()


def test_each_such_field_of_megatrons_is_honoured_or_refused(capsys):
    honoured = {
        *megatron_flags.LAYER_FLAGS.values(),
        *megatron_flags.DATA_PARALLEL_FLAGS.values(),
        *megatron_flags.OPTIMIZER_FLAGS.values(),
        "cpu_offloading_num_layers",
    }
    refused = {field.name for field in dataclasses.fields(UnsupportedOptions)}
    options = {field.name for field in dataclasses.fields(TrainingOptions)}
    unknown = {
        field.name
        for config in ("TransformerConfig", "ModelParallelConfig", "OptimizerConfig")
        for field in config_fields(config)
        if re.search("fp8|fp4|offload", field.name) and field.name not in honoured | refused
    }
    assert unknown
    assert not unknown & options
    with pytest.raises(SystemExit):  # of an unknown flag
        parse("--fp8-interval 1")
    assert "--fp8-interval" in capsys.readouterr().err


@pytest.mark.usefixtures("megatron")
def test_the_recipe_of_fp8_reaches_layers_and_optimizer():
    from retro_mcore.training.loop.optimizer import _optimizer_config

    fp8 = {"fp8_format": "hybrid", "fp8_recipe": "blockwise", "bf16": True}
    plan = small_plan(**fp8)
    layers = megatron_flags.values_of(plan.options, megatron_flags.LAYER_FLAGS)
    assert (layers["fp8"], layers["fp8_recipe"]) == ("hybrid", "blockwise")
    assert _optimizer_config(plan, torch.bfloat16).fp8_recipe == "blockwise"
    assert _optimizer_config(small_plan(), torch.float32).fp8_recipe is None


@pytest.mark.usefixtures("megatron")
def test_fp8_without_transformer_engine_is_refused_by_name():
    from retro_mcore.training.setup.build import build_config

    plan = small_plan(fp8_format="hybrid", bf16=True)
    with pytest.raises(ConfigurationError, match="--fp8-format: hybrid without Transformer Engine"):
        build_config(plan.arguments, plan.options, plan.options)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("flags", "fused"),
    [
        ({}, False),  # Megatron's kernel computes the tanh approximation, under GELU's name
        ({"openai_gelu": True}, False),
        ({"geglu": True}, False),
        ({"swiglu": True}, True),
        ({"swiglu": True, "no_bias_swiglu_fusion": True}, False),
    ],
)
def test_with_transformer_engine_activations_are_fused_where_they_stay_the_same(
    monkeypatch, flags, fused
):
    from retro_mcore.training.setup import model_config

    monkeypatch.setattr(model_config, "uses_transformer_engine", lambda _: True)
    plan = small_plan(**flags)
    found = model_config._fusion_fields(plan.arguments, plan.options, plan.options)
    assert found["bias_activation_fusion"] is fused


@pytest.mark.usefixtures("megatron")
def test_what_megatron_refuses_is_told_as_a_mistake_of_the_flags():
    from retro_mcore.training.setup.build import build_config

    plan = small_plan(recompute_granularity="selective", recompute_modules=["everything"])
    with pytest.raises(ConfigurationError, match=r"the flags: megatron-core refuses them: .*every"):
        build_config(plan.arguments, plan.options, plan.options)
    with pytest.raises(ConfigurationError, match="use-precision-aware-optimizer"):
        small_trainer(use_precision_aware_optimizer=True)


@pytest.mark.usefixtures("megatron")
def test_flags_reach_megatrons_configurations():
    from megatron.core.activations import squared_relu

    from retro_mcore.training.setup.build import build_config

    plan = small_plan(
        squared_relu=True,
        init_method_xavier_uniform=True,
        embedding_init_method_std=1.0,
        rotary_interleaved=True,
        fp32_residual_connection=True,
        recompute_granularity="selective",
        recompute_modules=["core_attn"],
        attention_backend="fused",
    )
    config = build_config(plan.arguments, plan.options, plan.options)
    assert config.activation_func is squared_relu
    assert config.embedding_init_method_std == 1.0
    assert config.rotary_interleaved
    assert config.fp32_residual_connection
    assert config.attention_backend.name == "fused"
    assert config.recompute_modules == ["core_attn"]


@pytest.mark.usefixtures("megatron")
def test_the_resolved_flags_give_the_same_run_again(tmp_path):
    first = small_plan(
        save=str(tmp_path),
        lr_warmup_fraction=0.5,
        retro_decoder_layers=[2],
        bf16=True,
        exit_signal_handler=False,
        rampup_batch_size=[2, 2, 8],
    )
    path = first.save_options()
    saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert saved["seq_length"] == 32
    assert saved["adam_beta2"] == 0.999
    assert saved["train_samples"] == first.train_samples
    options = parse_options(PretrainRetroOptions, ["--config", str(path)])
    assert not options.exit_signal_handler
    names = [field.name for field in dataclasses.fields(TrainingOptions)]
    again = small_plan(**{name: getattr(options, name) for name in names})
    assert again.configuration() == first.configuration()
    assert again.resolved_options() == first.resolved_options()
