"""Flags of the parallel layout, the precision, and recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

from retro_mcore.errors import ConfigurationError, flag_of, raise_problems
from retro_mcore.model.option_traits import at_least
from retro_mcore.training.options.megatron import PRECISION_FLAGS, LayerFlags
from retro_mcore.training.options.unsupported import UnsupportedOptions

#: Recipes to which Megatron hands options of fp8.
_READ_BY = {
    "fp8_margin": ("delayed",),
    "fp8_amax_history_len": ("delayed",),
    "fp8_amax_compute_algo": ("delayed",),
    "fp8_dot_product_attention": ("delayed", "tensorwise"),
}


@dataclass(kw_only=True)
class ParallelOptions(UnsupportedOptions, LayerFlags):
    """Parallel layout and precision of the model."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto: CUDA if available, else the CPU."""
    tensor_model_parallel_size: int = field(default=1, metadata=at_least(1))
    """Number of processes over which each layer is split."""
    sequence_parallel: bool = False
    """Split the activations of norms and dropout among the tensor parallel processes."""
    pipeline_model_parallel_size: int = field(default=1, metadata=at_least(1))
    """Number of pipeline stages."""
    num_virtual_stages_per_pipeline_rank: int | None = field(default=None, metadata=at_least(1))
    """Number of virtual stages per process, in the interleaved schedule. Default: one."""
    decoder_first_pipeline_num_layers: int | None = field(default=None, metadata=at_least(1))
    """Number of layers in the first pipeline stage, if different from the others."""
    decoder_last_pipeline_num_layers: int | None = field(default=None, metadata=at_least(1))
    """Number of layers in the last pipeline stage, if different from the others."""
    pipeline_model_parallel_layout: str | None = None
    """Contents of each stage, in Megatron's notation, e.g. "Et*3|t*4|t*4|t*3L"."""
    context_parallel_size: int = field(default=1, metadata=at_least(1))
    """Number of processes over which each sample's tokens are divided. The sample length must be a
    multiple of 2 x this x the chunk length."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = None
    """Exchange of keys and values under context parallelism. Default: Transformer Engine's (p2p);
    all_gather without Transformer Engine, which has no other."""
    expert_model_parallel_size: int = field(default=1, metadata=at_least(1))
    """Number of data parallel processes over which each layer's experts are divided."""
    expert_tensor_parallel_size: int | None = field(default=None, metadata=at_least(1))
    """Number of processes over which each expert is split. Default: as many as other layers."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "allgather"
    """How tokens travel to their experts' processes."""
    no_overlap_p2p_communication: bool = False
    """Do not overlap transfers between stages with computation in the interleaved schedule."""
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Transformer Engine's attention kernels."""
    no_bias_gelu_fusion: bool = False
    """Has no effect: bias and GELU are never fused, since Megatron's kernel is an approximation."""
    no_bias_swiglu_fusion: bool = False
    """Do not fuse bias and SwiGLU. (Fusions are on with Transformer Engine, otherwise off.)"""
    no_bias_dropout_fusion: bool = False
    """Do not fuse bias, dropout and residual."""
    no_rope_fusion: bool = False
    """Do not fuse the rotary embedding."""
    no_gradient_accumulation_fusion: bool = False
    """Do not fuse the accumulation of weight gradients into the matrix products (needs Apex)."""
    no_masked_softmax_fusion: bool = False
    """Has no effect: the whole attention is fused, or nothing."""
    no_persist_layer_norm: bool = False
    """Has no effect: norms are those of Transformer Engine or PyTorch."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers; auto: Transformer Engine if installed, on CUDA."""
    bf16: bool = False
    """Compute in bfloat16, with fp32 main weights."""
    fp16: bool = False
    """Compute in float16, with fp32 main weights and dynamic loss scaling."""
    use_cpu_initialization: bool = False
    """Initialize weights on the CPU, equal for every layout. Always on without a GPU."""

    def check_precision(self) -> None:
        """Reject --bf16 with --fp16, fp8 without bf16, and options of fp8 without fp8."""
        if self.bf16 and self.fp16:
            raise ConfigurationError("--bf16", "given together with --fp16", "Choose one of them")
        if self.fp8_format is not None and not self.bf16:
            raise ConfigurationError(
                "--fp8-format", f"{self.fp8_format} without --bf16", "Add --bf16"
            )
        raise_problems([*self._without_effect()])

    def _without_effect(self) -> Iterator[ConfigurationError]:
        """Options of fp8 that are not read."""
        given = {
            each.name: getattr(self, each.name)
            for each in fields(LayerFlags)
            if each.name in PRECISION_FLAGS and getattr(self, each.name) != each.default
        }
        if given.get("fp8_recipe") == "custom":
            yield ConfigurationError(
                "--fp8-recipe", "custom, whose quantizers no option names", "Use another recipe"
            )
        given.pop("fp32_residual_connection", None)  # for any precision
        if given.pop("fp8_wgrad", True) is False:
            hint = "Leave it out: Transformer Engine 2 computes gradients of weights in fp8"
            yield ConfigurationError("--fp8-wgrad", "False, which has no effect", hint)
        if "fp8_format" in given:
            yield from self._unread_by_recipe(given)
            needed = "first_last_layers_bf16"
            given = {} if needed in given else {n: v for n, v in given.items() if "_in_bf16" in n}
        else:
            needed = "fp8_format"
        for name, value in given.items():
            yield ConfigurationError(
                flag_of(name), f"{value}, which has no effect", f"Add {flag_of(needed)}"
            )

    def _unread_by_recipe(self, given: dict[str, object]) -> Iterator[ConfigurationError]:
        for name, recipes in _READ_BY.items():
            if name in given and self.fp8_recipe not in recipes:
                yield ConfigurationError(
                    flag_of(name),
                    f"{given[name]}, which the recipe {self.fp8_recipe} does not read",
                    f"Leave it out, or use --fp8-recipe {' or '.join(recipes)}",
                )

    def check_unsupported(self) -> None:
        """Reject Megatron options that Retro does not support."""
        if self.cp_comm_type is not None and self.context_parallel_size == 1:
            raise ConfigurationError(
                "--cp-comm-type",
                f"{self.cp_comm_type}, which has no effect",
                "Add --context-parallel-size",
            )
        raise_problems([*self.refused_options()])


def divided_texts(context_parallel_size: int) -> Iterator[ConfigurationError]:
    """The problem of a generation that would divide texts over processes, if it would."""
    if context_parallel_size != 1:
        yield ConfigurationError(
            "--context-parallel-size",
            f"{context_parallel_size}, but generation reads whole texts on every rank",
            "Leave it out: checkpoints load whatever their context parallel size, and "
            "--tensor-model-parallel-size and --pipeline-model-parallel-size divide the model",
        )


@dataclass(kw_only=True)
class RecomputeOptions:
    """Recomputation, which trades time for activation memory."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers (full) or chosen modules (selective) in the backward pass."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: all layers in groups (uniform), or the first layers one by one (block)."""
    recompute_num_layers: int | None = field(default=None, metadata=at_least(1))
    """With full: layers per group (uniform), or layers to recompute (block)."""
    recompute_modules: list[str] | None = None
    """With selective: modules to recompute. Default: core_attn."""
    cpu_offloading_num_layers: int = field(default=0, metadata=at_least(0))
    """Number of layers, from the first, whose activations wait in the CPU's memory."""

    def check_recompute(self) -> None:
        """Reject full recomputation without method and number of layers, and these without it."""
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
