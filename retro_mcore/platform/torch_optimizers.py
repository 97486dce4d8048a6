"""PyTorch's optimizers and sums of gradients on the CPU, where Megatron takes kernels for CUDA."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import OptimizerConfig, clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as wrappers
from megatron.core.utils import (
    local_multi_tensor_applier,
    local_multi_tensor_l2_norm,
    local_multi_tensor_scale,
)

from retro_mcore.errors import ConfigurationError

#: What each module has where neither Transformer Engine nor Apex is installed. A release that lacks
#: one of these names does not read it.
_WITHOUT_KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (
        optimizer,
        {
            "Adam": torch.optim.AdamW,
            "SGD": torch.optim.SGD,
            "USING_PYTORCH_OPTIMIZER": True,
        },
    ),
    (
        distrib_optimizer,
        {
            "Adam": torch.optim.Adam,
            "HAVE_APEX_OR_TE": False,
            "USING_TE_OPTIMIZER": False,
            "USING_APEX_OPTIMIZER": False,
        },
    ),
    (
        clip_grads,
        {
            "multi_tensor_applier": local_multi_tensor_applier,
            "l2_norm_impl": local_multi_tensor_l2_norm,
            "multi_tensor_scale_impl": local_multi_tensor_scale,
            "multi_tensor_scale_tensor_impl": None,
        },
    ),
    (
        wrappers,
        {
            "multi_tensor_applier": local_multi_tensor_applier,
            "multi_tensor_scale_impl": local_multi_tensor_scale,
        },
    ),
]


def use_torch_optimizers(config: OptimizerConfig) -> None:
    """Let Megatron build and run PyTorch's optimizers in this process (0.16.1 to 0.19.2).

    It chooses when it is imported, by what is installed: the fused optimizers of Transformer Engine
    or Apex, which need a GPU.

    Args:
        config: Of the optimizer that will be built.

    Raises:
        ConfigurationError: it asks for what only the fused Adam does.
    """
    if config.use_precision_aware_optimizer:
        raise ConfigurationError(
            "--use-precision-aware-optimizer",
            "given on the CPU, and only Transformer Engine's Adam does it",
            "Leave it out, or train on a GPU",
        )
    for module, values in _WITHOUT_KERNELS:
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value)
