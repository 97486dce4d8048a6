"""Configuration of a Retro model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from retro_mcore.chunking import Alignment, ChunkGrid
from retro_mcore.errors import ConfigurationError, check_all, raise_problems
from retro_mcore.model.decoder_config import DecoderConfig
from retro_mcore.model.family_options import plain_options
from retro_mcore.model.option_traits import at_least, by_origin, not_an_option, out_of_range, stated
from retro_mcore.model.options import (
    ORIGINS,
    ModelOptions,
    Origin,
    RetroOptions,
    changed_defaults,
)
from retro_mcore.platform import is_cpu_in_use
from retro_mcore.platform.compatibility import allow_norm_recomputation, config_value


@dataclass
class RetroConfig(RetroOptions, DecoderConfig):
    """A DecoderConfig with Retro's fields, under the names that Megatron gave them.

    The defaults are the paper's model (Borgeaud et al. 2022); `from_upstream` reproduces the
    numerics of the implementations that Megatron shipped. `retro_attention_gate` may be changed on
    a built model's config.

    Raises:
        ConfigurationError: a field's value cannot work; the message names the field.
    """

    retro_chunk_length: int = field(default=64, metadata=at_least(1) | not_an_option("project"))
    """M, tokens per chunk."""

    retro_project_dir: str | None = field(default=None, metadata=not_an_option("project"))
    """Project directory, made by the data pipeline."""

    retro_block_size: int | None = field(default=None, metadata=not_an_option("project"))
    """Rows per neighbor file, as the project was built."""

    retro_neighbor_dirs: dict | None = field(default=None, metadata=not_an_option("project"))
    """Neighbor directories of the train, valid and test splits, relative to the project's
    `query/`."""

    retro_split_preprocessing: str | None = field(default=None, metadata=not_an_option("project"))
    """Split that the project was built with."""

    retro_verify_neighbor_count: bool = field(default=True, metadata=not_an_option("project"))
    """Check that there are as many neighbor rows as chunks in the samples."""

    retro_retrieved_length: int | None = field(default=None, metadata=not_an_option("derived"))
    """R, tokens per neighbor: `retro_num_retrieved_chunks * retro_chunk_length`."""

    retro_chunk_alignment: Alignment = field(
        default="left", metadata=by_origin(dict.fromkeys(ORIGINS, "right"))
    )
    """Start of the chunk grid: "left" at the first token, "right" at the last."""

    retro_encoder_positions: bool = field(
        default=True, metadata=by_origin(dict.fromkeys(ORIGINS, False))
    )
    """Whether rotary embedding applies inside the neighbor encoder. (Learned positions always do.)
    Without it the encoder cannot see the order of a neighbor's tokens."""

    retro_encoder_residual: Literal["raw", "normed"] = field(
        default="raw",
        metadata=by_origin({"mcore-0.15": "normed", "mcore-0.5": "normed", "legacy": "raw"}),
    )
    """Input to which the encoder adds its cross-attention's output: the stream, or its norm."""

    retro_final_layernorm: bool = field(
        default=True, metadata=by_origin({"mcore-0.15": False, "mcore-0.5": True, "legacy": True})
    )
    """Whether the decoder ends with a norm."""

    retro_mask_padding: bool = field(
        default=True, metadata=by_origin(dict.fromkeys(ORIGINS, False))
    )
    """Whether padding and missing neighbors (`context_mask`) are masked out."""

    deepnorm_alpha: float = field(default=1.0, init=False, metadata=not_an_option("derived"))
    """Factor of the residual."""

    deepnorm_beta: float = field(default=1.0, init=False, metadata=not_an_option("derived"))
    """Factor of the initial values of output projections and MLPs."""

    mup_width: float = field(default=1.0, init=False, metadata=not_an_option("derived"))
    """Hidden size over muP's base."""

    @classmethod
    def from_upstream(cls, origin: Origin, **kwargs: Any) -> RetroConfig:
        """A config that reproduces the numerics of an implementation that Megatron shipped.

        Args:
            origin: "mcore-0.15" (megatron-core 0.8 to 0.15), "mcore-0.5" (0.5 to 0.7), or "legacy"
                (the InstructRetro branch of Megatron-LM).
            **kwargs: Fields of RetroConfig; they win over the origin's.
        """
        if origin not in ORIGINS:
            raise ConfigurationError("origin", f"{origin!r}", f"Use one of {sorted(ORIGINS)}")
        options = {
            "retro_encoder_cross_attention_dropout": kwargs.get(
                "attention_dropout", cls.attention_dropout
            ),
            **changed_defaults(origin),
        }
        return cls(**{**values_of_origin(origin), **options, **kwargs})

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
        if self.retro_cross_attention_positions is None:
            self.retro_cross_attention_positions = "none"
        for name, value in changed_defaults(None).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_all(
            partial(check_rates, self),
            *(partial(self._validate_minimum, *each) for each in self._minimums()),
            self._validate_retrieval,
            self._validate_decoder_layers,
            self._validate_encoder,
            self._validate_deepnorm,
            self._validate_experts,
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
        """The neighbor encoder's configuration: its own sizes, depth and dropout, on one stage."""
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
        for name, value in plain_options().items():
            if name != "softmax_scale" or self.retro_mup_base_hidden_size is None:
                setattr(config, name, value)
        config.context_parallel_size, config.cp_comm_type = 1, None  # chunks are whole
        config.cpu_offloading_num_layers = 0  # the layer that calls the encoder has the context
        config.window_size = config.window_attn_skip_freq = None
        config.num_moe_experts = config.moe_ffn_hidden_size = None  # dense
        config.moe_layer_freq, config.moe_shared_expert_intermediate_size = 1, None
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
        if config_value(self, "use_mup", absent=False):
            raise ConfigurationError(
                "use_mup",
                "True, which covers neither cross-attention nor the neighbor encoder",
                "Set retro_mup_base_hidden_size",
            )
        taken = {"init_method": mup, "output_layer_init_method": mup, "softmax_scale": mup}
        if self.retro_deepnorm:
            taken |= {"init_method": True, "output_layer_init_method": True}
        for name, is_taken in taken.items():
            if is_taken and getattr(self, name) is not None:
                raise ConfigurationError(
                    name,
                    f"{getattr(self, name)}, under DeepNorm or muP, which set their own",
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

    def _minimums(self) -> Iterable[tuple[str, int]]:
        return stated("at_least", type(self)).items()

    def _validate_minimum(self, name: str, smallest: int) -> None:
        value = getattr(self, name)
        if value is not None and value < smallest:
            raise ConfigurationError(name, f"{value}", f"It must be at least {smallest}")

    def _validate_retrieval(self) -> None:
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
            "retro_encoder_input": ("raw", "normed"),
            "retro_cross_attention_keys": ("own", "previous", "mixed"),
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

    def _validate_deepnorm(self) -> None:
        for name in ("sublayer_norms", "residual_multiplier", "parallel_residual"):
            if self.retro_deepnorm and getattr(self, name) != plain_options()[name]:
                raise ConfigurationError(
                    name,
                    f"{getattr(self, name)}, under DeepNorm, which adds its own way",
                    "Leave it out",
                )

    def _validate_experts(self) -> None:
        for name in ("retro_deepnorm", "retro_mup_base_hidden_size"):
            if self.num_moe_experts is not None and getattr(self, name):
                raise ConfigurationError(
                    name,
                    f"{getattr(self, name)} in a model with experts, which it does not cover",
                    "Leave it out, or use dense layers",
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
        for name in ("hybrid_context_parallel", "hierarchical_context_parallel_sizes"):
            if config_value(self, name, absent=None):
                raise ConfigurationError(
                    name,
                    f"{getattr(self, name)}, which divides sequences unevenly or in two ways",
                    "Leave it out; context_parallel_size divides every sequence alike",
                )
        if self.tp_comm_overlap:
            raise ConfigurationError(
                "tp_comm_overlap",
                "True, but its buffers fit only one length, and neighbors have another",
                "Leave it out",
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
            raise ConfigurationError(
                "multi_latent_attention", "True", "Retro needs ordinary attention heads"
            )


def check_rates(options: object) -> None:
    """Reject dropouts that are no probabilities, and a gate that is not a finite number from 0.

    Args:
        options: A configuration, or other options that have these fields.

    Raises:
        ConfigurationError: naming the field.
        SeveralErrors: more than one.
    """
    raise_problems([*out_of_range(options, ModelOptions)])


def values_of_origin(origin: Origin) -> dict[str, Any]:
    """Fields in which an implementation that Megatron shipped differs from the paper.

    See docs/decisions/0001-origins.md.
    """
    return {name: values[origin] for name, values in stated("origins", RetroConfig).items()}
