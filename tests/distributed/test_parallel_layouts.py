"""Three optimizer steps under each parallel layout equal those of one process."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.distributed.layouts import (
    GLOBAL_BATCH_SIZE,
    SEQUENCE_LENGTH,
    Layout,
    Run,
    join_layout,
    serial_weights,
    train,
    train_all,
)
from tests.processes import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROPE = {
    "position_embedding_type": "rope",
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
}
TIED = {"share_embeddings_and_output_weights": True}
NARROW = {"retro_encoder_hidden_size": 24, "retro_encoder_num_attention_heads": 2}
DEEP = {"retro_deepnorm": True, "retro_mup_base_hidden_size": 16, **TIED}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}

TWO_RANKS = {
    "TP2": Layout(tensor=2),
    "TP2+SP": Layout(tensor=2, sequence=True),
    "TP2+SP, rotary": Layout(tensor=2, sequence=True, fields=ROPE),
    "DP2": Layout(),
    "DP2, distributed optimizer": Layout(distributed_optimizer=True, fields=TIED),
    "PP2, encoder first": Layout(pipeline=2, fields={"retro_decoder_layers": [2, 7]}),
    "PP2, encoder last": Layout(pipeline=2, fields={"retro_decoder_layers": [6, 8]}),
    "PP2, encoder last, tied": Layout(pipeline=2, fields={"retro_decoder_layers": [5], **TIED}),
    "PP2, tied, rotary": Layout(pipeline=2, fields={**ROPE, **TIED}),
    "PP2, narrow encoder": Layout(pipeline=2, fields=NARROW),
    "TP2+SP, narrow encoder, relative positions": Layout(
        tensor=2, sequence=True, fields={**NARROW, "retro_cross_attention_positions": "rotary"}
    ),
    "PP2, uneven": Layout(pipeline=2, fields={"num_layers_in_first_pipeline_stage": 2}),
    "PP2 of 2": Layout(pipeline=2, virtual=2),
    "PP2 of 2, encoder in the second chunk of the first rank, tied": Layout(
        pipeline=2, virtual=2, fields={"retro_decoder_layers": [5, 8], **TIED}
    ),
    "PP2, full recomputation, uniform": Layout(
        pipeline=2, fields={**FULL, "recompute_method": "uniform"}
    ),
    "PP2, full recomputation, block": Layout(
        pipeline=2, fields={**FULL, "recompute_method": "block", "recompute_num_layers": 3}
    ),
    "PP2 of 2, full recomputation": Layout(
        pipeline=2, virtual=2, fields={**FULL, "recompute_method": "uniform"}
    ),
    "TP2+SP, DeepNorm": Layout(tensor=2, sequence=True, fields=DEEP),
    "PP2, DeepNorm": Layout(pipeline=2, fields=DEEP),
    "PP2 of 2, DeepNorm, full recomputation": Layout(
        pipeline=2, virtual=2, fields={**DEEP, **FULL, "recompute_method": "uniform"}
    ),
    "TP2+SP, norms and MLPs recomputed": Layout(
        tensor=2,
        sequence=True,
        fields={"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
    ),
    "TP2, selective recomputation": Layout(tensor=2, fields={"recompute_granularity": "selective"}),
    "TP2+SP, documents apart": Layout(tensor=2, sequence=True, documents=True),
    "PP2, documents apart, full recomputation": Layout(
        pipeline=2,
        documents=True,
        fields={"retro_decoder_layers": [2, 7], **FULL, "recompute_method": "uniform"},
    ),
    "TP2+SP, full recomputation": Layout(
        tensor=2, sequence=True, fields={**FULL, "recompute_method": "uniform"}
    ),
}
FOUR_RANKS = {
    "TP4+SP": Layout(tensor=4, sequence=True),
    "PP4, encoder in the middle": Layout(pipeline=4),
    "PP4, encoder in the middle, tied": Layout(pipeline=4, fields=TIED),
    "PP4, layout": Layout(
        pipeline=4,
        fields={
            "pipeline_model_parallel_layout": [
                ["embedding", "decoder"],
                ["decoder"] * 3,
                ["decoder"] * 2,
                ["decoder"] * 2 + ["loss"],
            ]
        },
    ),
    "TP2+SP, PP2": Layout(tensor=2, pipeline=2, sequence=True),
    "TP2+SP, PP2 of 2, rotary": Layout(tensor=2, pipeline=2, virtual=2, sequence=True, fields=ROPE),
    "TP2+SP, PP2, full recomputation": Layout(
        tensor=2,
        pipeline=2,
        sequence=True,
        fields={**FULL, "recompute_method": "uniform"},
    ),
    "PP2, DP2, distributed optimizer": Layout(pipeline=2, distributed_optimizer=True, fields=TIED),
    "PP2, DP2, distributed optimizer, untied, encoder last": Layout(
        pipeline=2, distributed_optimizer=True, fields={"retro_decoder_layers": [6]}
    ),
}
THREE_RANKS = {
    "PP3, uneven": Layout(
        pipeline=3,
        fields={"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1},
    ),
}


@cache
def parallel_runs(world_size: int) -> list[dict[str, Run]]:
    """Every layout of a world size, on each of its ranks."""
    layouts = {2: TWO_RANKS, 3: THREE_RANKS, 4: FOUR_RANKS}[world_size]
    weights = {name: serial(layout)[0] for name, layout in layouts.items()}
    return run_ranks(world_size, train_all, layouts, weights)


_serial: dict[str, tuple[dict[str, torch.Tensor], Run]] = {}


def serial(layout: Layout) -> tuple[dict[str, torch.Tensor], Run]:
    """Initial weights of the layout's model and its run on one process, once for each model."""
    fields = layout.model_fields()
    key = repr((layout.documents, sorted(fields.items())))
    if key not in _serial:
        join_layout(Layout())
        weights = serial_weights(fields)
        _serial[key] = weights, train(Layout(fields=fields, documents=layout.documents), weights)
    return _serial[key]


