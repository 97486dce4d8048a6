"""Megatron's optimizers other than Adam: which of them a release has, and workarounds.

| function                 | releases         | what happens without it                          |
|--------------------------|------------------|--------------------------------------------------|
| `build_matrix_optimizer` | 0.16.1 to 0.19.2 | releases differ in how they build Muon           |
| `_as_embeddings`         | 0.16.1 to 0.19.2 | learned positions are orthogonalized, silently   |
| `_use_own_settings`      | 0.18 to 0.19.2   | Lion has Adam's betas, and SOAP an epsilon of    |
|                          |                  | its own, silently                                |
| `_split_by_own_heads`    | 0.16.1 to 0.19.2 | the encoder's queries, keys and values are split |
|                          |                  | at the decoder's sizes, silently                 |
| `initialize_sgd_state`   | 0.16.1 to 0.19.2 | a checkpoint of SGD does not load                |
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.parallel_state import get_pipeline_model_parallel_world_size
from torch import Tensor

from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.cpu import is_cpu_in_use

_REPOSITORY = "git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers"


def has_registry() -> bool:
    """Whether megatron-core keeps its optimizers in a registry (0.18 and later)."""
    return find_spec("megatron.core.optimizer.emerging_optimizers") is not None


def check_available(optimizer: str) -> None:
    """Reject an optimizer that the installed packages cannot build.

    Raises:
        ConfigurationError: megatron-core or Emerging-Optimizers lacks it.
    """
    if optimizer in ("adam", "sgd"):
        return
    if optimizer not in ("muon", "dist_muon") and not has_registry():
        raise ConfigurationError(
            "--optimizer",
            f"{optimizer}, which megatron-core {version('megatron-core')} does not have",
            "Install 0.18 or later, or use muon",
        )
    if not _has_package():
        release = "v0.2.0" if has_registry() else "v0.1.0"
        raise ConfigurationError(
            "--optimizer",
            f"{optimizer}, but the package emerging_optimizers is missing, or in a release that "
            f"megatron-core {version('megatron-core')} does not take",
            f"Install it with Python 3.12 or later: pip install '{_REPOSITORY}@{release}'",
        )


def _has_package() -> bool:
    if has_registry():
        from megatron.core.optimizer import emerging_optimizers as module
    else:
        from megatron.core.optimizer import muon as module
    if not module.HAVE_EMERGING_OPTIMIZERS:
        return False
    if has_registry() or hasattr(module, "HAVE_EO_V02"):  # written for several releases
        return True
    return "mode" in inspect.signature(module.newton_schulz_tp).parameters


def build_matrix_optimizer(
    config: OptimizerConfig, stages: Sequence[torch.nn.Module]
) -> MegatronOptimizer:
    """Build Megatron's optimizer of matrices, and AdamW for all other weights.

    AdamW trains embeddings, output layer, norms and biases.

    Args:
        config: With `optimizer` muon, dist_muon, adaptive_muon, lion or soap. May be changed.
        stages: The model's stages on this rank, wrapped in data parallelism.

    Raises:
        ConfigurationError: the release would resume it with other states.
    """
    overrides, shared = _standard_overrides(config, stages), config.optimizer == "dist_muon"
    with _as_embeddings(stages):
        if has_registry():
            if shared:  # as the name is to be written in these releases
                config.optimizer, config.use_layer_wise_distributed_optimizer = "muon", True
            optimizer = get_megatron_optimizer(config, list(stages), config_overrides=overrides)
        else:
            from megatron.core.optimizer.muon import get_megatron_muon_optimizer

            stages_of_pipeline = get_pipeline_model_parallel_world_size()
            if config.bf16 and not shared and stages_of_pipeline > 1:
                raise ConfigurationError(
                    "--optimizer",
                    f"muon with --bf16 on {stages_of_pipeline} pipeline stages, where "
                    f"megatron-core {version('megatron-core')} resumes with other states, silently",
                    "Use dist_muon",
                )
            optimizer = get_megatron_muon_optimizer(
                config, list(stages), overrides, layer_wise_distributed_optimizer=shared
            )
    if shared and is_cpu_in_use():  # gloo gathers tensors of one size only
        optimizer.allgather_params = optimizer.broadcast_params
    _split_by_own_heads(optimizer, stages)
    _use_own_settings(optimizer, config)
    return optimizer


def _standard_overrides(
    config: OptimizerConfig, stages: Sequence[torch.nn.Module]
) -> dict[Any, Any]:
    """Megatron's groups. Word embeddings are listed, since `_as_embeddings` marks more."""
    overrides = get_standard_config_overrides(config)
    decoupled = overrides.pop(ParamKey(attr=_IS_EMBEDDING), None)
    if decoupled is not None:
        words = {id(p) for stage in stages for p in stage.parameters() if _is_embedding(p)}
        listed = ParamPredicate("word_embedding_or_output", lambda p: id(p) in words)
        overrides[ParamKey(predicate=listed)] = decoupled
    return overrides


