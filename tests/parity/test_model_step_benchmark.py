"""The benchmark against the retired Retro runs, and what it says of a small model is right."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.model_step import Options, measure
from retro_mcore.errors import ConfigurationError
from tests.parity import environment

pytestmark = pytest.mark.parity

SMALL = {
    "hidden_size": [32],
    "num_layers": 6,
    "head_channels": 16,
    "seq_length": 64,
    "chunk_length": 16,
    "retrieved": 32,
    "rounds": 2,
}


def test_three_sides_of_a_small_model(tmp_path: Path) -> None:
    sides = {m.side: m for m in measure(Options(**SMALL, json=tmp_path / "step.json"))}
    assert list(sides) == ["retired", "ours", "gpt"]
    assert sides["ours"].loss == pytest.approx(sides["retired"].loss, rel=1e-6)
    assert sides["gpt"].loss != sides["ours"].loss
    for side in sides.values():
        assert len(side.all_seconds) == 2
        assert min(side.all_seconds) > 0
    # The encoder's own linear layers alone: 2 layers, 6 x 12 D^2 FLOPs a token and layer.
    retrieved = 2 * 4 * 2 * 32
    assert sides["ours"].flops - sides["gpt"].flops > 2 * 6 * 12 * 32**2 * retrieved
    assert sides["gpt"].saved_bytes < sides["ours"].saved_bytes < sides["retired"].saved_bytes
    written = json.loads((tmp_path / "step.json").read_text())
    assert [side["flops"] for side in written["sides"]] == [m.flops for m in sides.values()]


def test_the_retired_side_compiles_nothing(tmp_path: Path) -> None:
    """Its release would, where it is imported and CUDA's compiler is there."""
    options = {**dataclasses.asdict(Options(**SMALL)), "hidden": 32}
    code = f"""
from pathlib import Path
from torch.utils import cpp_extension
compiled = Path({str(tmp_path / "compiled")!r})
cpp_extension._jit_compile = lambda *args, **kwargs: compiled.touch()
from benchmarks.model_worker import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "retired", json.dumps(options, default=str), "weights.pt"],
        cwd=tmp_path,
        env=environment.variables(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == '"ready"\n'
    assert not (tmp_path / "compiled").exists()


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--retrieved: 40"):
        measure(Options(**{**SMALL, "retrieved": 40}))
    with pytest.raises(ConfigurationError, match="--hidden-size: 40"):
        measure(Options(**{**SMALL, "hidden_size": [40]}))
