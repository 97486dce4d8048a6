"""Layer specs: the decoder with chunked cross-attention, its GPT twin, and the neighbor encoder.

One builder serves Transformer Engine and local modules, through Megatron-Core's
BackendSpecProvider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import (
    CrossAttentionSubmodules,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from retro_mcore.errors import ConfigurationError
from retro_mcore.model.cached_attention import RetroSelfAttention
from retro_mcore.model.chunked_cross_attention import (
    ChunkedCrossAttention,
    EncoderCrossAttention,
    RetroBiasDropoutAdd,
)
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.deepnorm import DeepNormAdd, DeepNormCrossAdd
from retro_mcore.model.expert_options import expert_layers
from retro_mcore.model.family_layers import (
    AllGroupsNorm,
    AllHeadsNorm,
    ParallelResidualLayer,
    SublayerAdd,
)
from retro_mcore.model.family_options import family_option
from retro_mcore.model.pipeline import (
    RetroTransformerLayer,
    carries_neighbors,
    is_interleaved,
    stage_layer_numbers,
)
from retro_mcore.platform.attention import SDPAttention
from retro_mcore.platform.backends import NormsApart, get_backend, get_mlp
from retro_mcore.platform.experts import get_experts
from retro_mcore.platform.gathered_attention import GatheredAttention


@dataclass
class RetroBlockSubmodules(TransformerBlockSubmodules):
    """The decoder's layers, and the neighbor encoder's for the stage that holds it."""

    neighbor_encoder: TransformerBlockSubmodules | None = None


def get_retro_decoder_block_spec(
    config: RetroConfig,
    use_transformer_engine: bool = False,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> RetroBlockSubmodules:
    """The Retro decoder: GPT layers, of which `config.retro_layer_numbers` cross-attend.

    Args:
        config: The model's configuration.
        use_transformer_engine: Transformer Engine's modules, else megatron's local ones.
        vp_stage: Virtual pipeline stage.
        pp_rank: Pipeline rank; this process's by default.

    Raises:
        MissingDependencyError: Transformer Engine was asked for and does not import.
    """
    backend = get_backend(use_transformer_engine)
    retro_layers = config.retro_layer_numbers
    numbers = stage_layer_numbers(config, vp_stage, pp_rank)
    layer_specs = [
        _layer_spec(
            config,
            backend,
            AttnMaskType.causal,
            ChunkedCrossAttention if number in retro_layers else None,
            has_experts=number in decoder_expert_layers(config),
        )
        for number in numbers
    ]
    if _packs_at_the_end(config, numbers, vp_stage, pp_rank):
        if not family_option(config, "parallel_residual"):
            layer_specs[-1].module = RetroTransformerLayer
        layer_specs[-1].params["packing"] = True
    return RetroBlockSubmodules(
        layer_specs=layer_specs,
        layer_norm=_final_layer_norm(config, backend) if config.retro_final_layernorm else None,
        neighbor_encoder=(
            get_neighbor_encoder_block_spec(config, use_transformer_engine)
            if retro_layers[0] in numbers
            else None
        ),
    )


def _packs_at_the_end(
    config: RetroConfig, numbers: range, vp_stage: int | None, pp_rank: int | None
) -> bool:
    """Whether the stage's last layer packs neighbors (or, interleaved, zeros) into its output."""
    if pp_rank is None:
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    last_stage = (config.virtual_pipeline_model_parallel_size or 1) - 1
    is_last_rank = pp_rank == config.pipeline_model_parallel_size - 1
    if is_last_rank and (vp_stage or 0) == last_stage:
        return False
    packs = is_interleaved(config) or carries_neighbors(config, numbers.stop - 1)
    if packs and not numbers:
        raise ConfigurationError(
            "pipeline_model_parallel_layout",
            f"pipeline rank {pp_rank} has a stage without decoder layers",
            "Give it a layer: it must pass the encoded neighbors on",
        )
    return packs


