"""Loss and gradient are those of the token mean over the global batch, however it is divided.

Whoever tunes on instructions has samples with few and with many tokens that count: with averages of
averages the same run trained differently on another number of GPUs, or at another micro batch.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.training.small import (
    NO_DROPOUT,
    SEQUENCE_LENGTH,
    RandomSamples,
    small_options,
    small_project,
)

pytestmark = pytest.mark.usefixtures("megatron")

GLOBAL_BATCH = 8
# Sums of float32 in another order.
TOLERANCE = {"rel": 2e-5}
MODEL = {**NO_DROPOUT, "log_interval": 1}


class MaskedSamples(RandomSamples):
    """Samples of which only the first few positions count, in each another number."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__(len(counts))
        self.counts = counts

    def __getitem__(self, index: int) -> dict[str, object]:
        mask = (np.arange(SEQUENCE_LENGTH) < self.counts[index]).astype(np.float32)
        return {**super().__getitem__(index), "loss_mask": mask}


def run(counts: list[int], **changes):
    """(training losses, gradient norms, validation losses) of a run on samples so masked."""
    from retro_mcore.platform import setup_device

    device = setup_device("cpu")
    from retro_mcore.training.loop.trainer import Trainer
    from retro_mcore.training.setup.plan import make_plan

    project = small_project(
        retro_gpt_global_batch_size=GLOBAL_BATCH,
        retro_gpt_train_samples=len(counts),
        retro_gpt_eval_interval=100,
    )
    plan = make_plan(small_options(**{**MODEL, **changes}), project, 100)
    samples = MaskedSamples(counts)
    trainer = Trainer(plan, samples, MaskedSamples(counts[::-1]), device)
    norms, update = [], trainer._update

    def noting(*arguments):
        step = update(*arguments)
        norms.append(step.grad_norm)
        return step

    trainer._update = noting
    result = trainer.train()
    return result.train_losses, norms, [loss for _, loss in result.valid_losses]


COUNTS = st.lists(st.integers(0, SEQUENCE_LENGTH), min_size=GLOBAL_BATCH, max_size=GLOBAL_BATCH)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(counts=COUNTS.filter(any))
def test_any_micro_batch_gives_loss_and_gradient_of_the_whole_batch(counts):
    expected = run(counts, micro_batch_size=GLOBAL_BATCH)
    for micro_batch_size in (1, 2, 4):
        for found, wanted in zip(
            run(counts, micro_batch_size=micro_batch_size), expected, strict=True
        ):
            assert found == pytest.approx(wanted, **TOLERANCE), micro_batch_size
