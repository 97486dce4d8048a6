"""A model of Transformer Engine's modules is the model of local ones: names, shapes, places in
checkpoints, initial weights, what optimizers read of them, and what the modules are told to compute
(`make test-te`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.processes import join_megatron, run_ranks
from tests.te.arithmetic import computed_here
from tests.te.engines import MARKS, attributes, model_of, pair, sharded, weights_of
from tests.unit.huggingface.models import inputs_of, our_logits
from tests.unit.huggingface.test_against_megatron import CASES, TOGETHER
from tests.unit.model.builders import randomize_vectors

pytestmark = [*MARKS, pytest.mark.usefixtures("megatron")]

MODELS = {"plain": {}, **CASES, **TOGETHER}


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_places_in_checkpoints(name):
    local, engine = pair(**MODELS[name])
    assert_same_state(local, engine)
    assert sharded(engine) == sharded(local)


def assert_same_state(local: Any, engine: Any) -> None:
    wanted, found = weights_of(local), weights_of(engine)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
    assert attributes(engine) == attributes(local)
    for key, weight in wanted.items():
        assert torch.equal(found[key], weight), f"{key} starts otherwise"


@pytest.mark.parametrize("name", MODELS)
def test_modules_are_told_to_compute_the_same(name):
    local, engine = pair(**MODELS[name])
    randomize_vectors(local)
    local, engine = local.double(), engine.double()
    with torch.no_grad():
        for key, weight in weights_of(engine).items():
            weight.copy_(weights_of(local)[key])
    retrieves = hasattr(local.config, "retro_chunk_length")
    inputs = inputs_of(local, 27) if retrieves else {"input_ids": torch.randint(90, (2, 27))}
    with computed_here():
        found = our_logits(engine, inputs)
    # In float64 only a mistake makes a difference, but for experts: their weights are float32.
    torch.testing.assert_close(found, our_logits(local, inputs), atol=1e-5, rtol=0)


#: Layouts of two processes, and the models that they divide.
LAYOUTS = {
    "tensor and sequence parallel": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        MODELS,
    ),
    "expert parallel": (
        {"expert_model_parallel_size": 2},
        {name: MODELS[name] for name in ("num_experts", "qwen2_moe")},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_two_processes(layout):
    for differences in run_ranks(2, compare_parts, *LAYOUTS[layout]):
        assert differences == {}


def compare_parts(layout: dict[str, Any], models: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What differs on this rank, by model."""
    join_megatron(**{key: value for key, value in layout.items() if key.endswith("_size")})
    differences = {}
    for name, options in models.items():
        try:
            local, engine = pair(stage=layout, **options)
            assert_same_state(local, engine)
            assert sharded(engine) == sharded(local)
        except Exception as error:
            differences[name] = repr(error)
    return differences


def test_a_forward_pass_needs_a_gpu():
    """What cannot be tried here, and how it fails."""
    model = model_of(True)
    with pytest.raises(Exception, match=r"CUDA|cuda|GPU"):
        our_logits(model, inputs_of(model))