def get_gpt_decoder_block_spec(
    config: TransformerConfig,
    use_transformer_engine: bool = False,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The same decoder without retrieval, for a DecoderModel: the baseline to compare with."""
    backend = get_backend(use_transformer_engine)
    sparse = decoder_expert_layers(config)
    return TransformerBlockSubmodules(
        layer_specs=[
            _layer_spec(config, backend, AttnMaskType.causal, has_experts=number in sparse)
            for number in stage_layer_numbers(config, vp_stage, pp_rank)
        ],
        layer_norm=_final_layer_norm(config, backend),
    )


def get_neighbor_encoder_block_spec(
    config: RetroConfig, use_transformer_engine: bool = False
) -> TransformerBlockSubmodules:
    """The neighbor encoder: bidirectional layers, the first with cross-attention to the chunk."""
    backend = get_backend(use_transformer_engine)
    encoder_config = config.encoder_config()
    return TransformerBlockSubmodules(
        layer_specs=[
            _layer_spec(
                encoder_config,
                backend,
                AttnMaskType.no_mask,
                EncoderCrossAttention if number == 1 else None,
                key_value_size=config.hidden_size,
            )
            for number in range(1, config.retro_encoder_num_layers + 1)
        ]
    )


def decoder_expert_layers(config: TransformerConfig) -> list[int]:
    """Numbers of the decoder layers with experts, from 1."""
    return expert_layers(config.num_moe_experts, config.moe_layer_freq, config.num_layers)


def _layer_norm(config: TransformerConfig, backend: Any, for_qk: bool = False) -> type:
    return backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=for_qk)


def _final_layer_norm(config: TransformerConfig, backend: Any) -> type | None:
    return None if _is_deepnorm(config) else _layer_norm(config, backend)


def _is_deepnorm(config: TransformerConfig) -> bool:
    return isinstance(config, RetroConfig) and config.retro_deepnorm


def _layer_spec(
    config: TransformerConfig,
    backend: Any,
    attn_mask_type: AttnMaskType,
    cross_attention: type | None = None,
    has_experts: bool = False,
    **cross_attention_params: Any,
) -> ModuleSpec:
    deepnorm = _is_deepnorm(config)
    norms = family_option(config, "sublayer_norms")
    if deepnorm or norms == "post":
        backend = NormsApart(backend)
    fused = backend.fuse_layernorm_and_linear()
    linear_qkv = (
        backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear()
    )
    norm = _layer_norm(config, backend)
    # Neither bidirectional masks (below) nor limited scores are Transformer Engine's.
    bidirectional = attn_mask_type == AttnMaskType.no_mask
    own_attention = bidirectional or family_option(config, "attention_softcap") is not None
    submodules = TransformerLayerSubmodules(
        input_layernorm=IdentityOp if fused else norm,
        self_attention=ModuleSpec(
            module=RetroSelfAttention,
            params={"attn_mask_type": attn_mask_type},
            submodules=SelfAttentionSubmodules(
                linear_qkv=linear_qkv,
                # Retrieved chunks are padded inside, not only at the end, which Transformer
                # Engine's padding masks cannot say.
                core_attention=_core_attention(config, backend, own_attention),
                linear_proj=backend.row_parallel_linear(),
                **_qk_norms(config, backend),
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        # Transformer Engine fuses the norm into the first linear layer, not into a router.
        pre_mlp_layernorm=IdentityOp if fused and not has_experts else norm,
        mlp=get_experts(backend, config) if has_experts else get_mlp(backend),
        mlp_bda=get_bias_dropout_add,
    )
    if cross_attention is not None:
        submodules.pre_cross_attn_layernorm = norm
        submodules.cross_attention = ModuleSpec(
            module=cross_attention,
            params=cross_attention_params,
            submodules=CrossAttentionSubmodules(
                linear_q=backend.column_parallel_linear(),
                linear_kv=backend.column_parallel_linear(),
                core_attention=SDPAttention,
                linear_proj=backend.row_parallel_linear(),
            ),
        )
        submodules.cross_attn_bda = RetroBiasDropoutAdd
    if deepnorm:
        _norm_after_adding(config, submodules, norm)
    else:
        _add_as_the_family(config, submodules, norm)
    if not fused:
        # Checkpoints carry Transformer Engine's names, so that either spec loads them.
        names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        names |= {} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        submodules.sharded_state_dict_keys_map = names
    parallel = family_option(config, "parallel_residual")
    module = ParallelResidualLayer if parallel else TransformerLayer
    return ModuleSpec(module=module, submodules=submodules)


def check_engine_attention(config: TransformerConfig) -> None:
    """Reject what Transformer Engine's self-attention was not tested with.

    Raises:
        ConfigurationError: sequences are cut and have a window.
    """
    own_attention = family_option(config, "attention_softcap") is not None
    if own_attention or config.context_parallel_size == 1 or config.window_size is None:
        return
    raise ConfigurationError(
        "context_parallel_size",
        f"{config.context_parallel_size} with window_size {config.window_size} in Transformer "
        "Engine's attention, which was not tested",
        "Use local layers (--transformer-impl local)",
    )


def _core_attention(config: TransformerConfig, backend: Any, own_attention: bool) -> type:
    """The core attention of self-attention; our own needs keys gathered if sequences are cut.

    Raises:
        ConfigurationError: Transformer Engine's attention would have a window and cut sequences.
    """
    attention = SDPAttention if own_attention else backend.core_attention()
    if attention is not SDPAttention:
        check_engine_attention(config)
        return attention
    return SDPAttention if config.context_parallel_size == 1 else GatheredAttention


def _qk_norms(config: TransformerConfig, backend: Any) -> dict[str, type]:
    """The norms of queries and keys."""
    if not config.qk_layernorm:
        return {"q_layernorm": IdentityOp, "k_layernorm": IdentityOp}
    if family_option(config, "qk_layernorm_over") == "all_heads":
        return {"q_layernorm": AllHeadsNorm, "k_layernorm": AllGroupsNorm}
    norm = _layer_norm(config, backend, for_qk=True)
    return {"q_layernorm": norm, "k_layernorm": norm}


def _add_as_the_family(
    config: TransformerConfig, submodules: TransformerLayerSubmodules, norm: type
) -> None:
    """The family's places for the norms, and its way of adding to the stream."""
    place = family_option(config, "sublayer_norms")
    if place == "post":
        submodules.input_layernorm = submodules.pre_mlp_layernorm = IdentityOp
    plain = place == "pre" and family_option(config, "residual_multiplier") == 1.0
    if not plain:
        params = {"config": config, "norm": None if place == "pre" else norm}
        submodules.self_attn_bda = ModuleSpec(module=SublayerAdd, params=params)
    if not plain or family_option(config, "parallel_residual"):
        params = {"config": config, "norm": None if place == "pre" else norm}
        submodules.mlp_bda = ModuleSpec(module=SublayerAdd, params=params)


def _norm_after_adding(
    config: TransformerConfig, submodules: TransformerLayerSubmodules, norm: type
) -> None:
    """DeepNorm's places for the norms."""
    submodules.input_layernorm = submodules.pre_mlp_layernorm = IdentityOp
    submodules.pre_cross_attn_layernorm = IdentityOp
    add = ModuleSpec(module=DeepNormAdd, params={"config": config, "norm": norm})
    submodules.self_attn_bda = submodules.mlp_bda = add
    if submodules.cross_attention is not IdentityOp:
        submodules.cross_attn_bda = ModuleSpec(module=DeepNormCrossAdd, params={"norm": norm})
