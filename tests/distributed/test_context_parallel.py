"""Context parallelism: each rank holds two pieces of every sample; results are one process's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import test_parallel_layouts as parallel_layouts
from tests.distributed.layouts import (
    GLOBAL_BATCH_SIZE,
    MICRO_BATCH_SIZE,
    SEQUENCE_LENGTH,
    Layout,
    Trainer,
    train_all,
)
from tests.distributed.test_parallel_layouts import FULL, NARROW, ROPE, TIED
from tests.processes import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("megatron")]

LEARNED = {"position_embedding_type": "learned_absolute"}
# Grids aligned right are those aligned left where samples hold whole chunks; rows without masks.
RETIRED = {
    "retro_chunk_alignment": "right",
    "retro_mask_padding": False,
    "retro_encoder_residual": "normed",
    "retro_final_layernorm": False,
}
RELATIVE = {**NARROW, "retro_cross_attention_positions": "rotary"}

# Every other layer has a window, which reaches beyond a piece of four tokens.
WINDOWS = {"window_size": (5, 0), "window_attn_skip_freq": 2}

DEFAULT = {"CP2, rotary, grouped queries, windows": Layout(context=2, fields={**ROPE, **WINDOWS})}
TWO_RANKS = {
    "CP2, rotary, grouped queries": Layout(context=2, fields=ROPE),
    "CP2, narrow encoder, relative positions": Layout(context=2, fields=RELATIVE),
    "CP2, learned positions": Layout(context=2, fields=LEARNED),
    "CP2, the retired model": Layout(context=2, fields=RETIRED),
    "CP2, limited scores": Layout(context=2, fields={**ROPE, "attention_softcap": 2.0}),
    "CP2, own rotary base": Layout(
        context=2, fields={**ROPE, "rotary_local_base": 100, "rotary_local_layers": [1, 4]}
    ),
    "CP2, documents apart": Layout(context=2, documents=True, fields=ROPE),
    "CP2, windows, documents apart": Layout(
        context=2, documents=True, fields={**LEARNED, **WINDOWS}
    ),
    "CP2, DeepNorm": Layout(context=2, fields={"retro_deepnorm": True, **TIED}),
    "CP2, distributed optimizer": Layout(context=2, distributed_optimizer=True, fields=TIED),
    "CP2, full recomputation": Layout(context=2, fields={**FULL, "recompute_method": "uniform"}),
    "CP2, selective recomputation": Layout(
        context=2, fields={**ROPE, "recompute_granularity": "selective"}
    ),
}
FOUR_RANKS = {
    "CP2, TP2+SP": Layout(context=2, tensor=2, sequence=True, fields=ROPE),
    "CP2, TP2": Layout(context=2, tensor=2),
    "CP2, PP2": Layout(context=2, pipeline=2, fields={"retro_decoder_layers": [2, 7]}),
    "CP2, PP2, narrow encoder, full recomputation": Layout(
        context=2, pipeline=2, fields={**NARROW, **FULL, "recompute_method": "uniform"}
    ),
    "CP2, PP2 of 2, tied, rotary": Layout(
        context=2, pipeline=2, virtual=2, fields={**ROPE, **TIED}
    ),
    "CP2, PP2, documents apart": Layout(
        context=2, pipeline=2, documents=True, fields={"retro_decoder_layers": [2, 7]}
    ),
    "CP2, DP2, distributed optimizer": Layout(context=2, distributed_optimizer=True, fields=ROPE),
}


def count_bytes(layout, weights):
    """Bytes that this rank sends to context parallel ranks in a step, and the dry run's figure."""
    from retro_mcore.training.setup.estimate import context_parallel_bytes

    trainer = Trainer(layout, weights)
    with counting_context_bytes() as counted:
        trainer.step()
    arguments = SimpleNamespace(seq_length=SEQUENCE_LENGTH)
    expected = context_parallel_bytes(trainer.config, arguments, MICRO_BATCH_SIZE)
    return sum(counted), expected * GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE


