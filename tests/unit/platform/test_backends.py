"""Which norm the local backend takes, with and without Apex."""

from __future__ import annotations

import subprocess
import sys

# Apex's one function, in PyTorch's terms, where Megatron imports it; the process does not use CPU
# as its platform, as on CUDA.
WITH_APEX = """
import sys
from types import ModuleType

import torch

class FusedLayerNormAffineFunction:
    @staticmethod
    def forward(states, weight, bias, shape, eps): ...

    @staticmethod
    def apply(states, weight, bias, shape, eps):
        return torch.nn.functional.layer_norm(states, shape, weight, bias, eps)

for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm"):
    sys.modules[name] = ModuleType(name)
sys.modules[name].FusedLayerNormAffineFunction = FusedLayerNormAffineFunction

import retro_mcore
from megatron.core.transformer import TransformerConfig

from retro_mcore.platform.backends import LocalBackend
from retro_mcore.platform.norm import Norm

backend = LocalBackend()
assert backend.layer_norm(rms_norm=True) is Norm
fused_class = backend.layer_norm()
assert fused_class.__name__ == "FusedLayerNorm", fused_class
config = TransformerConfig(
    num_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    layernorm_zero_centered_gamma=True,
    use_cpu_initialization=True,
)
fused, plain = (cls(config=config, hidden_size=8, eps=1e-5) for cls in (fused_class, Norm))
assert fused.weight.sequence_parallel and set(fused.state_dict()) == set(plain.state_dict())
torch.nn.init.normal_(fused.weight)
plain.load_state_dict(fused.state_dict())
states = torch.randn(3, 8)
torch.testing.assert_close(fused(states), plain(states))
"""


def test_apexs_fused_norm_is_taken_where_it_imports():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITH_APEX], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_apex_it_is_ours(megatron):
    from retro_mcore.platform.backends import LocalBackend
    from retro_mcore.platform.norm import Norm

    assert LocalBackend().layer_norm() is Norm
