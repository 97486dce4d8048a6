"""Activations of the first layers wait in the CPU's memory; no gradient changes."""

from __future__ import annotations

import pytest
import torch

from retro_mcore.errors import ConfigurationError
from tests.unit.model.builders import build_model, make_inputs, run_model
from tests.unit.training.small import small_trainer, train

pytestmark = pytest.mark.usefixtures("megatron")
LAYERS = {"num_layers": 4, "retro_decoder_layers": [2, 4]}


def gradients(**overrides):
    """Gradients by name, and the bytes that were moved."""
    torch.manual_seed(1)
    model = build_model(**LAYERS, **overrides).train()
    inputs = make_inputs(model.config)
    for _ in range(2):  # each pass counts its layers anew
        model.zero_grad()
        run_model(model, inputs, labels=inputs["labels"]).mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found, model.offloading.moved_bytes


def test_no_gradient_changes():
    expected, nothing = gradients()
    assert nothing == 0
    moved = []
    for layers in (1, 2, 3):
        found, size = gradients(cpu_offloading_num_layers=layers)
        assert all(torch.equal(found[name], wanted) for name, wanted in expected.items())
        moved.append(size)
    first, second, third = moved[0], moved[1] - moved[0], moved[2] - moved[1]
    assert first == third > 0
    assert second > 2 * first  # with the encoder and the cross-attention


def test_what_is_saved_is_moved_and_weights_stay():
    class Saved(torch.autograd.Function):
        """Hands on what it saved."""

        @staticmethod
        def forward(ctx, weight, activation):
            ctx.save_for_backward(weight, weight.t(), activation, mask)
            return activation.clone()

        @staticmethod
        def backward(ctx, gradient):
            kept.extend(ctx.saved_tensors)
            return torch.zeros_like(weight), gradient

    from retro_mcore.platform.offloading import ActivationOffloading

    kept: list[torch.Tensor] = []
    weight = torch.nn.Parameter(torch.randn(2, 3))
    activation = torch.randn(5, requires_grad=True) * 1
    mask = torch.randn(3, 1, 4)[:, :, :3].expand(3, 7, 3)
    offloading = ActivationOffloading(1)
    with offloading.forward_pass():
        with offloading:
            result = Saved.apply(weight, activation)
        with offloading:  # the second layer
            Saved.apply(weight, activation)
    assert offloading.moved_bytes == activation.nbytes + mask.nbytes // 7
    result.sum().backward()
    places = [tensor.untyped_storage().data_ptr() for tensor in kept]
    of_weight = weight.untyped_storage().data_ptr()
    assert places[:2] == [of_weight, of_weight]
    assert places[2] != activation.untyped_storage().data_ptr()
    assert torch.equal(kept[2], activation)
    assert torch.equal(kept[3], mask)


def test_nothing_moves_where_nothing_is_saved():
    model = build_model(**LAYERS, cpu_offloading_num_layers=3).eval()
    with torch.no_grad():
        run_model(model, make_inputs(model.config))
    assert model.offloading.moved_bytes == 0


def test_the_flag_reaches_training_of_retro_and_gpt():
    from megatron.core.utils import unwrap_model

    for kind in ({}, {"no_retrieval": True, "retro_decoder_layers": None}):
        trainer = small_trainer(cpu_offloading_num_layers=1, **kind)
        assert trainer.train().train_losses == train(**kind).train_losses
        assert unwrap_model(trainer._parts.stages[0]).offloading.num_layers == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cpu_offloading_num_layers": 2}, "--cpu-offloading-num-layers: 2 of 2 layers"),
        (
            {"cpu_offloading_num_layers": 1, "recompute_granularity": "selective"},
            "--cpu-offloading-num-layers: 1 with --recompute-granularity selective",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        small_trainer(**flags)


def test_not_with_pipeline_parallelism():
    with pytest.raises(ConfigurationError, match="1 with pipeline_model_parallel_size 2"):
        build_model(
            **LAYERS,
            cpu_offloading_num_layers=1,
            pipeline_model_parallel_size=2,
            pipeline_dtype=torch.float32,
        )
