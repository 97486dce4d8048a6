"""Configuration of Retro as a transformers model.

This file and those that it is saved with import torch and transformers only: `save_pretrained`
copies them beside the weights, so that the model loads where retro-mcore is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .problems_retro import problems_of_layers

#: How the implementations that Megatron shipped differ from the paper's model.
ORIGINS: dict[str | None, dict[str, Any]] = {
    None: {
        "retro_chunk_alignment": "left",
        "retro_encoder_positions": True,
        "retro_encoder_residual": "raw",
        "retro_final_layernorm": True,
        "retro_mask_padding": True,
    },
    "mcore-0.15": {
        "retro_chunk_alignment": "right",
        "retro_encoder_positions": False,
        "retro_encoder_residual": "normed",
        "retro_final_layernorm": False,
        "retro_mask_padding": False,
    },
    "mcore-0.5": {
        "retro_chunk_alignment": "right",
        "retro_encoder_positions": False,
        "retro_encoder_residual": "normed",
        "retro_final_layernorm": True,
        "retro_mask_padding": False,
    },
    "legacy": {
        "retro_chunk_alignment": "right",
        "retro_encoder_positions": False,
        "retro_encoder_residual": "raw",
        "retro_final_layernorm": True,
        "retro_mask_padding": False,
    },
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "retro_origin": tuple(ORIGINS),
    "normalization": ("LayerNorm", "RMSNorm"),
    "position_embedding_type": ("learned_absolute", "rope"),
    "retro_chunk_alignment": ("left", "right"),
    "retro_encoder_residual": ("raw", "normed"),
    "retro_encoder_input": ("raw", "normed"),
    "retro_cross_attention_keys": ("own", "previous", "mixed"),
    "retro_cross_attention_positions": ("none", "rotary"),
    "sublayer_norms": ("pre", "post", "both"),
    "qk_layernorm_over": ("head", "all_heads"),
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_router_dtype": (None, "fp32", "fp64"),
}


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Sizes and options of a stack of layers: the decoder's or the neighbor encoder's.

    The defaults are those of the neighbor encoder, which has none of a family's options.

    Attributes:
        hidden_size: Width of the hidden states.
        ffn_hidden_size: Width of the MLP.
        heads: Attention heads.
        groups: Key and value heads.
        channels: Width of a head.
        softmax_scale: Factor of the attention scores.
        hidden_dropout, attention_dropout, cross_attention_dropout: Rates.
        residual_scale: DeepNorm's factor of the residual; 1 without it.
        deepnorm_beta: DeepNorm's factor of initial weights; 1 without it.
        sublayer_norms: Place of the norms: "pre", "post" or "both".
        norms_all_heads: The norms of queries and keys run over all heads together.
        parallel_residual: The MLP reads the layer's input.
        residual_multiplier: Factor on the outputs of self-attention and MLP.
        attention_softcap: Limit of the scores in self-attention.
        rotary_factor: Factor on the channels of queries and keys that are rotated.
    """

    hidden_size: int
    ffn_hidden_size: int
    heads: int
    groups: int
    channels: int
    softmax_scale: float
    hidden_dropout: float
    attention_dropout: float
    cross_attention_dropout: float
    residual_scale: float
    deepnorm_beta: float
    sublayer_norms: str = "pre"
    norms_all_heads: bool = False
    parallel_residual: bool = False
    residual_multiplier: float = 1.0
    attention_softcap: float | None = None
    rotary_factor: float = 1.0


