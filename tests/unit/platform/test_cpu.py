"""The CPU platform: what megatron-core asks of CUDA is answered by the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter; its standard output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_patches_nothing():
    code = (
        "import torch; before = torch.empty, torch.cuda.current_device, torch.Tensor.cuda;"
        "import retro_mcore, retro_mcore.platform;"
        "assert before == (torch.empty, torch.cuda.current_device, torch.Tensor.cuda);"
        "import sys; print('megatron' in sys.modules)"
    )
    assert run_python(code) == "False"


def test_use_cpu_twice_patches_once_and_loads_no_compiler():
    code = (
        "from retro_mcore.platform import use_cpu; use_cpu(); import torch; once = torch.empty;"
        "use_cpu(); import sys; print(torch.empty is once, 'torch._dynamo' in sys.modules)"
    )
    assert run_python(code) == "True False"


def test_megatron_may_be_imported_before_use_cpu(megatron):
    code = (
        "import retro_mcore.training.loop.trainer, retro_mcore.inference.decoders\n"
        "from tests.unit.platform.test_cpu import one_step\n"
        "print(one_step())"
    )
    assert float(run_python(code).splitlines()[-1]) == one_step()


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


def test_use_cpu_refuses_a_process_that_uses_cuda():
    code = (
        "import torch; torch.cuda.is_initialized = lambda: True\n"
        "from retro_mcore.platform import use_cpu\n"
        "from retro_mcore.errors import ConfigurationError\n"
        "empty = torch.empty\n"
        "try: use_cpu()\n"
        "except ConfigurationError as error: print(torch.empty is empty, error)"
    )
    assert run_python(code).startswith("True use_cpu(): this process has already initialised CUDA")


def test_nothing_is_patched_on_a_cuda_machine():
    code = (
        "import torch; torch.cuda.is_available = lambda: True; chosen = []\n"
        "torch.cuda.set_device = chosen.append; before = torch.empty, torch.Tensor.cuda\n"
        "from retro_mcore.platform import distributed_backend, is_cpu_in_use, setup_device\n"
        "print(setup_device(), distributed_backend(), is_cpu_in_use(), chosen,"
        " before == (torch.empty, torch.Tensor.cuda))"
    )
    expected = "cuda:0 nccl False [device(type='cuda', index=0)] True"
    assert run_python(code) == expected


def test_cuda_without_a_device_is_refused():
    code = (
        "from retro_mcore.platform import setup_device\n"
        "from retro_mcore.errors import ConfigurationError\n"
        "try: setup_device('cuda')\n"
        "except ConfigurationError as error: print(error)"
    )
    if not torch.cuda.is_available():
        assert "finds no CUDA device" in run_python(code)


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
