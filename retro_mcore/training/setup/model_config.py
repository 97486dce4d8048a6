"""Build the model's configuration from its flags, and check it against the parallel layout."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import openai_gelu

from retro_mcore.errors import ConfigurationError, RetroError, flag_of, raise_problems
from retro_mcore.model.config import RetroConfig, check_rates
from retro_mcore.model.decoder_config import DecoderConfig
from retro_mcore.model.option_traits import model_traits, passed_to
from retro_mcore.model.options import DecoderOptions, ModelArguments, ModelOptions, RetroOptions
from retro_mcore.model.specs import check_engine_attention
from retro_mcore.platform import is_cpu_in_use
from retro_mcore.training.options.megatron import LAYER_FLAGS, naming_refusals, values_of
from retro_mcore.training.options.model_sizes import (
    check_context_parallel,
    check_divisible,
    default_ffn_hidden_size,
    expert_width,
)
from retro_mcore.training.options.parallel import ParallelOptions, RecomputeOptions


def uses_transformer_engine(parallel: ParallelOptions) -> bool:
    """Whether layers come from Transformer Engine; in a dry run, those of the run that it plans.

    Raises:
        ConfigurationError: it was requested where it cannot run.
    """
    available = _on_cuda(parallel) and importlib.util.find_spec("transformer_engine") is not None
    if parallel.transformer_impl == "transformer_engine" and not available:
        raise ConfigurationError(
            "--transformer-impl",
            "transformer_engine, which is not installed, or the device is the CPU",
            "Use local or auto",
        )
    used = available and parallel.transformer_impl != "local"
    if parallel.fp8_format is not None and not used:
        raise ConfigurationError(
            "--fp8-format",
            f"{parallel.fp8_format} without Transformer Engine",
            "Install the `gpu` extra and run on CUDA, without --transformer-impl local",
        )
    return used


def _on_cuda(parallel: ParallelOptions) -> bool:
    # A dry run computes nothing, so this process is on the CPU.
    if not getattr(parallel, "dry_run", False):
        return not is_cpu_in_use()
    return parallel.device == "cuda" or (parallel.device == "auto" and torch.cuda.is_available())


def build_config(
    arguments: ModelArguments, parallel: ParallelOptions, recompute: RecomputeOptions
) -> TransformerConfig:
    """The model's configuration: a RetroConfig, or without retrieval a DecoderConfig.

    Raises:
        ConfigurationError: a value is invalid. Names the field or flag.
    """
    check_divisible(arguments, parallel)
    check_context_parallel(arguments, parallel)
    shared = {
        **_decoder_fields(arguments),
        **_layout_fields(parallel, recompute),
        **_fusion_fields(arguments, parallel, recompute),
    }
    with naming_flags(), naming_refusals():
        config = _build(arguments, shared)
        if uses_transformer_engine(parallel):
            check_engine_attention(config)
        return config


@contextmanager
def naming_flags() -> Iterator[None]:
    """Translate the fields in a configuration error to flags.

    Raises:
        ConfigurationError: as raised in the body, with `--num-layers` instead of `num_layers`.
    """
    try:
        yield
    except ConfigurationError as error:
        raise_problems([_with_flags(problem) for problem in error.problems])


def _with_flags(error: RetroError) -> RetroError:
    parts = (error.subject, error.found, error.hint)
    return type(error)(*(_FIELDS.sub(lambda match: flag_of(match[0]), part) for part in parts))


_FIELDS = re.compile(
    r"(?<![\w-])(?:"
    + "|".join(
        field.name
        for options in (ModelOptions, ParallelOptions, RecomputeOptions)
        for field in fields(options)
        if "_" in field.name
    )
    + r")(?!\w)"
)


def _build(arguments: ModelArguments, shared: dict[str, Any]) -> TransformerConfig:
    if arguments.no_retrieval:
        _refuse_without_retrieval(arguments)
        check_rates(arguments)
        return DecoderConfig(**shared)
    build: Callable[..., RetroConfig] = RetroConfig
    if arguments.retro_origin is not None:
        build = partial(RetroConfig.from_upstream, arguments.retro_origin)
    # Options that are not given are omitted, because an origin has its own defaults.
    options = passed_to("config", RetroOptions, arguments).items()
    given = {name: value for name, value in options if value is not None}
    return build(**shared, retro_chunk_length=arguments.retro_chunk_length, **given)


def _refuse_without_retrieval(arguments: ModelArguments) -> None:
    """Reject Retro options that also change the decoder; the others have no effect."""
    for name, traits in model_traits(RetroOptions).items():
        if traits.gpt == "same" and getattr(arguments, name):
            raise ConfigurationError(
                flag_of(name),
                f"{getattr(arguments, name)}, together with --no-retrieval",
                "Leave one of them out: it is meant for the model with retrieval",
            )


def _decoder_fields(arguments: ModelArguments) -> dict[str, Any]:
    return {
        **passed_to("config", DecoderOptions, arguments),
        "num_query_groups": arguments.num_query_groups or arguments.num_attention_heads,
        "ffn_hidden_size": default_ffn_hidden_size(arguments),
        "add_bias_linear": not arguments.disable_bias_linear,
        **window_fields(arguments.sliding_window, arguments.window_attn_skip_freq),
        **_expert_fields(arguments),
        **_initialization_fields(arguments),
        **activation_fields(arguments),
    }


def window_fields(window: int | None, layers: Sequence[int] | None) -> dict[str, Any]:
    """The window as Megatron states it: tokens before a position and after it, and which layers.

    Raises:
        ConfigurationError: layers are given without a window.
    """
    if window is None and layers:
        raise ConfigurationError(
            "--window-attn-skip-freq", f"{list(layers)} without --sliding-window", "Add the window"
        )
    single = layers is not None and len(layers) == 1 and layers[0] > 1
    frequency = layers[0] if layers and single else list(layers or ()) or None
    return {
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": frequency,
    }


def _expert_fields(arguments: ModelArguments) -> dict[str, Any]:
    pattern = arguments.moe_layer_freq or [1]
    if arguments.num_experts is None:
        return {}
    return {
        "num_moe_experts": arguments.num_experts,
        "moe_ffn_hidden_size": expert_width(arguments),
        "moe_layer_freq": pattern[0] if len(pattern) == 1 else pattern,
    }


def activation_fields(arguments: Any) -> dict[str, Any]:
    """The MLP's activation as Megatron states it.

    Args:
        arguments: An object that holds the options.
    """
    if arguments.swiglu:
        return {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    if arguments.geglu:
        return {"gated_linear_unit": True, "activation_func": openai_gelu}
    if arguments.squared_relu:
        return {"activation_func": squared_relu}
    return {"activation_func": openai_gelu} if arguments.openai_gelu else {}


def _initialization_fields(arguments: ModelArguments) -> dict[str, Any]:
    if not arguments.init_method_xavier_uniform:
        return {}
    uniform = torch.nn.init.xavier_uniform_
    return {"init_method": uniform, "output_layer_init_method": uniform}


def _fusion_fields(
    arguments: ModelArguments, parallel: ParallelOptions, recompute: RecomputeOptions
) -> dict[str, bool]:
    """Megatron's fusions: with Transformer Engine on as in Megatron, otherwise off.

    But for the fusion of bias and GELU: Megatron has it of GELU's tanh approximation alone.
    """
    if not uses_transformer_engine(parallel):
        return {}
    extension = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return {
        "bias_activation_fusion": arguments.swiglu and not parallel.no_bias_swiglu_fusion,
        "bias_dropout_fusion": not parallel.no_bias_dropout_fusion,
        "apply_rope_fusion": not (parallel.no_rope_fusion or arguments.rotary_interleaved),
        "gradient_accumulation_fusion": (
            extension
            and not parallel.no_gradient_accumulation_fusion
            # Offloading hands the backward pass another tensor than the parameter.
            and not recompute.cpu_offloading_num_layers
        ),
    }


def _layout_fields(parallel: ParallelOptions, recompute: RecomputeOptions) -> dict[str, Any]:
    precision = torch.bfloat16 if parallel.bf16 else torch.float16 if parallel.fp16 else None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": _exchange(parallel),
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        **_pipeline_fields(parallel, precision or torch.float32),
        "use_cpu_initialization": parallel.use_cpu_initialization or is_cpu_in_use(),
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),
        "bf16": parallel.bf16,
        "fp16": parallel.fp16,
        "params_dtype": precision or torch.float32,
        "recompute_granularity": recompute.recompute_granularity,
        "recompute_method": recompute.recompute_method,
        "recompute_num_layers": recompute.recompute_num_layers,
        "recompute_modules": recompute.recompute_modules,
        "cpu_offloading_num_layers": recompute.cpu_offloading_num_layers,
        "attention_backend": AttnBackend[parallel.attention_backend],
        **values_of(parallel, LAYER_FLAGS),
    }


def _exchange(parallel: ParallelOptions) -> str | None:
    """How context parallel ranks exchange keys and values; None: they are not divided."""
    if parallel.context_parallel_size == 1:
        return None
    if uses_transformer_engine(parallel):
        return parallel.cp_comm_type or "p2p"
    if parallel.cp_comm_type not in (None, "all_gather"):
        raise ConfigurationError(
            "--cp-comm-type",
            f"{parallel.cp_comm_type} without Transformer Engine",
            "Use all_gather, or leave it out",
        )
    return "all_gather"


def _pipeline_fields(parallel: ParallelOptions, dtype: torch.dtype) -> dict[str, Any]:
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        return {}
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    # gloo has no message tags, so batched transfers of the interleaved schedule would be mixed up.
    overlap = not (parallel.no_overlap_p2p_communication or is_cpu_in_use())
    transfers = {
        "batch_p2p_comm": not (overlap or is_cpu_in_use()),
        "overlap_p2p_comm": overlap,
    }
    return {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
        "pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout,
        "pipeline_dtype": dtype,
        **(transfers if virtual is not None else {}),
    }


def number_of_positions(arguments: ModelArguments) -> int:
    """Number of positions: enough for a sample and, if they are learned, for a neighbor.

    This is also the longest text that the model reads.

    Raises:
        ConfigurationError: --max-position-embeddings is too small.
    """
    needed = arguments.seq_length
    if not arguments.no_retrieval:
        retrieved = arguments.retro_num_retrieved_chunks * arguments.retro_chunk_length
        needed = max(needed, retrieved)
    positions = arguments.max_position_embeddings or needed
    if positions < needed:
        raise ConfigurationError(
            "--max-position-embeddings",
            f"{positions}, for texts of {needed} tokens",
            "Raise it, or leave it out; a GPT with fewer positions needs a project with shorter "
            "samples",
        )
    return positions
