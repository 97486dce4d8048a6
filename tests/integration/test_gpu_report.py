"""The GPU report runs on the CPU, and reports what fails, crashes, is missing or takes too long."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu_report.__main__ import exit_code, main
from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.runner import NOT_RUN, Runner
from benchmarks.gpu_report.sections import SECTIONS, Section
from benchmarks.gpu_report.table import markdown
from benchmarks.gpu_report.worker import run_section

SMALL = Setting("cpu", small=True)


def stub(name: str, **environment: str) -> Section:
    return Section(name, name, f"tests.integration.report_sections:{name}", environment)


def stubs(*names: str) -> dict[str, Section]:
    return {name: stub(name) for name in names}


def test_failures_are_reported_and_the_others_go_on(tmp_path):
    sections = stubs("raises", "crashes", "fails", "is_skipped", "passes")
    results = Runner(tmp_path, SMALL, 100).run(sections)
    assert [result["status"] for result in results.values()] == [
        "failed", "failed", "failed", "skipped", "passed",
    ]  # fmt: skip
    assert results["raises"]["error"] == "ValueError: two lines"
    assert "exit code 77" in results["crashes"]["error"]
    assert results["fails"]["figures"] == {"before": 1}
    assert results["is_skipped"]["skipped"] == {"all": "no such device"}
    page = markdown({"device": "none"}, results)
    assert "| raises | failed: ValueError: two lines |" in page
    assert "| passes | passed | 0 | 1 of 2; aims missed: speed | the rest: nothing to do |" in page
    assert exit_code(results) == 1
    assert exit_code({"passes": results["passes"]}) == 0


@pytest.mark.slow
def test_a_rerun_keeps_what_is_there(tmp_path):
    first = Runner(tmp_path, SMALL, 100).run(stubs("passes"))
    limited = Runner(tmp_path, SMALL, 1).run(stubs("passes", "is_slow"))
    assert limited["passes"] == first["passes"]
    assert limited["is_slow"]["status"] == NOT_RUN
    assert exit_code(limited) == 3
    second = Runner(tmp_path, SMALL, 100).run(stubs("passes", "fails"))
    assert second["passes"] == first["passes"]
    assert second["fails"]["status"] == "failed"
    third = Runner(tmp_path, SMALL, 100).run(stubs("passes"), repeat=True)
    assert third["passes"]["figures"]["process"] != first["passes"]["figures"]["process"]


@pytest.mark.slow
def test_sections_share_a_process_unless_their_variables_differ(tmp_path):
    again = Section("again", "", stub("passes").target)
    other = Section("other", "", stub("passes").target, {"OF_THE_SECTION": "yes"})
    sections = {"passes": stub("passes"), "again": again, "other": other}
    found = {name: r["figures"] for name, r in Runner(tmp_path, SMALL, 100).run(sections).items()}
    assert found["passes"]["process"] == found["again"]["process"] != found["other"]["process"]
    assert (found["again"]["variable"], found["other"]["variable"]) == (None, "yes")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sections", "speed"], "--sections: speed. Known: precision, "),
        (["--retired", "nowhere"], "--retired: nowhere has no megatron/core"),
        (["--device", "cpu", "--small"], "holds results of --device cuda"),
    ],
)
def test_bad_flags_are_refused(tmp_path, flags, message, capsys):
    (tmp_path / "setting.json").write_text(json.dumps({"device": "cuda", "small": False}))
    assert main(["--output", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_every_section_exists():
    from importlib import import_module

    for section in SECTIONS.values():
        module, function = section.target.split(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "faiss", "fp8", "step_time"])
def test_cheap_sections_on_the_cpu(name, megatron):
    result = run_section(SECTIONS[name].target, SMALL)
    assert result["status"] == ("skipped" if name in ("fp8", "step_time") else "passed"), result


@pytest.mark.slow
def test_sections_on_the_cpu(tmp_path, capsys):
    flags = ["--device", "cpu", "--small", "--output", str(tmp_path), "--time-limit", "3000"]
    assert main(flags) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    statuses = {name: result["status"] for name, result in found["sections"].items()}
    skipped = {"transformer_engine", "fp8", "step_time"}
    assert statuses == {name: "skipped" if name in skipped else "passed" for name in SECTIONS}
    assert found["machine"]["device"].startswith("CPU")
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