@contextmanager
def counting_context_bytes() -> Iterator[list[int]]:
    """Collects the bytes that this rank sends to its context parallel group."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    group, sent = parallel_state.get_context_parallel_group(), []
    names = ("dist_all_gather_func", "dist_reduce_scatter_func")
    collectives = {name: getattr(mappings, name) for name in names}
    exchange = torch.distributed.batch_isend_irecv

    def count_exchange(operations):
        sends = (each for each in operations if each.op is torch.distributed.isend)
        sent.extend(each.tensor.nbytes for each in sends if each.group is group)
        return exchange(operations)

    def counting(collective):
        def count(output, given, group=None, **kwargs):
            if group is parallel_state.get_context_parallel_group():
                part = min(output.nbytes, given.nbytes)
                sent.append(part * (group.size() - 1))
            return collective(output, given, group=group, **kwargs)

        return count

    torch.distributed.batch_isend_irecv = count_exchange
    for name, collective in collectives.items():
        setattr(mappings, name, counting(collective))
    try:
        yield sent
    finally:
        torch.distributed.batch_isend_irecv = exchange
        for name, collective in collectives.items():
            setattr(mappings, name, collective)


def cut_by_both():
    """A batch's tokens on this rank, as Megatron cuts them and as we do."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    from retro_mcore.platform.parallel import context_part
    from retro_mcore.samples.batch import RetroBatch

    text = torch.arange(2 * 33).view(2, 33)
    batch = RetroBatch.from_text(text)
    names = ("tokens", "labels", "position_ids")
    given = {name: getattr(batch, name) for name in names}
    hybrid = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
    theirs = get_batch_on_this_cp_rank(given, **({"is_hybrid_cp": False} if hybrid else {}))
    part = batch.part(context_part())
    return [(theirs[name], getattr(part, name)) for name in names]


def on_two_ranks(weights):
    runs = train_all(DEFAULT, weights)
    layout = next(iter(DEFAULT.values()))
    return runs, count_bytes(layout, next(iter(weights.values()))), cut_by_both()


def serial(name: str):
    """Initial weights of a layout's model, and its run on one process."""
    return parallel_layouts.serial({**DEFAULT, **TWO_RANKS, **FOUR_RANKS}[name])


def initial_weights(layouts):
    return {name: serial(name)[0] for name in layouts}


def check(run, name: str) -> None:
    _, expected = serial(name)
    assert expected.losses[-1] < expected.losses[0]
    assert run.losses == pytest.approx(expected.losses, abs=1e-5)
    assert run.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-4)


def test_two_ranks_train_like_one():
    for runs, (counted, estimated), cuts in run_ranks(2, on_two_ranks, initial_weights(DEFAULT)):
        for name, run in runs.items():
            check(run, name)
        assert counted == estimated
        for theirs, ours in cuts:
            assert torch.equal(theirs, ours)


@pytest.fixture(scope="module")
def runs():
    two = run_ranks(2, train_all, TWO_RANKS, initial_weights(TWO_RANKS))
    four = run_ranks(4, train_all, FOUR_RANKS, initial_weights(FOUR_RANKS))
    return {name: [run[name] for run in two] for name in TWO_RANKS} | {
        name: [run[name] for run in four] for name in FOUR_RANKS
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_layouts_equal_one_process(runs, name):
    for run in runs[name]:
        check(run, name)


@pytest.mark.slow
def test_a_pipeline_sends_the_neighbors_of_two_more_chunks(runs):
    """The formula of docs/parallelism.md, forward and backward, in float32."""
    name = "CP2, PP2"
    fields = FOUR_RANKS[name].model_fields()
    hidden_size, chunk_length = fields["hidden_size"], fields["retro_chunk_length"]
    retrieved_length = fields["retro_num_retrieved_chunks"] * chunk_length
    num_chunks = SEQUENCE_LENGTH // chunk_length // 2 + 2
    rows = SEQUENCE_LENGTH // 2
    rows += retrieved_length * num_chunks * fields["retro_num_neighbors"]
    step = rows * GLOBAL_BATCH_SIZE * hidden_size * 4
    assert [sum(run.sent_bytes.values()) for run in runs[name]] == [step] * 4
