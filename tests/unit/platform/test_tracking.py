"""Tensors and messages that a tracker sees."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.processes import START_METHOD

KIB = 2**10


def zeros(kib: int) -> torch.Tensor:
    return torch.zeros(kib * KIB // 4, dtype=torch.float32)


def test_memory_at_its_highest_by_kind():
    from retro_mcore.platform.tracking import Tracker

    with Tracker() as tracker:
        weight, gradient = zeros(8), zeros(4)
        gone = zeros(100)
        del gone
        tracker.start()
        passing = zeros(3)
        kept = weight[:256] + 1  # 1 KiB
        del passing
        view = kept.view(-1)[1:]
        tracker.keep_activations()
        highest = kept.repeat(5)
        del highest
        later = zeros(2)
    memory = tracker.peak({"weights": [weight], "gradients": [gradient]})
    expected = {"weights": 8, "gradients": 4, "optimizer": 0, "activations": 1, "temporary": 5}
    assert memory == {kind: size * KIB for kind, size in expected.items()}
    del view, later


def test_a_storage_that_is_emptied_in_place():
    from retro_mcore.platform.tracking import Tracker

    with Tracker() as tracker:
        tracker.start()
        tensor = zeros(8)
        tensor.untyped_storage().resize_(0)
        other = zeros(6)
        tensor.untyped_storage().resize_(4 * KIB)
    assert sum(tracker.peak({}).values()) == 10 * KIB
    del other


def test_matrix_products_are_counted():
    from retro_mcore.platform.tracking import Tracker

    with Tracker() as tracker:
        query = torch.rand(2, 4, 16, 8, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        torch.rand(3, 5) @ torch.rand(5, 7)
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert tracker.flops == 7 * product + 2 * 3 * 5 * 7  # two forward, five backward


@pytest.mark.distributed
def test_messages_of_a_simulated_rank():
    with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as pool:
        sent, values, outside = pool.submit(messages).result()
    counts = 3 * 3 * 8 + 2 * 3 * 3 * 8 // 4 + 2 * 3 * 2 * 8 // 4  # a gather, two all-reduces
    everything = {
        "tp": 2 * 3 * KIB + 3 * KIB,
        "pp": 4 * KIB,
        "dp": 3 * KIB,
        "all": 6 * KIB + counts,
    }
    assert sent == everything
    known = ([1, 2, 0] * 4, 4, 3, 12, [3, 6])
    assert values == (True, 1.0, 0.0, *known, "unknown", "unknown")
    assert outside == (False, False)


def whole_numbers(group):
    """Whole numbers that follow from constants, also on other ranks, and those that do not."""
    import torch.distributed as dist

    from retro_mcore.errors import ConfigurationError

    counts = torch.arange(3).roll(-1)
    gathered = torch.empty(12, dtype=torch.long)
    dist.all_gather_into_tensor(gathered, counts, group=group)
    chosen = torch.rand(12).masked_select(gathered == 1)
    yield gathered.tolist()
    yield len(chosen)
    written, summed = torch.arange(3), torch.arange(3)
    yield int(written.sum())
    dist.all_reduce(summed, group=group)
    yield int(summed.sum())
    most = torch.tensor([2, 5]) + 1
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    yield most.tolist()
    written[0] = 5
    dist.recv(summed, 6, group=group)
    for tensor in (written, summed):
        try:
            yield int(tensor.sum())
        except ConfigurationError:
            yield "unknown"


def messages():
    """What a rank of 32 says that it sent, the values it got, and what is left behind."""
    import torch.distributed as dist

    from retro_mcore.platform.simulation import fake_tensors, simulated_rank

    with simulated_rank(5, 32) as tracker:
        groups = {
            kind: dist.new_group([4, 5, 6, 7], backend="gloo", group_desc=name)
            for kind, name in (
                ("tp", "TENSOR_MODEL_PARALLEL_GROUP"),
                ("dp", "DATA_PARALLEL_GROUP_WITH_CP_GLOO"),
                ("pp", "PIPELINE_MODEL_PARALLEL_GROUP"),
                ("other", "MODEL_PARALLEL_GROUP"),
            )
        }
        with fake_tensors(tracker):
            tensor, parts = zeros(4), [zeros(1) for _ in range(4)]
            dist.all_reduce(tensor, group=groups["tp"])
            dist.all_gather(parts, parts[0], group=groups["tp"])
            dist.reduce_scatter_tensor(parts[0], tensor, group=groups["dp"])
            dist.isend(tensor, 6, group=groups["pp"]).wait()
            dist.irecv(tensor, 6, group=groups["pp"]).wait()
            dist.all_reduce(tensor, group=groups["other"])
            flag = torch.tensor([0.0])
            flag += tensor.sum()
            tracker.answer(flag, 0.0)
            values = (
                bool((tensor == 1).all()),
                tensor.sum().item(),
                flag.item(),
                *whole_numbers(groups["other"]),
            )
    made = torch.ones(1)
    return dict(tracker.sent), values, (type(made) is not torch.Tensor, dist.is_initialized())
