"""The GPU report's checks of results, on this machine's GPUs: `make test-gpu`.

The sections run as in the report, in processes of their own, so no other test is affected.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.runner import Runner
from benchmarks.gpu_report.sections import SECTIONS

pytestmark = pytest.mark.gpu

CORRECTNESS = {name: section for name, section in SECTIONS.items() if section.correctness}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("report")
    return Runner(folder, Setting("cuda"), time_limit=1800).run(CORRECTNESS)


@pytest.mark.parametrize("name", CORRECTNESS)
def test_section(results, name):
    result = results[name]
    if result["status"] == "skipped":
        pytest.skip("; ".join(result["skipped"].values()))
    failed = [check for check in result.get("checks", []) if not check["passed"]]
    assert result["status"] == "passed", result.get("traceback") or failed
