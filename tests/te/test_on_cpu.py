"""A run on the CPU does not depend on whether Transformer Engine is installed (`make test-te`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from retro_mcore.errors import ConfigurationError
from tests.te.engines import MARKS

pytestmark = MARKS

SHARDED = {"use_distributed_optimizer": True}
#: Each reads other names of Megatron's: of its Adam, its SGD, and of copies between precisions.
KINDS: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"optimizer": "sgd"},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True, "initial_loss_scale": 256.0},
    "distributed optimizer": SHARDED,
    "distributed optimizer, bf16": {"bf16": True, **SHARDED},
}


def train(folder: str) -> None:
    """Train each kind, resume it, and print the losses."""
    from tests.unit.training.our_losses import our_run

    losses = {}
    for name, options in KINDS.items():
        save = f"{folder}/{name}"
        our_run(**options, save=save, exit_interval=2)
        losses[name] = our_run(**options, load=save).train_losses
    print(json.dumps([losses, "transformer_engine.pytorch" in sys.modules]))


def trained(folder: Path, before: str = "") -> Any:
    code = f"import sys; {before}from tests.te.test_on_cpu import train; train({str(folder)!r})"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_training_and_resuming(tmp_path):
    hidden = "sys.modules['transformer_engine'] = sys.modules['transformer_engine_torch'] = None; "
    without, found = trained(tmp_path / "without", hidden)
    assert not found
    losses, found = trained(tmp_path / "with")
    assert found
    assert losses == without
    assert all(len(each) == 2 for each in losses.values())


def test_an_option_of_its_adam_is_refused(megatron):
    from tests.unit.training.small import small_trainer

    options = {"bf16": True, "use_precision_aware_optimizer": True, **SHARDED}
    with pytest.raises(ConfigurationError, match="--use-precision-aware-optimizer: given on the"):
        small_trainer(**options)
