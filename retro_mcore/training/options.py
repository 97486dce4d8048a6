"""The flags of training, grouped by concern; Megatron's names, and its defaults where it has one.

This module imports neither torch nor megatron, so that `--help` is fast and a command can choose
its device before megatron is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retro_mcore.errors import ConfigurationError
from retro_mcore.training.checkpoint_options import CheckpointOptions, ReproducibilityOptions


@dataclass(kw_only=True)
class ModelOptions:
    """What the model is. Saved in its checkpoints, so that they are rebuilt from them alone."""

    num_layers: int
    """Number of decoder layers."""
    hidden_size: int
    """Width of the decoder and of the neighbor encoder."""
    num_attention_heads: int
    """Number of attention heads."""
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
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer weights of its own."""
    disable_bias_linear: bool = False
    """No biases in the linear layers."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values although the other linear layers have none (Qwen2)."""
    qk_layernorm: bool = False
    """Norms on the heads of queries and keys in self-attention (Qwen3)."""
    hidden_dropout: float = 0.1
    """Dropout of hidden states in the decoder."""
    attention_dropout: float = 0.1
    """Dropout of attention probabilities in the decoder."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
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
    retro_decoder_layers: list[int] | None = None
    """Decoder layers with cross-attention, from 1. Default: every third from 6 (9 above 15)."""


@dataclass(kw_only=True)
class ParallelOptions:
    """How the model is laid out over processes, and in which precision it computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: CUDA where there is one, else the CPU."""
    tensor_model_parallel_size: int = 1
    """Processes that share one copy of the model."""
    sequence_parallel: bool = False
    """Split the norms' and dropouts' activations over the tensor parallel processes."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Stages per process, in the interleaved schedule. Default: one."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first stage, if it shall have another number than the others."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last stage, likewise."""
    pipeline_model_parallel_layout: str | None = None
    """What each stage holds, in Megatron's notation, e.g. "Et*3|t*4|t*4|t*3L"."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers' implementation; auto: Transformer Engine where it is installed, on CUDA."""
    bf16: bool = False
    """Compute in bfloat16, with fp32 main weights."""
    fp16: bool = False
    """Compute in float16, with fp32 main weights and dynamic loss scaling."""
    use_cpu_initialization: bool = False
    """Initialise weights on the CPU: the same weights for every layout. Always so on CPU."""

    def check_precision(self) -> None:
        """Refuse two precisions at once."""
        if self.bf16 and self.fp16:
            raise ConfigurationError("--bf16", "given together with --fp16", "Choose one of them")


@dataclass(kw_only=True)
class RecomputeOptions:
    """Trading computation for activation memory."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers (full) or the core attention (selective) in the backward pass."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: all layers in groups (uniform), or the first layers one by one (block)."""
    recompute_num_layers: int | None = None
    """With full: layers per group (uniform), or layers to recompute (block)."""

    def check_recompute(self) -> None:
        """Full recomputation needs a method and a number of layers; nothing else takes them."""
        for flag, value in (
            ("--recompute-method", self.recompute_method),
            ("--recompute-num-layers", self.recompute_num_layers),
        ):
            if self.recompute_granularity == "full" and value is None:
                raise ConfigurationError(flag, "not given", "--recompute-granularity full needs it")
            if self.recompute_granularity != "full" and value is not None:
                raise ConfigurationError(
                    flag, f"{value}, which has no effect", "Add --recompute-granularity full"
                )


@dataclass(kw_only=True)
class OptimizerOptions:
    """AdamW, its learning rate schedule and gradient clipping."""

    lr: float
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Iterations until --min-lr. Default: all iterations."""
    lr_warmup_fraction: float | None = None
    """Share of --lr-decay-iters in which the learning rate rises linearly."""
    lr_warmup_iters: int = 0
    """Iterations in which the learning rate rises linearly (instead of the fraction)."""
    weight_decay: float = 0.01
    """AdamW's weight decay (not on biases and norms)."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 for no clipping."""
    use_distributed_optimizer: bool = False
    """Divide the optimizer's state over the data parallel processes."""

    def check_schedule(self) -> None:
        """Refuse learning rates and warmups that contradict each other."""
        if not self.lr >= self.min_lr >= 0 or self.lr == 0:
            raise ConfigurationError(
                "--lr", f"{self.lr} with --min-lr {self.min_lr}", "Choose lr >= min_lr >= 0, lr > 0"
            )
        if self.lr_warmup_fraction is None:
            return
        if self.lr_warmup_iters:
            raise ConfigurationError(
                "--lr-warmup-iters", "given together with --lr-warmup-fraction", "Choose one"
            )
        if not 0 <= self.lr_warmup_fraction < 1:
            raise ConfigurationError(
                "--lr-warmup-fraction", str(self.lr_warmup_fraction), "Choose from 0 to below 1"
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
    """When a run stops before its last iteration, and how often it reports."""

    exit_interval: int | None = None
    """Save and stop after an iteration that is a multiple of this; a later run resumes."""
    log_interval: int = 100
    """Iterations between log lines and metrics."""


@dataclass(kw_only=True)
class TrainingOptions(
    ExitOptions,
    CheckpointOptions,
    ReproducibilityOptions,
    OptimizerOptions,
    RecomputeOptions,
    ParallelOptions,
    ModelOptions,
    DataOptions,
):
    """Everything that a training run is told."""

    def check(self) -> None:
        """Refuse what can be seen to be wrong without looking at the project.

        Raises:
            ConfigurationError: naming the flag.
        """
        self.check_checkpoints()
        self.check_precision()
        self.check_recompute()
        self.check_schedule()
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigurationError(flag, str(value), "Choose at least 1")
        if self.num_workers < 0:
            raise ConfigurationError("--num-workers", str(self.num_workers), "Choose at least 0")
        if self.train_iters is not None and self.train_samples is not None:
            raise ConfigurationError("--train-iters", "given with --train-samples", "Choose one")


_POSITIVE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "kv_channels",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "retro_num_neighbors",
    "retro_num_retrieved_chunks",
    "retro_encoder_num_layers",
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
    "save_interval",
    "keep_last_n",
    "save_retain_interval",
    "exit_interval",
    "log_interval",
)
