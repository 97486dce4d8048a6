"""Flags made from the configuration dataclasses of the installed megatron-core.

Names, types, defaults and help are read from megatron's source, not imported: `--help` stays fast,
and a command can choose its device before megatron is loaded. A field that the installed version
lacks gives no flag.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

from retro_mcore.errors import ConfigurationError

#: Flags of the layers' precision, and their fields in TransformerConfig.
PRECISION_FLAGS: dict[str, str] = {
    "fp8_format": "fp8",
    "fp8_recipe": "fp8_recipe",
    "fp8_margin": "fp8_margin",
    "fp8_amax_history_len": "fp8_amax_history_len",
    "fp8_amax_compute_algo": "fp8_amax_compute_algo",
    "fp8_wgrad": "fp8_wgrad",
    "fp8_dot_product_attention": "fp8_dot_product_attention",
    "tp_only_amax_red": "tp_only_amax_red",
    "first_last_layers_bf16": "first_last_layers_bf16",
    "num_layers_at_start_in_bf16": "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16": "num_layers_at_end_in_bf16",
    "fp32_residual_connection": "fp32_residual_connection",
}

#: Flags of the model's layers, and their fields in TransformerConfig.
LAYER_FLAGS: dict[str, str] = {
    **PRECISION_FLAGS,
    "cross_entropy_loss_fusion": "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl": "cross_entropy_fusion_impl",
    "account_for_embedding_in_pipeline_split": "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split": "account_for_loss_in_pipeline_split",
    "microbatch_group_size_per_virtual_pipeline_stage": "microbatch_group_size_per_vp_stage",
}

#: Flags of data parallelism, and their fields in DistributedDataParallelConfig.
DATA_PARALLEL_FLAGS: dict[str, str] = {
    "overlap_grad_reduce": "overlap_grad_reduce",
    "overlap_param_gather": "overlap_param_gather",
    "ddp_bucket_size": "bucket_size",
    "ddp_pad_buckets_for_high_nccl_busbw": "pad_buckets_for_high_nccl_busbw",
    "ddp_average_in_collective": "average_in_collective",
    "ddp_reduce_scatter_with_fp32_accumulation": "reduce_scatter_with_fp32_accumulation",
    "check_for_large_grads": "check_for_large_grads",
}

#: Flags of the optimizer, and their fields in OptimizerConfig.
OPTIMIZER_FLAGS: dict[str, str] = {
    "decoupled_lr": "decoupled_lr",
    "decoupled_min_lr": "decoupled_min_lr",
    "loss_scale": "loss_scale",
    "initial_loss_scale": "initial_loss_scale",
    "min_loss_scale": "min_loss_scale",
    "loss_scale_window": "loss_scale_window",
    "hysteresis": "hysteresis",
    "use_precision_aware_optimizer": "use_precision_aware_optimizer",
}

_FILES = {
    "TransformerConfig": "transformer/transformer_config.py",
    "ModelParallelConfig": "model_parallel_config.py",
    "DistributedDataParallelConfig": "distributed/distributed_data_parallel_config.py",
    "OptimizerConfig": "optimizer/optimizer_config.py",
}

_TYPES = {name: getattr(typing, name) for name in ("List", "Literal", "Optional", "Tuple", "Union")}
_TYPES |= {kind.__name__: kind for kind in (bool, int, float, str, list, tuple)}


def flag_of(name: str) -> str:
    """The flag of an option: `--seq-length` of `seq_length`."""
    return "--" + name.replace("_", "-")


def values_of(options: object, flags: Mapping[str, str]) -> dict[str, Any]:
    """Values of the options, by field of megatron's dataclass."""
    return {
        field: getattr(options, flag) for flag, field in flags.items() if hasattr(options, flag)
    }


@contextmanager
def naming_refusals() -> Iterator[None]:
    """Report values that one of megatron's configurations rejects as errors of the user.

    Raises:
        ConfigurationError: with what megatron says.
    """
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or "it does not say why"
        raise ConfigurationError(
            "the flags", f"megatron-core refuses them: {reason}", "Change what it names"
        ) from error


def _options_class(name: str, doc: str, flags: Mapping[str, str], *sources: str) -> Any:
    known = {field: entry for source in sources for field, entry in _fields(source).items()}
    made = dataclasses.make_dataclass(
        name,
        [(flag, *known[field]) for flag, field in flags.items() if field in known],
        kw_only=True,
        namespace={"__doc__": doc},
    )
    made.__module__ = __name__  # where pickle finds it
    return made


def _fields(source: str) -> dict[str, tuple[Any, Any]]:
    """(type with its help, default) of every field with a plain type, by name."""
    tree = ast.parse((_megatron_core() / _FILES[source]).read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == source)
    return _fields_of_class(node)


def _fields_of_class(node: ast.ClassDef) -> dict[str, tuple[Any, Any]]:
    fields = {}
    for statement, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        try:
            kind = eval(ast.unparse(statement.annotation), {"__builtins__": {}}, _TYPES)
            default = _default(statement.value)
        except (NameError, ValueError, AttributeError):
            continue  # a type that no flag can give
        text = _first_sentence(following)
        fields[statement.target.id] = (Annotated[kind, tyro.conf.arg(help=text)], default)
    return fields


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # field(default=..., metadata=...)
        values = (keyword.value for keyword in value.keywords if keyword.arg == "default")
        value = next(values, None)
    if value is None:
        raise ValueError("no default")
    if isinstance(value, ast.BinOp):  # 2**32
        return eval(ast.unparse(value), {"__builtins__": {}}, {})
    return ast.literal_eval(value)


def _first_sentence(node: ast.stmt) -> str:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return ""
    text = " ".join(str(node.value.value).split())
    return text.split(". ")[0].rstrip(".") + "."


def _megatron_core() -> Path:
    spec = importlib.util.find_spec("megatron")  # a namespace package: nothing is imported
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next(path for folder in folders if (path := Path(folder) / "core").is_dir())


LayerFlags = _options_class(
    "LayerFlags", "How layers compute.", LAYER_FLAGS, "TransformerConfig", "ModelParallelConfig"
)
DataParallelFlags = _options_class(
    "DataParallelFlags",
    "How gradients and weights travel.",
    DATA_PARALLEL_FLAGS,
    "DistributedDataParallelConfig",
)
OptimizerFlags = _options_class(
    "OptimizerFlags", "Loss scaling and more.", OPTIMIZER_FLAGS, "OptimizerConfig"
)
