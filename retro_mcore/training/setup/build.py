"""Build a model from its arguments, for training or from a checkpoint."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from retro_mcore.model.config import RetroConfig
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.model import RetroModel
from retro_mcore.model.option_traits import passed_to
from retro_mcore.model.options import ModelArguments
from retro_mcore.model.specs import get_gpt_decoder_block_spec, get_retro_decoder_block_spec
from retro_mcore.platform import is_cpu_in_use
from retro_mcore.training.options.model_sizes import (
    check_trains,
    default_ffn_hidden_size,
    padded_vocab_size,
)
from retro_mcore.training.options.pretrain import ParallelOptions, RecomputeOptions
from retro_mcore.training.setup.model_config import (
    build_config,
    number_of_positions,
    uses_transformer_engine,
)

__all__ = [
    "arguments_from",
    "build_config",
    "build_model",
    "build_model_stages",
    "default_ffn_hidden_size",
    "number_of_positions",
    "padded_vocab_size",
]


def build_model_stages(
    arguments: ModelArguments,
    parallel: ParallelOptions,
    recompute: RecomputeOptions | None = None,
) -> list[DecoderModel]:
    """Build this rank's stages of the model: one, or several with the interleaved schedule.

    Raises:
        ConfigurationError: a value is invalid. Names the field or flag.
    """
    check_trains(arguments, parallel)
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    stages = [None] if virtual is None else list(range(virtual))
    return [build_model(arguments, parallel, recompute, stage) for stage in stages]


def build_model(
    arguments: ModelArguments,
    parallel: ParallelOptions,
    recompute: RecomputeOptions | None = None,
    vp_stage: int | None = None,
) -> DecoderModel:
    """Build this rank's part of the model, on its device, with initial weights.

    Megatron's groups and seeds must be set up first. With `no_retrieval`, it is the same decoder
    without encoder and cross-attention.

    Raises:
        ConfigurationError: a value is invalid. Names the field or flag.
    """
    config = build_config(arguments, parallel, recompute or RecomputeOptions())
    where = {"ignore_virtual": False, "vp_stage": vp_stage}
    model = assemble_model(
        config,
        arguments,
        uses_transformer_engine(parallel),
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        vp_stage=vp_stage,
    )
    return model if is_cpu_in_use() else model.cuda(torch.cuda.current_device())


def assemble_model(
    config: TransformerConfig, arguments: ModelArguments, engine: bool, **stage: Any
) -> DecoderModel:
    """Build a stage of the model from its configuration.

    Args:
        config: A RetroConfig, or the configuration of the GPT without retrieval.
        arguments: The arguments that it was made from.
        engine: Whether layers come from Transformer Engine.
        **stage: pre_process, post_process, vp_stage and, optionally, pg_collection of DecoderModel.
    """
    sizes: dict[str, Any] = {
        "vocab_size": arguments.padded_vocab_size,
        "share_embeddings_and_output_weights": not arguments.untie_embeddings_and_output_weights,
        "max_sequence_length": number_of_positions(arguments),
        **passed_to("model", ModelArguments, arguments),
        **stage,
    }
    if isinstance(config, RetroConfig):
        spec = get_retro_decoder_block_spec(config, engine, stage["vp_stage"])
        return RetroModel(config, spec, **sizes)
    gpt_spec = get_gpt_decoder_block_spec(config, engine, stage["vp_stage"])
    return DecoderModel(config, gpt_spec, **sizes)


def arguments_from(values: dict[str, Any]) -> ModelArguments:
    """Extract the model arguments from a checkpoint's arguments."""
    names = {field.name for field in fields(ModelArguments)}
    return ModelArguments(**{name: value for name, value in values.items() if name in names})