def check_equal_to_one_process(world_size: int, name: str, layout: Layout) -> None:
    runs = [ranks[name] for ranks in parallel_runs(world_size)]
    _, expected = serial(layout)
    assert expected.losses[-1] < expected.losses[0]
    for run in runs:
        assert run.losses == pytest.approx(expected.losses, abs=1e-5)
        assert run.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-4)
        for copy in run.embedding_copies:
            assert torch.equal(copy, runs[0].embedding_copies[0])
    torch.testing.assert_close(
        runs[0].embedding_copies[0], expected.embedding_copies[0], atol=5e-5, rtol=0
    )


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(megatron, name):
    check_equal_to_one_process(2, name, TWO_RANKS[name])


@pytest.mark.parametrize("name", THREE_RANKS)
def test_three_ranks(megatron, name):
    check_equal_to_one_process(3, name, THREE_RANKS[name])


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(megatron, name):
    check_equal_to_one_process(4, name, FOUR_RANKS[name])


@pytest.mark.parametrize(
    ("name", "carrying"),
    [
        ("PP2, encoder first", True),  # layers 2 and 7 cross-attend, the boundary is after 4
        ("PP2, encoder last", False),
        ("PP2, narrow encoder", True),
    ],
)
def test_only_what_later_layers_need_crosses_the_boundary(megatron, name, carrying):
    """The formula of docs/parallelism.md, forward and backward, in float32."""
    fields = TWO_RANKS[name].model_fields()
    hidden_size, chunk_length = fields["hidden_size"], fields["retro_chunk_length"]
    retrieved_length = fields["retro_num_retrieved_chunks"] * chunk_length
    num_chunks = SEQUENCE_LENGTH // chunk_length
    neighbors = retrieved_length * num_chunks * fields["retro_num_neighbors"]
    encoder_width = fields.get("retro_encoder_hidden_size", hidden_size)
    rows = SEQUENCE_LENGTH + (neighbors * encoder_width // hidden_size if carrying else 0)
    step = rows * GLOBAL_BATCH_SIZE * hidden_size * 4
    first, last = (ranks[name] for ranks in parallel_runs(2))
    assert first.sent_bytes == {1: step}
    assert last.sent_bytes == {0: step}
