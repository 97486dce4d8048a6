"""Schedules of learning rate, weight decay and batch size, through megatron's own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from tests.unit.training.small import BATCH, TRAIN_SAMPLES, small_plan

pytestmark = pytest.mark.usefixtures("megatron")

ITERATIONS = TRAIN_SAMPLES // BATCH
HIGHEST, LOWEST = 1e-2, 1e-3


def schedule(**flags):
    """(learning rate, weight decay) of each iteration."""
    from retro_mcore.training.loop.optimizer import build_scheduler

    groups = SimpleNamespace(param_groups=[{"max_lr": HIGHEST, "min_lr": LOWEST}])
    scheduler = build_scheduler(groups, small_plan(min_lr=LOWEST, **flags))
    values = []
    for _ in range(ITERATIONS):
        values.append((groups.param_groups[0]["lr"], groups.param_groups[0]["weight_decay"]))
        scheduler.step(BATCH)
    return values


def shape(style, share):
    """Where between lowest (0) and highest (1) the rate is, after a share of the decay."""
    return {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": (1 + math.cos(math.pi * share)) / 2,
    }[style]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_learning_rates_follow_the_style(style):
    rates = [rate for rate, _ in schedule(lr_decay_style=style)]
    span = HIGHEST - LOWEST
    expected = [LOWEST + span * shape(style, i / ITERATIONS) for i in range(ITERATIONS)]
    assert rates == pytest.approx(expected)


def test_inverse_square_root_begins_at_the_end_of_the_warmup():
    flags = {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 2}
    rates = [rate for rate, _ in schedule(**flags)]
    roots = [HIGHEST * math.sqrt(2 / i) for i in range(2, ITERATIONS)]
    assert rates == pytest.approx([0, HIGHEST / 2, *roots])


def test_wsd_stays_high_and_decays_at_the_end():
    flags = {"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear", "lr_wsd_decay_samples": 8}
    rates = [rate for rate, _ in schedule(**flags)]
    assert rates == pytest.approx([HIGHEST] * 5 + [(HIGHEST + LOWEST) / 2])


@pytest.mark.parametrize(
    "warmup",
    [{"lr_warmup_iters": 3}, {"lr_warmup_samples": 12}, {"lr_warmup_fraction": 0.5}],
)
def test_the_warmup_is_told_in_iterations_samples_or_as_a_fraction(warmup):
    rates = [rate for rate, _ in schedule(lr_warmup_init=1e-4, **warmup)]
    step = (HIGHEST - 1e-4) / 3
    assert rates[:4] == pytest.approx([1e-4, 1e-4 + step, 1e-4 + 2 * step, HIGHEST])


def test_the_decay_is_told_in_samples_too():
    assert schedule(lr_decay_samples=12) == schedule(lr_decay_iters=3)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_grows(style):
    flags = {"weight_decay_incr_style": style, "start_weight_decay": 0.1, "end_weight_decay": 0.3}
    decays = [decay for _, decay in schedule(**flags)]
    expected = [0.3 - 0.2 * shape(style, i / ITERATIONS) for i in range(ITERATIONS)]
    assert decays == pytest.approx(expected)


@pytest.mark.parametrize("rampup", [(2, 2, 8), (1, 1, 9), (2, 1, 60)])
def test_batches_ramp_up_as_megatrons_calculator_says(rampup):
    from megatron.core import num_microbatches_calculator as calculator

    from retro_mcore.training.loop.batch_sizes import BatchSizes

    if not hasattr(calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("this release of megatron-core has no ramp")
    sizes = BatchSizes(4, rampup)
    if not hasattr(calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("this release of megatron-core has no ramp")
    calculator.destroy_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(0, list(rampup), 4, 1, 1)
    consumed, reached = 0, []
    for iteration in range(40):
        assert sizes.consumed_after(iteration) == consumed
        calculator.update_num_microbatches(consumed)
        size = calculator.get_current_global_batch_size()
        # A sample less does not suffice for this iteration.
        assert sizes.iterations(consumed + size - 1) == (iteration, consumed)
        consumed += size
        reached.append(size)
        assert sizes.iterations(consumed) == (iteration + 1, consumed)
    assert set(reached) == set(sizes.sizes)
