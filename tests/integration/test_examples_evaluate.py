"""The commands of examples/evaluate run as they are printed, one after another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    text = (ROOT / "examples" / "evaluate" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PROJECT": str(built_project()),
        "MODEL": small_checkpoint(),
        "OUTPUT": str(tmp_path),
    }
    script = "set -e\n" + "\n".join(blocks)
    subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=True)
    assert len(json.loads((tmp_path / "bits_per_byte.json").read_text())) == 4
    assert (tmp_path / "leakage.png").exists()
    ablation = json.loads((tmp_path / "qa" / "scores.json").read_text())
    assert list(ablation["scores"]) == ["live", "none"]
    assert "accuracy" in ablation["difference"]
    scored = json.loads((tmp_path / "scored" / "scores.json").read_text())
    assert scored["scores"]["predictions"] == ablation["scores"]["live"]
    (harness,) = (tmp_path / "lm_eval").rglob("results_*.json")
    assert json.loads(harness.read_text())["results"]["python_docs"]["perplexity,none"] > 1
