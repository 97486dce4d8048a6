"""Flags of the layout over processes, the precision, and recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retro_mcore.errors import ConfigurationError
from retro_mcore.training.options.megatron import LayerFlags


@dataclass(kw_only=True)
class ParallelOptions(LayerFlags):
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
    context_parallel_size: int = 1
    """Must be 1: Retro has no context parallelism."""
    tp_comm_overlap: bool = False
    """Refused: Transformer Engine's buffers have one length, neighbors another than the text."""
    no_overlap_p2p_communication: bool = False
    """In the interleaved schedule, do not overlap transfers between stages with computation."""
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Transformer Engine's attention kernels."""
    no_bias_gelu_fusion: bool = False
    """Do not fuse bias and GELU. (Fusions are on with Transformer Engine, off elsewhere.)"""
    no_bias_swiglu_fusion: bool = False
    """Do not fuse bias and SwiGLU."""
    no_bias_dropout_fusion: bool = False
    """Do not fuse bias, dropout and residual."""
    no_rope_fusion: bool = False
    """Do not fuse the rotary embedding."""
    no_gradient_accumulation_fusion: bool = False
    """Do not fuse the accumulation of weight gradients into their products (needs Apex)."""
    no_masked_softmax_fusion: bool = False
    """As always: attention is fused whole, or not at all."""
    no_persist_layer_norm: bool = False
    """As always: norms are Transformer Engine's or PyTorch's."""
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
        if self.fp8_format is not None and not self.bf16:
            raise ConfigurationError(
                "--fp8-format", f"{self.fp8_format} without --bf16", "Add --bf16"
            )

    def check_unsupported(self) -> None:
        """Refuse what Megatron has and Retro has not."""
        if self.context_parallel_size != 1:
            raise ConfigurationError(
                "--context-parallel-size",
                f"{self.context_parallel_size}",
                "Retro runs with 1; use tensor, sequence and pipeline parallelism",
            )
        if self.tp_comm_overlap:
            raise ConfigurationError(
                "--tp-comm-overlap",
                "given, but its buffers have one length, and neighbors another than the text",
                "Leave it out",
            )


@dataclass(kw_only=True)
class RecomputeOptions:
    """Trading computation for activation memory."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers (full) or the core attention (selective) in the backward pass."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: all layers in groups (uniform), or the first layers one by one (block)."""
    recompute_num_layers: int | None = None
    """With full: layers per group (uniform), or layers to recompute (block)."""
    recompute_modules: list[str] | None = None
    """With selective: what to recompute. Default: core_attn."""

    def check_recompute(self) -> None:
        """Full recomputation needs a method and a number of layers; nothing else takes them."""
        if self.recompute_modules and self.recompute_granularity != "selective":
            raise ConfigurationError(
                "--recompute-modules",
                f"{' '.join(self.recompute_modules)}, which has no effect",
                "Add --recompute-granularity selective",
            )
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
