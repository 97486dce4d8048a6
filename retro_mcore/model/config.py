"""Configuration of a Retro model."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from megatron.core.transformer import TransformerConfig

from retro_mcore.chunking import Alignment, ChunkGrid
from retro_mcore.errors import ConfigurationError, RetroError, check_all, raise_problems
from retro_mcore.platform import is_cpu_in_use
from retro_mcore.platform.compatibility import allow_norm_recomputation

Origin = Literal["mcore-0.15", "mcore-0.5", "legacy"]

_DROPOUTS = (
    "hidden_dropout",
    "attention_dropout",
    "retro_encoder_hidden_dropout",
    "retro_encoder_attention_dropout",
    "retro_encoder_cross_attention_dropout",
)

# How the implementations that we replace differ from the paper (docs/decisions/origins.md).
_MEGATRON = {
    "retro_chunk_alignment": "right",
    "retro_encoder_positions": False,
    "retro_mask_padding": False,
    "retro_encoder_residual": "normed",
    "retro_final_layernorm": True,
}
_ORIGINS: dict[str, dict[str, Any]] = {
    "mcore-0.15": {**_MEGATRON, "retro_final_layernorm": False},
    "mcore-0.5": _MEGATRON,
    "legacy": {**_MEGATRON, "retro_encoder_residual": "raw"},
}


@dataclass
class RetroConfig(TransformerConfig):
    """A TransformerConfig with Retro's fields, under the names that Megatron gave them.

    The defaults are the paper's model (Borgeaud et al. 2022); `from_upstream` reproduces the
    numerics of the implementations that Megatron shipped.

    Raises:
        ConfigurationError: a field's value cannot work; the message names the field.
    """

    retro_project_dir: str | None = None
    """The project directory, made by the data pipeline."""

    retro_block_size: int | None = None
    """Rows per neighbor file, as the project was built."""

    retro_chunk_length: int = 64
    """M: tokens per chunk."""

    retro_encoder_num_layers: int = 2
    """Layers of the neighbor encoder; the first one cross-attends to the retrieving chunk."""

    retro_encoder_hidden_dropout: float = 0.1
    """Hidden dropout of the neighbor encoder."""

    retro_encoder_attention_dropout: float = 0.1
    """Attention dropout of the neighbor encoder's self-attention (of its cross-attention too,
    unless `retro_encoder_cross_attention_dropout` says otherwise)."""

    retro_encoder_cross_attention_dropout: float | None = None
    """Attention dropout of the encoder's cross-attention to the retrieving chunk. None: as its
    self-attention. Megatron used the decoder's rate here."""

    retro_encoder_hidden_size: int | None = None
    """Width of the neighbor encoder. None: the decoder's."""

    retro_encoder_num_attention_heads: int | None = None
    """Attention heads of the neighbor encoder, each with its own key and value. None: heads and
    query groups of the decoder."""

    retro_encoder_ffn_hidden_size: int | None = None
    """Width of the neighbor encoder's MLP. None: the decoder's, in proportion to the width."""

    retro_neighbor_dirs: dict | None = None
    """Neighbor directories of the train, valid and test splits, relative to the project's
    `query/`."""

    retro_num_neighbors: int = 2
    """K: neighbors per chunk."""

    retro_num_retrieved_chunks: int = 2
    """Chunks per neighbor: itself and its continuation."""

    retro_retrieved_length: int | None = None
    """R: tokens per neighbor, `retro_num_retrieved_chunks * retro_chunk_length`; derived."""

    retro_split_preprocessing: str | None = None
    """The split that the project was built with."""

    retro_verify_neighbor_count: bool = True
    """Check that there are as many neighbor rows as chunks in the samples."""

    retro_decoder_layers: list[int] | None = None
    """Layers with chunked cross-attention, 1-based. None: every third, from 6 in models of at most
    15 layers and from 9 in larger ones."""

    retro_chunk_alignment: Alignment = "left"
    """Where the chunk grid starts: "left" at the first token, "right" at the last."""

    retro_encoder_positions: bool = True
    """Whether rotary embedding applies inside the neighbor encoder. (Learned positions always do.)
    Without it the encoder cannot see the order of a neighbor's tokens."""

    retro_encoder_residual: Literal["raw", "normed"] = "raw"
    """What the encoder's cross-attention output is added to: the stream, or its norm."""

    retro_final_layernorm: bool = True
    """Whether the decoder ends with a norm."""

    retro_mask_padding: bool = True
    """Whether padding and missing neighbors (`context_mask`) are masked out."""

    retro_cross_attention_positions: Literal["none", "rotary"] = "none"
    """Relative positions in both cross-attentions: "rotary" rotates queries and keys by their
    distance, a chunk and its neighbors starting at the same position."""

    retro_attention_gate: float = 1.0
    """Scales what chunked cross-attention adds; 0 leaves the GPT decoder, and does not run the
    encoder. May be changed on a built model's config."""

    retro_deepnorm: bool = False
    """DeepNorm (Wang et al. 2022), for very deep stacks: Norm(alpha * x + f(x)) in place of
    x + f(Norm(x)), in decoder, cross-attention and encoder, and the initial weights that go with
    it. There is no final norm then: each layer ends with one."""

    retro_mup_base_hidden_size: int | None = None
    """muP (Yang et al. 2022): the hidden size at which learning rate and `init_method_std` were
    tuned; they carry over to this one. All widths count as grown in proportion. None: off."""

    retro_mup_base_kv_channels: int | None = None
    """Channels per attention head at the base size, if they differ: attention scales with
    sqrt(base) / channels. None: as here."""

    deepnorm_alpha: float = field(default=1.0, init=False)
    """What multiplies the residual; derived."""

    deepnorm_beta: float = field(default=1.0, init=False)
    """What multiplies the initial values, output projections and MLPs; derived."""

    mup_width: float = field(default=1.0, init=False)
    """The hidden size over muP's base; derived."""

    @classmethod
    def from_upstream(cls, origin: Origin, **kwargs: Any) -> RetroConfig:
        """A config that reproduces the numerics of an implementation that Megatron shipped.

        Args:
            origin: "mcore-0.15" (megatron-core 0.8 to 0.15), "mcore-0.5" (0.5 to 0.7), or "legacy"
                (the InstructRetro branch of Megatron-LM).
            **kwargs: Fields of RetroConfig; they win over the origin's.
        """
        if origin not in _ORIGINS:
            raise ConfigurationError("origin", f"{origin!r}", f"Use one of {sorted(_ORIGINS)}")
        decoder_dropout = kwargs.get("attention_dropout", cls.attention_dropout)
        dropout = {"retro_encoder_cross_attention_dropout": decoder_dropout}
        return cls(**{**_ORIGINS[origin], **dropout, **kwargs})

    def __post_init__(self) -> None:
        """Derive and validate; TransformerConfig's own checks run first."""
        if is_cpu_in_use():
            self.use_cpu_initialization = True
            self.gradient_accumulation_fusion = False
        self._validate_initialization()
        super().__post_init__()
        if self.retro_deepnorm:
            self._derive_deepnorm()
        if self.retro_mup_base_hidden_size is not None:
            self._derive_mup(self.retro_mup_base_hidden_size)
        if self.recompute_granularity == "selective" and "layernorm" in self.recompute_modules:
            allow_norm_recomputation()
        check_all(
            partial(check_rates, self),
            self._validate_retrieval,
            self._validate_decoder_layers,
            self._validate_encoder,
            self._validate_parallelism,
        )
        if self.retro_encoder_cross_attention_dropout is None:
            self.retro_encoder_cross_attention_dropout = self.retro_encoder_attention_dropout

    @property
    def retro_layer_numbers(self) -> list[int]:
        """The decoder layers with chunked cross-attention, 1-based."""
        if self.retro_decoder_layers is not None:
            return list(self.retro_decoder_layers)
        return list(range(6 if self.num_layers <= 15 else 9, self.num_layers + 1, 3))

    @property
    def encoder_hidden_size(self) -> int:
        """Width of the neighbor encoder."""
        return self.retro_encoder_hidden_size or self.hidden_size

    def chunk_grid(self, sequence_length: int) -> ChunkGrid:
        """The chunks of a sequence of `sequence_length` tokens."""
        return ChunkGrid(sequence_length, self.retro_chunk_length, self.retro_chunk_alignment)

    def encoder_config(self) -> RetroConfig:
        """The neighbor encoder's own configuration: same sizes, its own depth and dropout, whole
        on one pipeline stage."""
        config = copy.copy(self)
        config.num_layers = self.retro_encoder_num_layers
        config.hidden_dropout = self.retro_encoder_hidden_dropout
        config.attention_dropout = self.retro_encoder_attention_dropout
        config.hidden_size = self.encoder_hidden_size
        config.ffn_hidden_size = (
            self.retro_encoder_ffn_hidden_size
            or self.ffn_hidden_size * self.encoder_hidden_size // self.hidden_size
        )
        if self.retro_encoder_num_attention_heads is not None:
            config.num_attention_heads = self.retro_encoder_num_attention_heads
            config.num_query_groups = self.retro_encoder_num_attention_heads
        if config.hidden_size != self.hidden_size or self.retro_encoder_num_attention_heads:
            config.kv_channels = config.hidden_size // config.num_attention_heads
        if self.retro_mup_base_hidden_size is not None:
            config.softmax_scale *= (self.kv_channels / config.kv_channels) ** 0.5
        if self.retro_deepnorm:
            depth = (self.retro_encoder_num_layers**4 * self.num_layers) ** (1 / 16)
            config.deepnorm_alpha, config.deepnorm_beta = 0.81 * depth, 0.87 / depth
        config.pipeline_model_parallel_size = 1
        config.virtual_pipeline_model_parallel_size = None
        config.pipeline_model_parallel_layout = None
        config.num_layers_in_first_pipeline_stage = None
        config.num_layers_in_last_pipeline_stage = None
        config.account_for_embedding_in_pipeline_split = False
        config.account_for_loss_in_pipeline_split = False
        if self.recompute_granularity == "full":
            # The layer that calls the encoder is recomputed with it.
            config.recompute_granularity = config.recompute_method = None
        return config

    def _validate_initialization(self) -> None:
        mup = self.retro_mup_base_hidden_size is not None
        for name in ("retro_mup_base_hidden_size", "retro_mup_base_kv_channels"):
            value = getattr(self, name)
            if value is not None and (value < 1 or not mup):
                raise ConfigurationError(
                    name,
                    f"{value}" + ("" if mup else " without retro_mup_base_hidden_size"),
                    "Give the sizes that the learning rate was tuned at, or neither",
                )
        if getattr(self, "use_mup", False):
            raise ConfigurationError(
                "use_mup",
                "True, which knows neither cross-attention nor neighbor encoder",
                "Set retro_mup_base_hidden_size",
            )
        taken = {"init_method": mup, "output_layer_init_method": mup, "softmax_scale": mup}
        if self.retro_deepnorm:
            taken |= {"init_method": True, "output_layer_init_method": True}
        for name, is_taken in taken.items():
            if is_taken and getattr(self, name) is not None:
                raise ConfigurationError(
                    name,
                    f"{getattr(self, name)}, under DeepNorm or muP, which give their own",
                    "Leave it out",
                )

    def _derive_deepnorm(self) -> None:
        """The decoder's: with n sublayers, alpha = n^(1/4) and beta = (4n)^(-1/4). That is the
        paper's (2N)^(1/4) without cross-attention and (3N)^(1/4) with it in every layer."""
        sublayers = 2 * self.num_layers + len(self.retro_layer_numbers)
        self.deepnorm_alpha, self.deepnorm_beta = sublayers**0.25, (4 * sublayers) ** -0.25
        self.output_layer_init_method = self.init_method
        self.retro_final_layernorm = False

    def _derive_mup(self, base_hidden_size: int) -> None:
        self.mup_width = self.hidden_size / base_hidden_size
        base_channels = self.retro_mup_base_kv_channels or self.kv_channels
        self.softmax_scale = base_channels**0.5 / self.kv_channels
        self.output_layer_init_method = self.init_method

    def _validate_retrieval(self) -> None:
        for name in (
            "retro_chunk_length",
            "retro_num_neighbors",
            "retro_num_retrieved_chunks",
            "retro_encoder_num_layers",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(name, f"{getattr(self, name)}", "It must be at least 1")
        retrieved_length = self.retro_num_retrieved_chunks * self.retro_chunk_length
        if self.retro_retrieved_length not in (None, retrieved_length):
            raise ConfigurationError(
                "retro_retrieved_length",
                f"{self.retro_retrieved_length}",
                f"It is retro_num_retrieved_chunks * retro_chunk_length = {retrieved_length}; "
                "leave it out",
            )
        self.retro_retrieved_length = retrieved_length
        for name, choices in {
            "retro_chunk_alignment": ("left", "right"),
            "retro_encoder_residual": ("raw", "normed"),
            "retro_cross_attention_positions": ("none", "rotary"),
        }.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(name, f"{getattr(self, name)!r}", f"Use one of {choices}")

    def _validate_decoder_layers(self) -> None:
        layers = self.retro_layer_numbers
        if not layers:
            raise ConfigurationError(
                "num_layers",
                f"{self.num_layers} layers give no layer with cross-attention by the default rule",
                "Use at least 6 layers, or set retro_decoder_layers, e.g. [2]",
            )
        if layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] > self.num_layers:
            raise ConfigurationError(
                "retro_decoder_layers",
                f"{layers} in a model of {self.num_layers} layers",
                "Give ascending layer numbers from 1 to num_layers",
            )

    def _validate_encoder(self) -> None:
        heads = self.retro_encoder_num_attention_heads or self.num_attention_heads
        own_sizes = self.retro_encoder_hidden_size or self.retro_encoder_num_attention_heads
        if own_sizes and self.encoder_hidden_size % heads:
            raise ConfigurationError(
                "retro_encoder_hidden_size",
                f"{self.encoder_hidden_size} over {heads} attention heads",
                "Choose a multiple, or set retro_encoder_num_attention_heads",
            )
        if heads % self.tensor_model_parallel_size:
            raise ConfigurationError(
                "retro_encoder_num_attention_heads",
                f"{heads} over tensor_model_parallel_size {self.tensor_model_parallel_size}",
                "It must be a multiple",
            )

    def _validate_parallelism(self) -> None:
        if self.context_parallel_size > 1:
            raise ConfigurationError(
                "context_parallel_size",
                f"{self.context_parallel_size}",
                "Retro runs with 1; use tensor, sequence and pipeline parallelism",
            )
        tensor_parallel = self.tensor_model_parallel_size
        retrieved_length = self.retro_num_retrieved_chunks * self.retro_chunk_length
        if self.num_query_groups % tensor_parallel:
            raise ConfigurationError(
                "num_query_groups",
                f"{self.num_query_groups}, over tensor_model_parallel_size {tensor_parallel}",
                "It must be a multiple",
            )
        if self.sequence_parallel and retrieved_length % tensor_parallel:
            raise ConfigurationError(
                "sequence_parallel",
                f"{retrieved_length} retrieved tokens over {tensor_parallel} ranks",
                "Choose chunk length * retrieved chunks as a multiple of the tensor parallel size",
            )
        if self.multi_latent_attention:
            raise ConfigurationError("multi_latent_attention", "True", "Retro needs plain heads")


def check_rates(options: object) -> None:
    """Refuse dropouts that are no probabilities, and a gate that is not a finite number from 0.

    Args:
        options: A configuration, or other options that have these fields.

    Raises:
        ConfigurationError: naming the field.
        SeveralErrors: more than one.
    """
    problems: list[RetroError] = []
    for name in _DROPOUTS:
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            problems.append(ConfigurationError(name, f"{value}", "Give a number from 0 to 1"))
    gate = options.retro_attention_gate  # type: ignore[attr-defined]
    if not 0 <= gate < math.inf:
        problems.append(ConfigurationError("retro_attention_gate", f"{gate}", "Give 0 or more"))
    raise_problems(problems)
