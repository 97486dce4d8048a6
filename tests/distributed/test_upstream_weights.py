"""The retired Retro's weights, loaded into and exported from models spread over ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.layouts import (
    Layout,
    build_chunk,
    build_chunks,
    join_layout,
    load_part,
    serial_weights,
)
from tests.processes import run_ranks

pytestmark = pytest.mark.distributed

MODELS = {
    "learned positions, tied": {},
    "rotary, SwiGLU, grouped queries, untied": {
        "position_embedding_type": "rope",
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "share_embeddings_and_output_weights": False,
    },
}
LAYOUTS = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "PP2 x VPP2": {"pipeline": 2, "virtual": 2},
}


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, every_layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_loaded_and_exported_without_loss(two_ranks, model, layout):
    for rank in two_ranks:
        problems = rank[model, layout]
        assert not problems


def every_layout():
    results = {}
    for model, fields in MODELS.items():
        join_layout(Layout())
        serial, weights = serial_model(fields)
        for name, sizes in LAYOUTS.items():
            layout = Layout(**sizes, fields=fields)
            join_layout(layout)
            results[model, name] = problems_of(layout, serial, weights)
    return results


def serial_model(fields):
    """A whole model's weights under upstream's names, and under its own."""
    from retro_mcore.checkpoint.conversion import upstream

    fields = {**Layout(fields=fields).model_fields()}
    weights = serial_weights(fields)
    model = build_chunk(fields, None, True, True)
    load_part(model, weights)
    return upstream.export_state_dict(model), weights


def problems_of(layout, serial, weights):
    """Parameters that differ, after loading from those that another slicing gives (load_part), and
    after exporting from what was loaded."""
    from retro_mcore.checkpoint.conversion import upstream

    expected, models = build_chunks(layout), build_chunks(layout)
    upstream.load_state_dict(models, serial)
    problems = []
    for wanted, model in zip(expected, models, strict=True):
        load_part(wanted, weights)
        pairs = zip(wanted.named_parameters(), model.named_parameters(), strict=True)
        problems += [name for (name, one), (_, other) in pairs if not torch.equal(one, other)]
    exported = upstream.export_state_dict(models)
    assert exported.keys() == serial.keys()
    return problems + [name for name in serial if not torch.equal(exported[name], serial[name])]
