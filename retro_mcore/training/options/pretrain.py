"""The flags of training, grouped by concern; Megatron's names, and its defaults where it has one.

This module imports neither torch nor megatron, so that `--help` is fast and a command can choose
its device before megatron is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from retro_mcore.errors import ConfigurationError, check_all
from retro_mcore.training.options.checkpoints import CheckpointOptions, ReproducibilityOptions
from retro_mcore.training.options.logging import LoggingOptions
from retro_mcore.training.options.megatron import DataParallelFlags, flag_of
from retro_mcore.training.options.noise import NeighborNoiseOptions
from retro_mcore.training.options.optimizer import OptimizerOptions
from retro_mcore.training.options.parallel import ParallelOptions, RecomputeOptions

__all__ = [
    "CheckpointOptions",
    "DataOptions",
    "ExitOptions",
    "LoggingOptions",
    "ModelOptions",
    "OptimizerOptions",
    "ParallelOptions",
    "RecomputeOptions",
    "ReproducibilityOptions",
    "TrainingOptions",
]


@dataclass(kw_only=True)
class ModelOptions:
    """What the model is. Saved in its checkpoints, so that they are rebuilt from them alone."""

    num_layers: int
    """Number of decoder layers."""
    hidden_size: int
    """Width of the decoder and of the neighbor encoder."""
    num_attention_heads: int
    """Number of attention heads."""
    group_query_attention: bool = False
    """Grouped-query attention with --num-query-groups."""
    num_query_groups: int | None = None
    """Number of key and value heads (grouped-query attention). Default: one per attention head."""
    ffn_hidden_size: int | None = None
    """Width of the MLP. Default: 4 hidden sizes, with --swiglu two thirds of that."""
    kv_channels: int | None = None
    """Width of an attention head. Default: hidden size / attention heads."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of norm."""
    norm_epsilon: float = 1e-5
    """Epsilon of the norms."""
    apply_layernorm_1p: bool = False
    """Center the norms' gain around zero (the published Retro checkpoints do)."""
    swiglu: bool = False
    """Gated SiLU in the MLP in place of GELU."""
    openai_gelu: bool = False
    """GELU by its tanh approximation, as GPT-2 has it."""
    squared_relu: bool = False
    """Squared ReLU in the MLP in place of GELU."""
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    """Kind of position embedding."""
    rotary_percent: float = 1.0
    """Share of a head's width that is rotated."""
    rotary_base: int = 10000
    """Base period of the rotary embedding."""
    use_rope_scaling: bool = False
    """Stretch the rotary embedding's long periods, as Llama 3.1 and later do."""
    rope_scaling_factor: float = 8.0
    """By how much, with --use-rope-scaling."""
    max_position_embeddings: int | None = None
    """Learned positions. Default: the longer of a sample and a neighbor's text."""
    rotary_interleaved: bool = False
    """Rotate even and odd dimensions as pairs, in place of the two halves."""
    rotary_seq_len_interpolation_factor: float | None = None
    """Stretch rotary positions: a sequence this many times longer gets the same angles."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer weights of its own."""
    disable_bias_linear: bool = False
    """No biases in the linear layers."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values although the other linear layers have none (Qwen2)."""
    qk_layernorm: bool = False
    """Norms on the heads of queries and keys in self-attention (Qwen3)."""
    sliding_window: int | None = None
    """Tokens that the decoder's positions attend to, themselves among them, as a model was trained
    that comes with --load-gpt. It is not computed here: texts must fit it, where it changes
    nothing; longer ones are refused."""
    hidden_dropout: float = 0.1
    """Dropout of hidden states in the decoder."""
    attention_dropout: float = 0.1
    """Dropout of attention probabilities in the decoder."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    init_method_xavier_uniform: bool = False
    """Xavier's uniform initial weights in place of normal ones."""
    embedding_init_method_std: float | None = None
    """Standard deviation of the embeddings' initial weights. Default: --init-method-std."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this times the tensor parallel size."""
    retro_origin: Literal["mcore-0.15", "mcore-0.5", "legacy"] | None = None
    """Compute as a Retro that Megatron shipped did (its converted checkpoints need it): mcore-0.15
    (0.8 to 0.15), mcore-0.5 (0.5 to 0.7) or legacy (InstructRetro). Default: as the paper does."""
    no_retrieval: bool = False
    """Train the same GPT without encoder, cross-attention and neighbors."""
    retro_attention_gate: float = 1.0
    """Scale of the cross-attention's output; 0 leaves the decoder alone, as InstructRetro does."""
    retro_num_neighbors: int = 2
    """Neighbors per chunk, K."""
    retro_num_retrieved_chunks: int = 2
    """Chunks per neighbor: 2 is the neighbor and its continuation."""
    retro_encoder_num_layers: int = 2
    """Layers of the neighbor encoder."""
    retro_encoder_hidden_dropout: float = 0.1
    """Dropout of hidden states in the neighbor encoder."""
    retro_encoder_attention_dropout: float = 0.1
    """Dropout of attention probabilities in the neighbor encoder."""
    retro_encoder_cross_attention_dropout: float | None = None
    """The same in the encoder's cross-attention to the chunk. Default: as its self-attention."""
    retro_encoder_hidden_size: int | None = None
    """Width of the neighbor encoder. Default: --hidden-size."""
    retro_encoder_num_attention_heads: int | None = None
    """Attention heads of the neighbor encoder. Default: the decoder's heads and query groups."""
    retro_encoder_ffn_hidden_size: int | None = None
    """Width of the neighbor encoder's MLP. Default: the decoder's, in proportion to the width."""
    retro_cross_attention_positions: Literal["none", "rotary"] | None = None
    """Relative positions in the cross-attentions: rotary, between a chunk's tokens and those that
    were retrieved for it. Default: none."""
    retro_decoder_layers: list[int] | None = None
    """Decoder layers with cross-attention, from 1. Default: every third from 6 (9 above 15)."""
    retro_deepnorm: bool = False
    """DeepNorm: scaled residuals, norms after adding, and initial weights for very deep stacks."""
    retro_mup_base_hidden_size: int | None = None
    """muP: the hidden size that --lr and --init-method-std were tuned at. Default: off."""
    retro_mup_base_kv_channels: int | None = None
    """Width of an attention head at that size, if it was another one."""

    def check_model(self) -> None:
        """Refuse two activations, and half of grouped-query attention."""
        given = [name for name in ("squared_relu", "openai_gelu", "swiglu") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigurationError(
                flag_of(given[0]), f"given together with {flag_of(given[1])}", "Choose one"
            )
        if self.group_query_attention and self.num_query_groups is None:
            raise ConfigurationError(
                "--group-query-attention", "given without --num-query-groups", "Add the number"
            )


@dataclass(kw_only=True)
class DataOptions:
    """The samples. What config.json fixes may be repeated here, and is refused if it differs."""

    project_dir: str
    """The project directory."""
    micro_batch_size: int
    """Samples per process and forward pass."""
    train_iters: int | None = None
    """Iterations to train. Default: as many as the samples suffice for."""
    train_samples: int | None = None
    """Samples to train on (instead of --train-iters), at most the project's."""
    num_workers: int = 2
    """Processes that read samples, for each training process; 0 reads in the process itself."""
    seq_length: int | None = None
    """Fixed by the project."""
    retro_chunk_length: int | None = None
    """Fixed by the project."""
    global_batch_size: int | None = None
    """Fixed by the project."""
    rampup_batch_size: list[int] | None = None
    """START INCREMENT SAMPLES: begin with a batch of START and grow it by INCREMENT at a time to
    the global batch, over SAMPLES samples."""
    eval_interval: int | None = None
    """Iterations between validations. Fixed by the project."""
    eval_iters: int | None = None
    """Batches per validation. Fixed by the project."""
    seed: int | None = None
    """Seed of weights, dropout and data order. Fixed by the project."""
    split: str | None = None
    """Fixed by the project."""
    tokenizer_type: str | None = None
    """Fixed by the project."""


@dataclass(kw_only=True)
class ExitOptions:
    """When a run saves and stops before its last iteration, to be resumed."""

    exit_interval: int | None = None
    """Save and stop after an iteration that is a multiple of this; a later run resumes."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes."""
    exit_signal_handler: bool = True
    """Save and stop, with exit code 0, when SIGTERM arrives (preemption, a time limit)."""


@dataclass(kw_only=True)
class TrainingOptions(
    LoggingOptions,
    ExitOptions,
    NeighborNoiseOptions,
    CheckpointOptions,
    ReproducibilityOptions,
    DataParallelFlags,
    OptimizerOptions,
    RecomputeOptions,
    ParallelOptions,
    ModelOptions,
    DataOptions,
):
    """Everything that a training run is told."""

    def check(self) -> None:
        """Refuse what can be seen to be wrong without looking at the project, all of it at once.

        Raises:
            ConfigurationError: naming the flag.
        """
        check_all(
            self.check_checkpoints,
            self.check_precision,
            self.check_unsupported,
            self.check_model,
            self.check_recompute,
            self.check_schedule,
            self.check_logging,
            partial(self.check_neighbor_noise, self.no_retrieval),
            self._check_data_parallel,
            self._check_batches,
            *(partial(self._check_least, name, 1) for name in _POSITIVE),
            partial(self._check_least, "num_workers", 0),
        )

    def _check_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ConfigurationError(flag_of(name), str(value), f"Choose at least {least}")

    def _check_batches(self) -> None:
        if self.train_iters is not None and self.train_samples is not None:
            raise ConfigurationError("--train-iters", "given with --train-samples", "Choose one")
        if self.rampup_batch_size is None:
            return
        for name in ("train_iters", "lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters"):
            if getattr(self, name):
                raise ConfigurationError(
                    flag_of(name),
                    "given with --rampup-batch-size, under which iterations differ in size",
                    f"Give {flag_of(name.replace('iters', 'samples'))}",
                )

    def _check_data_parallel(self) -> None:
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ConfigurationError(
                "--overlap-param-gather",
                "given without --use-distributed-optimizer",
                "Add --use-distributed-optimizer",
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigurationError(
                "--overlap-param-gather",
                "given without --overlap-grad-reduce",
                "Add --overlap-grad-reduce",
            )


_POSITIVE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "kv_channels",
    "max_position_embeddings",
    "sliding_window",
    "make_vocab_size_divisible_by",
    "retro_num_neighbors",
    "retro_num_retrieved_chunks",
    "retro_encoder_num_layers",
    "retro_encoder_hidden_size",
    "retro_encoder_num_attention_heads",
    "retro_encoder_ffn_hidden_size",
    "retro_mup_base_hidden_size",
    "retro_mup_base_kv_channels",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "micro_batch_size",
    "train_iters",
    "train_samples",
    "recompute_num_layers",
    "lr_decay_iters",
    "lr_decay_samples",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "save_interval",
    "keep_last_n",
    "save_retain_interval",
    "exit_interval",
    "log_interval",
    "tensorboard_log_interval",
)
