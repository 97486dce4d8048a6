"""Megatron-Core's mixtures of experts, with a router and initial weights that fit our trainer.

Megatron scales load-balancing losses by how its own trainer divides gradients, which differs
between releases (0.16.1 to 0.19.2). `BalancedRouter` weighs them by a factor that the trainer sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from retro_mcore.platform import is_cpu_in_use
from retro_mcore.platform.tracking import Tracker

#: Names of the losses, as Megatron logs them.
LOSS_NAMES = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}
Z_LOSS = "z_loss"
_PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


def get_experts(backend: Any, config: TransformerConfig) -> Any:
    """The spec of an MoE layer, from the backend's linear layers.

    Args:
        backend: A BackendSpecProvider.
        config: The decoder's configuration; gives the number of experts.
    """
    spec: Any = get_moe_module_spec_for_backend(backend, num_experts=config.num_moe_experts)
    # A ModuleSpec, from 0.17 on a partial.
    parts = spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]
    parts.router = BalancedRouter
    if is_cpu_in_use():
        allow_splits_on_cpu()
    experts = parts.experts
    if isinstance(experts, ModuleSpec) and experts.module is SequentialMLP:
        experts.module = LocalExperts
    elif isinstance(experts, partial) and experts.func is SequentialMLP:
        parts.experts = partial(LocalExperts, *experts.args, **experts.keywords)
    return spec


def allow_splits_on_cpu() -> None:
    """Let tokens travel all to all on the CPU (0.16.1 to 0.19.2); idempotent.

    Megatron turns the numbers of tokens into arrays while it copies them from the GPU. On the CPU
    it leaves them tensors, which torch's collective refuses.
    """
    original: Any = token_dispatcher.maybe_move_tensor_to_cpu
    if getattr(original, "works_on_cpu", False):
        return

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return np.array(tensor.tolist())  # of fake tensors, too
        return original(tensor, as_numpy, record_stream)

    move.works_on_cpu = True  # type: ignore[attr-defined]
    token_dispatcher.maybe_move_tensor_to_cpu = move


class BalancedRouter(TopKRouter):
    """Megatron's router, with its load-balancing losses weighed and recorded for our trainer.

    The losses are computed in training only, over the positions that `padding_mask` leaves. They
    do not change the forward pass: their gradients join the router's.

    Attributes:
        loss_weight: Factor on the losses' gradients, beside the loss scale.
        losses: Sums of this rank's losses since `take_losses`, by name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_weight: Tensor | float = 1.0
        self.losses: dict[str, Tensor] = {}

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice of the experts, `[S * B, experts]` each.

        Args:
            input: `[S, B, D]`, under sequence parallelism this rank's part of S.
            padding_mask: bool `[S, B]`, True = not counted in the losses; whole, or this rank's
                part.
        """
        if padding_mask is not None and padding_mask.size(0) != input.size(0):
            # Megatron cuts it on the first pipeline stage only.
            parts = padding_mask.chunk(self.tp_group.size())
            padding_mask = parts[self.tp_group.rank()]
        return super().forward(input, padding_mask)

    def gating(self, input: Tensor) -> Tensor:
        """Logits `[S, B, experts]`. (Megatron's own needs Transformer Engine.)"""
        dtype = _PRECISIONS.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, aux_loss_name: str,
        *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Let a loss's gradient flow with that of `activation`."""
        self._record(aux_loss_name, aux_loss / aux_loss_coeff)
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * self.loss_weight)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Let the z-loss's gradient flow with that of the logits `[tokens, experts]`.

        It is the mean of the squared log of the softmax's denominator (Zoph et al. 2022, "ST-MoE").
        """
        coefficient = self.config.moe_z_loss_coeff
        if not (coefficient and self.training and torch.is_grad_enabled()):
            return logits
        squares = torch.logsumexp(logits.float(), dim=-1).square()
        counted = torch.ones_like(squares) if padding_mask is None else (~padding_mask).float()
        total = counted.sum()
        dist.all_reduce(total, group=self.tp_cp_group)
        loss = (squares * counted).sum() / total.clamp(min=1)
        self._record(Z_LOSS, loss)
        return MoEAuxLossAutoScaler.apply(logits, loss * coefficient * self.loss_weight)

    def _record(self, name: str, loss: Tensor) -> None:
        self.losses[name] = self.losses.get(name, 0.0) + loss.detach().double()


def loss_names(config: TransformerConfig) -> list[str]:
    """Names of the losses that a model's routers compute in training."""
    if config.num_moe_experts is None:
        return []
    kind = config.moe_router_load_balancing_type
    names = [LOSS_NAMES[kind]] if kind in LOSS_NAMES and config.moe_aux_loss_coeff else []
    return names + ([Z_LOSS] if config.moe_z_loss_coeff else [])


