"""The GPU report's section that compares steps with the retired Retro runs, on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.sections import SECTIONS
from benchmarks.gpu_report.worker import run_section
from tests.parity import environment

pytestmark = pytest.mark.parity


def test_step_time() -> None:
    setting = Setting("cpu", small=True, retired=str(environment.install()))
    result = run_section(SECTIONS["step_time"].target, setting)
    assert result["status"] == "passed", result
    assert [check["name"] for check in result["checks"] if check["decisive"]] == [
        "6 x 64, losses apart"
    ]
