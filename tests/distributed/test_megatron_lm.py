"""Megatron-LM's own `pretrain()` trains Retro, where megatron-core's wheel holds it (from 0.17)."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.training.test_providers import command_line, our_losses

ROOT = Path(__file__).parents[2]


def has_trainer() -> bool:
    try:
        return importlib.util.find_spec("megatron.training") is not None
    except ModuleNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_trainer(), reason="this megatron-core has no megatron.training"),
]

ON_CPU = """--distributed-backend gloo --use-cpu-initialization --transformer-impl local
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm
--no-rope-fusion"""
AS_OURS = """--hidden-dropout 0 --attention-dropout 0 --position-embedding-type rope --lr 1e-2
--lr-decay-style constant --log-interval 1 --make-vocab-size-divisible-by 512"""


def train(*flags: str) -> subprocess.CompletedProcess:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    rank |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "distributed" / "megatron_lm_on_cpu.py"),
            *command_line(*ON_CPU.split(), *AS_OURS.split(), *flags),
        ],
        env={**os.environ, **rank, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def test_losses_are_our_own_trainers_and_a_script_without_a_guard_saves(megatron, tmp_path):
    done = train("--save", str(tmp_path), "--save-interval", "2", "--ckpt-format", "torch_dist")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [float(loss) for loss in re.findall(r"lm loss: (\S+) \| loss scale", done.stdout)]
    first, second = our_losses()
    # Some releases begin to count anew only after the second line, which then holds the mean.
    # Megatron-LM writes seven digits.
    assert found[0] == pytest.approx(first, rel=2e-6)
    assert found[1] in (pytest.approx(second, rel=2e-6), pytest.approx((first + second) / 2, 2e-6))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert list((tmp_path / "iter_0000002").glob("*.distcp"))


def test_a_flag_of_another_model_is_refused_by_name(megatron):
    done = train("--multi-latent-attention")
    assert done.returncode == 2
    assert "error: --multi-latent-attention: given. Leave it out" in done.stderr
    assert "Traceback" not in done.stderr
