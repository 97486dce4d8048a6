"""The GPU report's checks of results, on this machine's GPUs: `make test-gpu`.

The sections run as in the report, in processes of their own, so no other test is affected. Results
stay in GPU_REPORT, with report.json and report.md, and a second call goes on from there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_report.__main__ import report
from benchmarks.gpu_report.options import Options
from benchmarks.gpu_report.runner import NOT_RUN
from benchmarks.gpu_report.sections import SECTIONS

pytestmark = pytest.mark.gpu

CORRECTNESS = [name for name, section in SECTIONS.items() if section.correctness]


def run_report() -> dict[str, Any]:
    folder = Path(os.environ.get("GPU_REPORT", "gpu_report"))
    limit = float(os.environ.get("GPU_SECONDS", "540"))
    with pytest.MonkeyPatch.context() as patch:
        # conftest.py limits other tests to one thread; the report's rates are those of all cores.
        patch.delenv("OMP_NUM_THREADS", raising=False)
        return report(Options(output=folder, sections=CORRECTNESS, time_limit=limit))


@pytest.fixture(scope="module")
def results():
    return run_report()


@pytest.mark.parametrize("name", CORRECTNESS)
def test_section(results, name):
    result = results[name]
    if result["status"] == "skipped":
        pytest.skip("; ".join(result["skipped"].values()))
    assert result["status"] != NOT_RUN, "no time was left for it: call again to go on"
    failed = [check for check in result.get("checks", []) if not check["passed"]]
    assert result["status"] == "passed", result.get("traceback") or failed
