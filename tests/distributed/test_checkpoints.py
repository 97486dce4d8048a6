"""On two processes: resumed equals uninterrupted bit for bit, in the background too; damage is told
on every rank."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import pytest
import torch

from retro_mcore.errors import CheckpointError, ConfigurationError
from tests.processes import run_ranks
from tests.unit.training.small import small_trainer

pytestmark = pytest.mark.distributed

# All with dropout, of the decoder and of the encoder.
LAYOUTS = {
    "tensor and sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "distributed optimizer": {"use_distributed_optimizer": True},
    "pipeline": {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
    "pipeline in bf16": {"pipeline_model_parallel_size": 2, "bf16": True},
    "experts": {
        "expert_model_parallel_size": 2,
        "num_experts": 4,
        "disable_bias_linear": True,
        "moe_token_dispatcher_type": "alltoall",
    },
}
STOP = 4
EXPERTS = "expert-parallel-rng"  # Megatron's name of the stream


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(2, on_one_rank, tmp_path_factory.mktemp("two_processes"))


def on_one_rank(folder):
    results = {}
    for name, layout in LAYOUTS.items():
        options = {**layout, "deterministic_mode": True}
        saving = {"save": str(folder / name), "async_save": True}
        losses, state = run(**options)
        if name == "pipeline":
            saving["save_interval"] = 2  # one to damage
        stopped, _ = run(**options, **saving, exit_interval=STOP)
        resumed, state_again = run(**options, load=str(folder / name))
        results[name] = (losses, stopped + resumed, state, state_again)
    results["damaged"] = load_damaged(folder)
    return results


def run(**options):
    """The losses of a run, and digests of all that it ends with."""
    trainer = small_trainer(**options)
    of_experts = random_streams()[EXPERTS]
    losses = trainer.train().train_losses
    optimizers = trainer._parts.optimizer.chained_optimizers
    adam = [state for each in optimizers for state in each.optimizer.state.values()]
    return losses, {
        "weights": digest(*trainer._parts.stages[0].parameters()),
        "moments": digest(*(state[name] for state in adam for name in sorted(state))),
        "random states": digest(*random_states()),
        "nothing is drawn from the experts' stream": torch.equal(
            of_experts, random_streams()[EXPERTS]
        ),
        "schedule": trainer._parts.scheduler.num_steps,
    }


def random_streams():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker().get_states()


def random_states():
    text = repr((random.getstate(), np.random.get_state()[1].tolist()))  # noqa: NPY002
    tracker = random_streams()
    del tracker[EXPERTS]  # expert ranks resume with the first one's
    python = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return [torch.get_rng_state(), python, *(tracker[name] for name in sorted(tracker))]


def digest(*tensors):
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def load_damaged(folder):
    layout = LAYOUTS["pipeline"]
    directory = folder / "pipeline"
    (path,) = directory.glob("iter_0000002/__1_0.distcp")  # what rank 1 wrote
    if torch.distributed.get_rank() == 0:
        os.truncate(path, 10)
    torch.distributed.barrier()
    with pytest.raises(CheckpointError) as caught:
        small_trainer(**layout, load=str(directory), ckpt_step=2)
    return str(caught.value), caught.value.raised_together


@pytest.mark.parametrize("layout", LAYOUTS)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(ranks, layout):
    for rank in ranks:
        losses, losses_again, state, state_again = rank[layout]
        assert losses_again == losses
        assert state_again == state
        assert state["nothing is drawn from the experts' stream"]


def test_a_damaged_checkpoint_is_told_on_every_rank(ranks):
    for rank in ranks:
        message, together = rank["damaged"]
        assert "__1_0.distcp: has 10 bytes" in message
        assert together


def test_deterministic_mode_uses_deterministic_kernels(megatron):
    from retro_mcore.platform.determinism import use_deterministic_algorithms

    try:
        use_deterministic_algorithms()
        trainer = small_trainer(deterministic_mode=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert trainer._parts.stages[0].config.deterministic_mode
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_mode_asks_for_the_environment_on_cuda(monkeypatch):
    from retro_mcore.platform import determinism

    monkeypatch.setattr(determinism, "is_cpu_in_use", lambda: False)
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(ConfigurationError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO=1"):
        determinism.use_deterministic_algorithms()
    assert not torch.are_deterministic_algorithms_enabled()