class RetroConfig(PretrainedConfig):
    """Configuration of `RetroForCausalLM`.

    The options have the names and meanings of retro-mcore's model options, except:

    Args:
        vocab_size: Rows of the embedding, padding included.
        tokenizer_vocab_size: Tokens of the tokenizer. In evaluation mode the logits of rows from
            there on are the lowest number. None: every row is a token.
        moe_layer_freq: Also Megatron's number N: experts in the first of every N layers.
        retro_encoder_input: "raw" unless given, as in models from before the option existed.
        retro_cross_attention_keys: "own" unless given, for the same reason.
        retro_origin: Implementation whose numerics the next five follow unless given: None (the
            paper's), "mcore-0.15", "mcore-0.5" or "legacy".
        retro_chunk_alignment: Chunks start at the first token ("left") or end at the last one.
        retro_encoder_positions: Rotary embedding applies inside the neighbor encoder.
        retro_encoder_residual: What the encoder adds its cross-attention to: "raw" or "normed".
        retro_final_layernorm: The decoder ends with a norm.
        retro_mask_padding: Padding and missing neighbors are masked. Otherwise they are read as
            `pad_token_id`, as the retired Megatron implementations did.

    Raises:
        ValueError: options have unknown values or cannot work together; names all of them.
    """

    model_type = "retro"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
    }

    def __init__(
        self,
        vocab_size: int = 50304,
        tokenizer_vocab_size: int | None = None,
        num_layers: int = 12,
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        num_query_groups: int | None = None,
        ffn_hidden_size: int | None = None,
        kv_channels: int | None = None,
        normalization: str = "LayerNorm",
        norm_epsilon: float = 1e-5,
        apply_layernorm_1p: bool = False,
        swiglu: bool = False,
        openai_gelu: bool = False,
        squared_relu: bool = False,
        geglu: bool = False,
        position_embedding_type: str = "learned_absolute",
        rotary_percent: float = 1.0,
        rotary_base: float = 10000,
        use_rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        max_position_embeddings: int = 2048,
        rotary_interleaved: bool = False,
        rotary_seq_len_interpolation_factor: float | None = None,
        disable_bias_linear: bool = False,
        add_qkv_bias: bool = False,
        qk_layernorm: bool = False,
        sliding_window: int | None = None,
        window_attn_skip_freq: int | list[int] | None = None,
        sublayer_norms: str = "pre",
        qk_layernorm_over: str = "head",
        parallel_residual: bool = False,
        embedding_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
        softmax_scale: float | None = None,
        attention_softcap: float | None = None,
        logit_softcap: float | None = None,
        no_rope_layers: list[int] | None = None,
        rotary_frequencies: list[float] | None = None,
        rotary_attention_factor: float = 1.0,
        rotary_local_base: int | None = None,
        rotary_local_layers: list[int] | None = None,
        num_experts: int | None = None,
        moe_layer_freq: int | list[int] | None = None,
        moe_ffn_hidden_size: int | None = None,
        moe_shared_expert_intermediate_size: int | None = None,
        moe_shared_expert_gate: bool = False,
        moe_router_topk: int = 2,
        moe_router_pre_softmax: bool = False,
        moe_router_score_function: str = "softmax",
        moe_router_topk_scaling_factor: float | None = None,
        moe_router_num_groups: int | None = None,
        moe_router_group_topk: int | None = None,
        moe_router_dtype: str | None = None,
        moe_router_load_balancing_type: str = "aux_loss",
        moe_aux_loss_coeff: float = 0.0,
        moe_z_loss_coeff: float | None = None,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        init_method_std: float = 0.02,
        init_method_xavier_uniform: bool = False,
        embedding_init_method_std: float | None = None,
        make_vocab_size_divisible_by: int = 128,
        no_retrieval: bool = False,
        retro_origin: str | None = None,
        retro_chunk_alignment: str | None = None,
        retro_encoder_positions: bool | None = None,
        retro_encoder_residual: str | None = None,
        retro_final_layernorm: bool | None = None,
        retro_mask_padding: bool | None = None,
        retro_chunk_length: int = 64,
        retro_attention_gate: float = 1.0,
        retro_num_neighbors: int = 2,
        retro_num_retrieved_chunks: int = 2,
        retro_encoder_num_layers: int = 2,
        retro_encoder_hidden_dropout: float = 0.1,
        retro_encoder_attention_dropout: float = 0.1,
        retro_encoder_cross_attention_dropout: float | None = None,
        retro_encoder_hidden_size: int | None = None,
        retro_encoder_num_attention_heads: int | None = None,
        retro_encoder_ffn_hidden_size: int | None = None,
        retro_encoder_input: str | None = None,
        retro_cross_attention_keys: str | None = None,
        retro_encoder_rotary_scaling: bool = False,
        retro_cross_attention_positions: str | None = None,
        retro_decoder_layers: list[int] | None = None,
        retro_deepnorm: bool = False,
        retro_mup_base_hidden_size: int | None = None,
        retro_mup_base_kv_channels: int | None = None,
        seq_length: int | None = None,
        tokenizer_type: str | None = None,
        tokenizer_fingerprint: str | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.tokenizer_vocab_size = tokenizer_vocab_size
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_query_groups = num_query_groups or num_attention_heads
        self.kv_channels = kv_channels or hidden_size // num_attention_heads
        gated = int(4 * hidden_size * 2 / 3 / 64) * 64
        self.ffn_hidden_size = ffn_hidden_size or (gated if swiglu or geglu else 4 * hidden_size)
        self.normalization = normalization
        self.norm_epsilon = norm_epsilon
        self.apply_layernorm_1p = apply_layernorm_1p
        self.swiglu = swiglu
        self.openai_gelu = openai_gelu
        self.squared_relu = squared_relu
        self.geglu = geglu
        self.position_embedding_type = position_embedding_type
        self.rotary_percent = rotary_percent
        self.rotary_base = rotary_base
        self.use_rope_scaling = use_rope_scaling
        self.rope_scaling_factor = rope_scaling_factor
        self.max_position_embeddings = max_position_embeddings
        self.rotary_interleaved = rotary_interleaved
        self.rotary_seq_len_interpolation_factor = rotary_seq_len_interpolation_factor
        self.disable_bias_linear = disable_bias_linear
        self.add_qkv_bias = add_qkv_bias
        self.qk_layernorm = qk_layernorm
        self.sliding_window = sliding_window
        if isinstance(window_attn_skip_freq, int):
            window_attn_skip_freq = [window_attn_skip_freq]
        self.window_attn_skip_freq = window_attn_skip_freq
        self.sublayer_norms = sublayer_norms
        self.qk_layernorm_over = qk_layernorm_over
        self.parallel_residual = parallel_residual
        self.embedding_multiplier = embedding_multiplier
        self.residual_multiplier = residual_multiplier
        self.logits_scaling = logits_scaling
        self.softmax_scale = softmax_scale
        self.attention_softcap = attention_softcap
        self.logit_softcap = logit_softcap
        self.no_rope_layers = no_rope_layers
        self.rotary_frequencies = rotary_frequencies
        self.rotary_attention_factor = rotary_attention_factor
        self.rotary_local_base = rotary_local_base
        self.rotary_local_layers = rotary_local_layers
        self.num_experts = num_experts
        if isinstance(moe_layer_freq, int):
            moe_layer_freq = [moe_layer_freq]
        self.moe_layer_freq = moe_layer_freq
        self.moe_ffn_hidden_size = moe_ffn_hidden_size
        self.moe_shared_expert_intermediate_size = moe_shared_expert_intermediate_size
        self.moe_shared_expert_gate = moe_shared_expert_gate
        self.moe_router_topk = moe_router_topk
        self.moe_router_pre_softmax = moe_router_pre_softmax
        self.moe_router_score_function = moe_router_score_function
        self.moe_router_topk_scaling_factor = moe_router_topk_scaling_factor
        self.moe_router_num_groups = moe_router_num_groups
        self.moe_router_group_topk = moe_router_group_topk
        self.moe_router_dtype = moe_router_dtype
        self.moe_router_load_balancing_type = moe_router_load_balancing_type
        self.moe_aux_loss_coeff = moe_aux_loss_coeff
        self.moe_z_loss_coeff = moe_z_loss_coeff
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.init_method_std = init_method_std
        self.init_method_xavier_uniform = init_method_xavier_uniform
        self.embedding_init_method_std = embedding_init_method_std
        self.make_vocab_size_divisible_by = make_vocab_size_divisible_by
        self.no_retrieval = no_retrieval
        self.retro_origin = retro_origin
        self.retro_chunk_length = retro_chunk_length
        self.retro_attention_gate = retro_attention_gate
        self.retro_num_neighbors = retro_num_neighbors
        self.retro_num_retrieved_chunks = retro_num_retrieved_chunks
        self.retro_encoder_num_layers = retro_encoder_num_layers
        self.retro_encoder_hidden_dropout = retro_encoder_hidden_dropout
        self.retro_encoder_attention_dropout = retro_encoder_attention_dropout
        if retro_encoder_cross_attention_dropout is None:
            retro_encoder_cross_attention_dropout = (
                retro_encoder_attention_dropout if retro_origin is None else attention_dropout
            )
        self.retro_encoder_cross_attention_dropout = retro_encoder_cross_attention_dropout
        self.retro_encoder_hidden_size = retro_encoder_hidden_size
        self.retro_encoder_num_attention_heads = retro_encoder_num_attention_heads
        self.retro_encoder_ffn_hidden_size = retro_encoder_ffn_hidden_size
        self.retro_encoder_input = retro_encoder_input or "raw"
        self.retro_cross_attention_keys = retro_cross_attention_keys or "own"
        self.retro_encoder_rotary_scaling = retro_encoder_rotary_scaling
        self.retro_cross_attention_positions = retro_cross_attention_positions or "none"
        self.retro_decoder_layers = retro_decoder_layers
        self.retro_deepnorm = retro_deepnorm
        self.retro_mup_base_hidden_size = retro_mup_base_hidden_size
        self.retro_mup_base_kv_channels = retro_mup_base_kv_channels
        self.seq_length = seq_length or max_position_embeddings
        self.tokenizer_type = tokenizer_type
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        given = {
            "retro_chunk_alignment": retro_chunk_alignment,
            "retro_encoder_positions": retro_encoder_positions,
            "retro_encoder_residual": retro_encoder_residual,
            "retro_final_layernorm": retro_final_layernorm,
            "retro_mask_padding": retro_mask_padding,
        }
        of_origin = ORIGINS.get(retro_origin) or ORIGINS[None]
        for name, value in given.items():
            setattr(self, name, of_origin[name] if value is None else value)
        if retro_deepnorm:  # its last sublayer ends with a norm
            self.retro_final_layernorm = False
        self._check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """All settings: a saved config.json states every one, whatever later defaults are."""
        return self.to_dict()

    def _check(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, expected one of {choices}"
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]
        activations = ("swiglu", "geglu", "openai_gelu", "squared_relu")
        if sum(bool(getattr(self, name)) for name in activations) > 1:
            problems.append(f"of {', '.join(activations)} only one can be set")
        if self.num_attention_heads % self.num_query_groups:
            problems.append("num_query_groups does not divide num_attention_heads")
        problems += problems_of_layers(self)
        if problems:
            raise ValueError("RetroConfig: " + "; ".join(problems))

    @property
    def cross_attention_layers(self) -> list[int]:
        """The decoder layers with cross-attention, counted from 1; none without retrieval."""
        if self.no_retrieval:
            return []
        if self.retro_decoder_layers is not None:
            return list(self.retro_decoder_layers)
        return list(range(6 if self.num_layers <= 15 else 9, self.num_layers + 1, 3))

    @property
    def retrieved_length(self) -> int:
        """R, tokens of a neighbor."""
        return int(self.retro_num_retrieved_chunks * self.retro_chunk_length)

    @property
    def mup_width(self) -> float:
        """What the input of the output layer is divided by."""
        base = self.retro_mup_base_hidden_size
        return 1.0 if base is None else self.hidden_size / base

    @property
    def longest_text(self) -> int | None:
        """Most tokens of a text, if there is a limit: learned positions."""
        learned = self.position_embedding_type == "learned_absolute"
        return self.max_position_embeddings if learned else None

    def has_window(self, layer: int) -> bool:
        """Whether the positions of a decoder layer, from 1, attend to `sliding_window` tokens."""
        layers = self.window_attn_skip_freq
        if self.sliding_window is None or not layers:
            return self.sliding_window is not None
        return bool(layer % layers[0] if len(layers) == 1 else layers[layer - 1])

    def has_experts(self, layer: int) -> bool:
        """Whether a decoder layer, from 1, has experts in place of its MLP."""
        if self.num_experts is None:
            return False
        pattern = self.moe_layer_freq or [1]
        if len(pattern) == 1 and pattern[0] >= 1:
            return (layer - 1) % pattern[0] == 0
        return bool(pattern[layer - 1])

    def decoder_sizes(self) -> BlockSizes:
        """The decoder's sizes."""
        alpha, beta = 1.0, 1.0
        if self.retro_deepnorm:
            sublayers = 2 * self.num_layers + len(self.cross_attention_layers)
            alpha, beta = sublayers**0.25, (4 * sublayers) ** -0.25
        return BlockSizes(
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            heads=self.num_attention_heads,
            groups=self.num_query_groups,
            channels=self.kv_channels,
            softmax_scale=self.softmax_scale or self._softmax_scale(self.kv_channels),
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
            cross_attention_dropout=self.attention_dropout,
            residual_scale=alpha,
            deepnorm_beta=beta,
            sublayer_norms=self.sublayer_norms,
            norms_all_heads=self.qk_layernorm_over == "all_heads",
            parallel_residual=self.parallel_residual,
            residual_multiplier=self.residual_multiplier,
            attention_softcap=self.attention_softcap,
            rotary_factor=self.rotary_attention_factor,
        )

    def encoder_sizes(self) -> BlockSizes:
        """The neighbor encoder's sizes."""
        width = self.retro_encoder_hidden_size or self.hidden_size
        own_heads = self.retro_encoder_num_attention_heads
        heads = own_heads or self.num_attention_heads
        own = width != self.hidden_size or own_heads is not None
        channels = width // heads if own else self.kv_channels
        depth = (self.retro_encoder_num_layers**4 * self.num_layers) ** (1 / 16)
        ffn = self.ffn_hidden_size * width // self.hidden_size
        return BlockSizes(
            hidden_size=width,
            ffn_hidden_size=self.retro_encoder_ffn_hidden_size or ffn,
            heads=heads,
            groups=own_heads or self.num_query_groups,
            channels=channels,
            softmax_scale=self._softmax_scale(channels),
            hidden_dropout=self.retro_encoder_hidden_dropout,
            attention_dropout=self.retro_encoder_attention_dropout,
            cross_attention_dropout=self.retro_encoder_cross_attention_dropout,
            residual_scale=0.81 * depth if self.retro_deepnorm else 1.0,
            deepnorm_beta=0.87 / depth if self.retro_deepnorm else 1.0,
        )

    def _softmax_scale(self, channels: int) -> float:
        if self.retro_mup_base_hidden_size is None:
            return float(channels**-0.5)
        base = self.retro_mup_base_kv_channels or self.kv_channels
        return float(base**0.5 / self.kv_channels * (self.kv_channels / channels) ** 0.5)
