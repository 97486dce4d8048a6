"""Norms in half precision on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

SIZE, ROWS = 64, 16_384


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_rows_are_summed_exactly(kind, zero_centered, dtype, megatron):
    """PyTorch's LayerNorm sums those of weight and bias in half precision, off by 15% in bf16."""
    from retro_mcore.platform.norm import Norm

    config = SimpleNamespace(
        normalization=kind,
        layernorm_zero_centered_gamma=zero_centered,
        sequence_parallel=False,
        params_dtype=dtype,
    )
    torch.manual_seed(0)
    norm, exact = Norm(config, SIZE), Norm(config, SIZE).double()
    states, gradient = (torch.randn(ROWS, SIZE, dtype=dtype) for _ in range(2))
    inputs = [states.clone().requires_grad_(), states.double().requires_grad_()]
    norm(inputs[0]).backward(gradient)
    exact(inputs[1]).backward(gradient.double())
    pairs = zip([inputs[0], *norm.parameters()], [inputs[1], *exact.parameters()], strict=True)
    for found, wanted in pairs:
        assert found.grad.dtype == dtype
        error = (found.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        # A result is rounded once, or a few times on the way; a sum of so many is not.
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("frozen", ["weight", "bias", None])
def test_what_needs_no_gradient_gets_none(frozen, megatron):
    from retro_mcore.platform.norm import Norm

    config = SimpleNamespace(
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=False,
        sequence_parallel=False,
        params_dtype=torch.bfloat16,
    )
    norm = Norm(config, SIZE)
    if frozen:
        getattr(norm, frozen).requires_grad_(False)
    states = torch.randn(4, SIZE, dtype=torch.bfloat16, requires_grad=frozen is not None)
    norm(states).sum().backward()
    for name in ("weight", "bias"):
        assert (getattr(norm, name).grad is None) == (name == frozen)
    assert (states.grad is None) == (frozen is None)