_IS_EMBEDDING = "is_embedding_or_output_parameter"


def _is_embedding(parameter: Tensor) -> bool:
    return bool(getattr(parameter, _IS_EMBEDDING, False))


@contextmanager
def _as_embeddings(stages: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Mark position embeddings as embeddings, so that AdamW trains them (0.16.1 to 0.19.2)."""
    positions = [
        parameter
        for stage in stages
        for name, parameter in stage.named_parameters()
        if name.endswith("position_embeddings.weight")
    ]
    for parameter in positions:
        setattr(parameter, _IS_EMBEDDING, True)
    try:
        yield
    finally:
        for parameter in positions:
            delattr(parameter, _IS_EMBEDDING)


def _use_own_settings(optimizer: Any, config: Any) -> None:
    """Give Lion its betas and SOAP Adam's epsilon (0.18 to 0.19.2).

    Megatron gives Lion Adam's betas, though it has options for Lion's, and no epsilon to SOAP.
    """
    if config.optimizer == "lion":
        own: dict[str, Any] = {"betas": (config.lion_beta1, config.lion_beta2)}
    elif config.optimizer == "soap":
        own = {"eps": config.adam_eps}
    else:
        return
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if type(part.optimizer).__name__.lower() == config.optimizer:
            part.optimizer.defaults.update(own)
            for group in part.optimizer.param_groups:
                group.update(own)


def _split_by_own_heads(optimizer: Any, stages: Sequence[torch.nn.Module]) -> None:
    """Split each projection of queries, keys and values at its own sizes (0.16.1 to 0.19.2).

    Megatron takes those of the decoder for all.
    """
    for stage in stages:
        for module in stage.modules():
            if (projection := getattr(module, "linear_qkv", None)) is not None:
                weight = projection.weight
                for copy in (weight, getattr(weight, "main_param", weight)):
                    copy.is_qkv, copy.retro_qkv_sizes = True, _head_sizes(module.config)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part.optimizer, "qkv_split_shapes"):
            muon = part.optimizer
            muon.orthogonalize = partial(_orthogonalize, muon, muon.orthogonalize)


def _head_sizes(config: Any) -> list[int]:
    """Rows of a query group: its queries, a key and a value."""
    queries = config.num_attention_heads // config.num_query_groups * config.kv_channels
    return [queries, config.kv_channels, config.kv_channels]


def _orthogonalize(muon: Any, method: Any, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
    sizes = getattr(p, "retro_qkv_sizes", None)
    if sizes is not None:
        muon.qkv_split_shapes = sizes
        if hasattr(p, "qkv_split_shapes"):  # read first, from 0.19 on
            p.qkv_split_shapes = sizes  # type: ignore[attr-defined]
    result: Tensor = method(p, grad, **kwargs)
    return result


def initialize_sgd_state(optimizer: MegatronOptimizer) -> None:
    """Let SGD's momentum load from a checkpoint (0.16.1 to 0.19.2).

    Megatron gives SGD no function that allocates its state. A zero momentum equals none: the first
    step sets it to the gradient.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.init_state_fn = _allocate_momentum


def allocate_sgd_state(optimizer: MegatronOptimizer) -> None:
    """Give SGD the state that loading expects, also before its first step (0.16.1 to 0.19.2)."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "init_state_fn", None) is _allocate_momentum:
            _allocate_momentum(part.optimizer)


def _allocate_momentum(sgd: torch.optim.Optimizer, config: object = None) -> None:
    for group in sgd.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            sgd.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.data))
