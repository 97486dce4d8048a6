"""The CPU platform: what megatron-core asks of CUDA is answered by the CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

# Runs each program of its argument, a JSON dictionary, in a child of one interpreter with torch.
APART = """
import json, os, sys, traceback
import torch
for name, code in json.loads(sys.argv[1]).items():
    print(f"\\n== {name}", flush=True)
    if not os.fork():
        failed = 0
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            failed = 1
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(failed)
    if os.wait()[1]:
        sys.exit(f"{name} failed")
"""

PROGRAMS = {
    "importing": """
before = torch.empty, torch.cuda.current_device, torch.Tensor.cuda
import retro_mcore, retro_mcore.platform
assert before == (torch.empty, torch.cuda.current_device, torch.Tensor.cuda)
print('megatron' in sys.modules)
""",
    "twice": """
from retro_mcore.platform import use_cpu
use_cpu()
once = torch.empty
use_cpu()
print(torch.empty is once, 'torch._dynamo' in sys.modules)
""",
    "after megatron": """
import retro_mcore.training.loop.trainer, retro_mcore.inference.decoders
from tests.unit.platform.test_cpu import one_step
print(one_step())
""",
    "initialized": """
torch.cuda.is_initialized = lambda: True
from retro_mcore.platform import use_cpu
from retro_mcore.errors import ConfigurationError
empty = torch.empty
try: use_cpu()
except ConfigurationError as error: print(torch.empty is empty, error)
""",
    "cuda": """
torch.cuda.is_available = lambda: True
chosen = []
torch.cuda.set_device = chosen.append
before = torch.empty, torch.Tensor.cuda
from retro_mcore.platform import distributed_backend, is_cpu_in_use, setup_device
print(setup_device(), distributed_backend(), is_cpu_in_use(), chosen,
      before == (torch.empty, torch.Tensor.cuda))
""",
    "no device": """
from retro_mcore.platform import setup_device
from retro_mcore.errors import ConfigurationError
try: setup_device('cuda')
except ConfigurationError as error: print(error)
""",
}


@pytest.fixture(scope="module")
def printed():
    """The last line of each program's output, each run where only torch was imported."""
    programs = {name: f"import sys, torch\n{code}" for name, code in PROGRAMS.items()}
    done = subprocess.run(
        [sys.executable, "-c", APART, json.dumps(programs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    blocks = (block.split("\n", 1) for block in done.stdout.split("\n== ")[1:])
    return {name: (output.strip().splitlines() or [""])[-1] for name, output in blocks}


def test_importing_the_package_patches_nothing(printed):
    assert printed["importing"] == "False"


def test_use_cpu_twice_patches_once_and_loads_no_compiler(printed):
    assert printed["twice"] == "True False"


def test_megatron_may_be_imported_before_use_cpu(megatron, printed):
    assert float(printed["after megatron"]) == one_step()


def one_step() -> float:
    """The loss of a small model after a backward pass, with dropout and recomputation."""
    from tests.processes import join_megatron
    from tests.unit.model.builders import build_model, make_inputs, run_model

    join_megatron()
    torch.manual_seed(1)
    sizes = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "bias_dropout_fusion": True}
    model = build_model(**sizes, recompute_granularity="selective", recompute_modules=["layernorm"])
    inputs = make_inputs(model.config)
    loss = run_model(model.train(), inputs, labels=inputs["labels"]).mean()
    loss.backward()
    return float(loss.detach()) + sum(float(p.grad.double().sum()) for p in model.parameters())


def test_use_cpu_refuses_a_process_that_uses_cuda(printed):
    expected = "True use_cpu(): this process has already initialised CUDA"
    assert printed["initialized"].startswith(expected)


def test_nothing_is_patched_on_a_cuda_machine(printed):
    expected = "cuda:0 nccl False [device(type='cuda', index=0)] True"
    assert printed["cuda"] == expected


def test_cuda_without_a_device_is_refused(printed):
    if not torch.cuda.is_available():
        assert "finds no CUDA device" in printed["no device"]


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0), torch.device("cuda")])
def test_factories_allocate_on_the_cpu(megatron, device):
    assert torch.empty(2, device=device).device.type == "cpu"
    assert torch.tensor([1], device=device).device.type == "cpu"
    assert torch.zeros_like(torch.ones(2), device=device).device.type == "cpu"
    assert torch.ones(2).new_zeros(3, device=device).device.type == "cpu"


def test_tensors_pass_for_cuda_tensors_where_megatron_compares_types(megatron):
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).cuda().device.type == "cpu"


def test_the_rng_tracker_forks_and_returns(megatron):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(3), first)


def test_full_recomputation_draws_the_same_dropout(megatron):
    from megatron.core.tensor_parallel import checkpoint

    states = torch.ones(1000, requires_grad=True)
    output = checkpoint(lambda x: torch.nn.functional.dropout(x, 0.5), False, states)
    output.sum().backward()
    assert torch.equal(states.grad, output.detach())


def test_no_two_names_of_torch_cuda_share_a_function(megatron):
    """torch.compile, which megatron's fused functions use, refuses that."""
    names = ("synchronize", "set_device", "empty_cache", "current_stream", "default_stream")
    assert len({getattr(torch.cuda, name) for name in names}) == len(names)
