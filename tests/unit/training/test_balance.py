"""What training with experts minimizes: the token mean, plus the means of the load-balancing losses
over micro batches, computed over the positions that count."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from tests.unit.training.small import (
    NO_DROPOUT,
    SEQUENCE_LENGTH,
    small_options,
    small_project,
    train,
)
from tests.unit.training.test_token_mean import MaskedSamples

pytestmark = pytest.mark.usefixtures("megatron")

MICRO_BATCHES, MICRO_BATCH = 4, 2
# In the first micro batch no position counts, so that all of them balance.
COUNTS = [0, 0, 31, 2, 9, 1, 32, 17]
COEFFICIENT, Z_COEFFICIENT, EXPERTS, CHOSEN = 0.5, 0.05, 4, 2
MODEL = {
    **NO_DROPOUT,
    "num_layers": 3,
    "moe_layer_freq": [0, 1, 1],
    "num_experts": EXPERTS,
    "disable_bias_linear": True,
    "moe_aux_loss_coeff": COEFFICIENT,
    "moe_z_loss_coeff": Z_COEFFICIENT,
    "micro_batch_size": MICRO_BATCH,
}


def trainer_of(**changes):
    from retro_mcore.platform import setup_device

    device = setup_device("cpu")
    from retro_mcore.training.loop.trainer import Trainer
    from retro_mcore.training.setup.plan import make_plan

    project = small_project(
        retro_gpt_global_batch_size=len(COUNTS), retro_gpt_train_samples=len(COUNTS)
    )
    plan = make_plan(small_options(**{**MODEL, **changes}), project, 100)
    return Trainer(plan, MaskedSamples(COUNTS), None, device)


def losses_of(logits_SBE, counts_BS, by_sample):
    """Switch Transformer's loss for topk experts, and the z-loss, over the positions that count."""
    counts_SB = counts_BS.t()
    if not counts_SB.any():
        counts_SB = torch.ones_like(counts_SB)
    scores = logits_SBE.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(CHOSEN).indices, 1.0)
    groups = range(MICRO_BATCH) if by_sample else [slice(None)]
    balance = 0.0
    for group in groups:
        counts = counts_SB[:, group, None]
        total = counts_SB.sum() / len(list(groups))
        share = (chosen[:, group] * counts).flatten(0, -2).sum(0) / (total * CHOSEN)
        mean = (scores[:, group] * counts).flatten(0, -2).sum(0) / total
        balance = balance + EXPERTS * (share * mean).sum() / len(list(groups))
    squares = logits_SBE.logsumexp(-1).square()
    return balance, (squares * counts_SB).sum() / counts_SB.sum()


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_gradients_are_those_of_the_stated_objective(kind):
    from retro_mcore.platform.experts import LOSS_NAMES, routers
    from retro_mcore.platform.parallel import unwrap_model
    from retro_mcore.training.loop.balance import reduce_balance
    from retro_mcore.training.loop.loss import forward_backward

    trainer = trainer_of(moe_router_load_balancing_type=kind)
    stages = trainer._parts.stages
    batches = list(islice(trainer._train_batches(), MICRO_BATCHES))
    forward_backward(
        stages, iter(batches), MICRO_BATCHES, SEQUENCE_LENGTH, MICRO_BATCH, with_retrieval=True
    )
    logged = reduce_balance(stages, MICRO_BATCHES)
    model = unwrap_model(stages[0])
    found = {name: weight.main_grad.clone() for name, weight in model.named_parameters()}

    logits = []
    for router in routers(stages):
        router.loss_weight, gating = 0.0, router.gating
        router.gating = lambda states, gating=gating: logits.append(gating(states)) or logits[-1]
    tokens = sum(batch.loss_mask.sum() for batch in batches)
    objective, balances, z_losses = 0.0, 0.0, 0.0
    for batch in batches:
        logits.clear()
        losses = model(**batch.model_inputs(), labels=batch.labels)
        objective = objective + (losses * batch.loss_mask).sum() / tokens
        for layer in logits:
            balance, z_loss = losses_of(layer, batch.loss_mask, kind == "seq_aux_loss")
            balances, z_losses = balances + balance, z_losses + z_loss
    objective = objective + (COEFFICIENT * balances + Z_COEFFICIENT * z_losses) / MICRO_BATCHES
    names, weights = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(objective, weights, allow_unused=True)
    for name, expected in zip(names, gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=2e-4)
    layers = len(logits)
    assert logged == {
        LOSS_NAMES[kind]: pytest.approx(float(balances) / MICRO_BATCHES / layers, rel=1e-5),
        "z_loss": pytest.approx(float(z_losses) / MICRO_BATCHES / layers, rel=1e-5),
    }


def test_the_losses_are_logged(tmp_path, capsys):
    train(**MODEL, retro_decoder_layers=[2], log_interval=1, train_iters=1, save=str(tmp_path))
    shown = capsys.readouterr().out
    assert "load balancing loss " in shown
    assert "z loss " in shown
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert '"load_balancing_loss": ' in line


def test_a_dense_model_logs_none(capsys):
    train(**NO_DROPOUT, log_interval=1, train_iters=1)
    assert "balancing" not in capsys.readouterr().out
