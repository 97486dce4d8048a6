"""MLPs, and mixtures of experts.

Shapes: T tokens, D hidden size, E experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_retro import BlockSizes, RetroConfig
from .linear_retro import linear


class RetroMLP(nn.Module):
    """The MLP, gated or not; also an expert's.

    Args:
        config: The model's configuration.
        sizes: Those of the block that it belongs to.
        inner: Width inside. None: the block's.
    """

    def __init__(self, config: RetroConfig, sizes: BlockSizes, inner: int | None = None) -> None:
        super().__init__()
        width, beta = sizes.hidden_size, sizes.deepnorm_beta
        inner = inner or sizes.ffn_hidden_size
        biases, gated = not config.disable_bias_linear, config.swiglu or config.geglu
        part = partial(linear, config, inner, width, biases, beta=beta)
        self.gate_proj = part(joined=2 * inner) if gated else None
        self.up_proj = part(joined=2 * inner) if gated else part()
        self.down_proj = linear(config, width, inner, biases, output=True, beta=beta)
        self.activation = _activation(config)

    def forward(self, states: Tensor, weights: Tensor | None = None) -> Tensor:
        """`[..., D]` to `[..., D]`; an expert's tokens have weights `[..., 1]`."""
        inner = self.up_proj(states)
        if self.gate_proj is None:
            inner = self.activation(inner)
        else:
            inner = self.activation(self.gate_proj(states)) * inner
        if weights is not None:  # before the projection, as Megatron's experts
            inner = (inner * weights).to(inner.dtype)
        return self.down_proj(inner)


def _activation(config: RetroConfig) -> Callable[[Tensor], Tensor]:
    if config.swiglu:
        return F.silu
    if config.squared_relu:
        return _squared_relu
    tanh = config.openai_gelu or config.geglu
    return partial(F.gelu, approximate="tanh" if tanh else "none")


def _squared_relu(states: Tensor) -> Tensor:
    return F.relu(states).square()


_PRECISIONS = {None: None, "fp32": torch.float32, "fp64": torch.float64}


class RetroRouter(nn.Module):
    """Chooses the experts of each token.

    Args:
        config: The model's configuration.
        experts: E.
    """

    def __init__(self, config: RetroConfig, experts: int) -> None:
        super().__init__()
        self.config = config
        # No nn.Linear: quantizing it would change the choice of experts.
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.dtype = _PRECISIONS[config.moe_router_dtype]

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """`[T, D]` to the chosen experts' weights and their numbers, `[T, k]` each."""
        config, weight = self.config, self.weight
        dtype = self.dtype or states.dtype
        with torch.autocast(states.device.type, enabled=False):  # it would set its own precision
            logits = F.linear(states.to(dtype), weight.to(dtype))
        if config.moe_router_score_function == "sigmoid":
            scores, chosen = self._choose(logits.float().sigmoid())
            # One expert keeps its score; those of several are divided by their sum.
            sums = scores.sum(-1, keepdim=True) + 1e-20
            weights = scores / sums if config.moe_router_topk > 1 else scores
        elif config.moe_router_pre_softmax:
            weights, chosen = self._choose(logits.softmax(-1, dtype=torch.float32))
        else:
            scores, chosen = self._choose(logits)
            weights = scores.softmax(-1, dtype=torch.float32)
        if config.moe_router_topk_scaling_factor:
            weights = weights * config.moe_router_topk_scaling_factor
        return weights.to(dtype), chosen

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The largest scores, and which experts have them."""
        groups, taken = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        number = self.config.moe_router_topk
        if groups is None or taken is None:
            return scores.topk(number, dim=-1)
        # The groups with the largest sums of as many scores as may be chosen from one.
        grouped = scores.unflatten(-1, (groups, -1))
        sums = grouped.topk(number // taken, dim=-1)[0].sum(-1)
        allowed = torch.zeros_like(sums, dtype=torch.bool)
        allowed.scatter_(-1, sums.topk(taken, dim=-1)[1], True)
        limited = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        return limited.topk(number, dim=-1)


class RetroExperts(nn.Module):
    """A mixture of experts in place of a decoder layer's MLP."""

    def __init__(self, config: RetroConfig, sizes: BlockSizes) -> None:
        super().__init__()
        number, inner = config.num_experts or 0, config.moe_ffn_hidden_size
        self.router = RetroRouter(config, number)
        self.experts = nn.ModuleList(RetroMLP(config, sizes, inner) for _ in range(number))
        shared = config.moe_shared_expert_intermediate_size
        self.shared_expert = RetroMLP(config, sizes, shared) if shared else None
        gated = shared and config.moe_shared_expert_gate
        self.shared_expert_gate = (
            linear(config, 1, sizes.hidden_size, bias=False) if gated else None
        )

    def forward(self, states: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`: the weighted sum of each token's experts."""
        tokens = states.flatten(0, -2)
        weights, chosen = self.router(tokens)
        output = torch.zeros_like(tokens)
        # In training all run, also on no token: data parallelism waits for every gradient.
        numbers = range(len(self.experts)) if self.training else chosen.unique().tolist()
        for number in numbers:
            rows, places = (chosen == number).nonzero(as_tuple=True)
            part = self.experts[number](tokens[rows], weights[rows, places, None])
            output.index_add_(0, rows, part.to(output))
        if self.shared_expert is not None:
            output = output + self._shared(tokens)
        return output.view_as(states)

    def _shared(self, tokens: Tensor) -> Tensor:
        assert self.shared_expert is not None
        output = self.shared_expert(tokens)
        if self.shared_expert_gate is None:
            return output
        return output * self.shared_expert_gate(tokens).sigmoid()
