"""README's Python examples run as they are printed, each alone in an empty directory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def python_blocks() -> list:
    """(line, code) of each ```python block; those that train a model are slow."""
    text = README.read_text(encoding="utf-8")
    return [
        pytest.param(
            text.count("\n", 0, match.start()) + 1,
            match[1],
            marks=[pytest.mark.slow] if "pretrain(" in match[1] else [],
        )
        for match in re.finditer(r"^```python[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize(("line", "code"), python_blocks(), ids=lambda value: f"line {value}"[:9])
def test_example_runs(line: int, code: str, tmp_path: Path):
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"README.md, line {line}:\n{result.stderr}"