def routers(models: Iterable[torch.nn.Module]) -> Iterator[BalancedRouter]:
    """The routers of this rank's stages."""
    for model in models:
        for module in model.modules():
            if isinstance(module, BalancedRouter):
                yield module


@contextmanager
def routing_evenly(models: Iterable[torch.nn.Module], tracker: Tracker) -> Iterator[None]:
    """Context in which every expert is chosen by as many of a rank's tokens as any other.

    Only the choice is changed, not the experts' weights: memory, messages and FLOPs are those of
    balanced experts, and what is computed means nothing.

    Args:
        models: This rank's stages.
        tracker: Sees their tensors.
    """

    def choose(router: Any, _: object, output: tuple[Tensor, Tensor]) -> None:
        (tokens, experts), chosen = output[1].shape, router.config.moe_router_topk
        tracker.write(output[1], partial(_even_choice, tokens, experts, chosen))

    handles = [router.register_forward_hook(choose) for router in routers(models)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _even_choice(tokens: int, experts: int, chosen: int) -> Tensor:
    """The experts of each token in turn: bool `[tokens, experts]`."""
    places = torch.arange(tokens * chosen).view(tokens, chosen) % experts
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, places, True)


def take_losses(models: Iterable[torch.nn.Module], names: Iterable[str]) -> Tensor:
    """Sums of this rank's losses over layers and micro batches, by `names`; then they are reset.

    Under tensor and context parallelism each rank has its tokens' share.
    """
    device = torch.cuda.current_device()
    names = list(names)
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for router in routers(models):
        for index, name in enumerate(names):
            sums[index] += router.losses.get(name, 0.0)
        router.losses.clear()
    return sums


class LocalExperts(SequentialMLP):
    """Megatron's experts of local linear layers, with initial weights equal in every layout.

    Each expert's weights follow from one drawn number and the expert's own, so that neither they
    nor what is drawn afterwards depend on how many experts a rank holds. Only where weights are
    initialized on the CPU; elsewhere they are Megatron's.

    Args:
        num_local_experts: Number of experts on this rank.
        config: The decoder's configuration.
        *args, **kwargs: As SequentialMLP takes them.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *args: Any, **kwargs: Any
    ) -> None:
        seed = int(torch.randint(2**31, ()))
        state = torch.get_rng_state()
        super().__init__(num_local_experts, config, *args, **kwargs)
        for expert in self.local_experts:
            # For Muon. Transformer Engine says 0 of what Megatron divides for it.
            expert.linear_fc2.weight.partition_dim = 1
        if config.use_cpu_initialization and config.perform_initialization:
            first = self.ep_group.rank() * num_local_experts
            for number, expert in enumerate(self.local_experts, first):
                torch.default_generator.manual_seed(seed + number)
                self._initialize(expert.linear_fc1.weight, 0, config.init_method)
                self._initialize(expert.linear_fc2.weight, 1, config.output_layer_init_method)
        torch.set_rng_state(state)

    def _initialize(self, weight: Tensor, dimension: int, method: Any) -> None:
        shape, parts = list(weight.shape), self.tp_group.size()
        shape[dimension] *= parts
        whole = torch.empty(shape, dtype=torch.float32, device="cpu")
        method(whole)
        with torch.no_grad():
            weight.copy_(whole.chunk(parts, dimension)[self.tp_group.rank()])
