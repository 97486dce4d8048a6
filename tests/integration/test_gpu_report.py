"""The GPU report runs on the CPU, and reports what fails, crashes, is missing or takes too long."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

import retro_mcore
from benchmarks import generation
from benchmarks.gpu_report import __main__ as command
from benchmarks.gpu_report import (
    kernels,
    machine,
    numerics,
    record,
    retrieval,
    small_runs,
    speed,
    training,
)
from benchmarks.gpu_report.__main__ import exit_code, main
from benchmarks.gpu_report.findings import Findings
from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.runner import NOT_RUN, ROOT, Runner
from benchmarks.gpu_report.sections import NEEDS, SECTIONS, Section
from benchmarks.gpu_report.table import markdown
from benchmarks.gpu_report.worker import run_section
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.decoders import FullRecomputation
from tests.parity import environment
from tests.unit.retrieval.gpu_build import stand_in

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


class EndsWhenStarted(Runner):
    """Its time limit comes when the section has started its processes."""

    def _wait(self, process):
        while not (self.folder / "processes").exists():
            time.sleep(0.05)
        self._end = 0.0


@pytest.mark.parametrize("ending", ["", "crashes", "is_slow"])
def test_no_process_outlives_its_section(tmp_path, monkeypatch, ending):
    """Not one in a session of its own, as torchrun's ranks are, nor one whose parent has ended."""
    monkeypatch.setenv("PROCESSES", str(tmp_path / "processes"))
    monkeypatch.setenv("ENDING", ending)
    kind = EndsWhenStarted if ending == "is_slow" else Runner
    result = kind(tmp_path, SMALL, 600).run(stubs("leaves_processes"))["leaves_processes"]
    assert result["status"] == {"": "skipped", "crashes": "failed", "is_slow": NOT_RUN}[ending]
    processes = json.loads((tmp_path / "processes").read_text())
    assert len(processes) == 3
    assert not [each for each in processes if is_alive(each)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_process_outlives_a_signal(tmp_path, monkeypatch, number):
    """As a scheduler, `timeout`, a closed terminal or a lack of memory sends it."""
    monkeypatch.setenv("PROCESSES", str(tmp_path / "processes"))
    monkeypatch.setenv("ENDING", "is_slow")
    code = "from tests.integration.test_gpu_report import *; from pathlib import Path; "
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # whatever these tests were started by
    code += f"Runner(Path({str(tmp_path)!r}), SMALL, 600).run(stubs('leaves_processes'))"
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (tmp_path / "processes").exists():
        assert runner.poll() is None
        time.sleep(0.05)
    children = psutil.Process(runner.pid).children(recursive=True)
    runner.send_signal(number)
    killed = number == signal.SIGKILL
    assert runner.wait() == (-number if killed else 128 + number)
    processes = json.loads((tmp_path / "processes").read_text())
    processes += [each.pid for each in children]
    while killed and any(map(is_alive, processes)):  # another process ends them
        time.sleep(0.05)
    assert not [each for each in processes if is_alive(each)]


def is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sections", "speed"], "--sections: speed. Known: precision, "),
        (["--retired", "nowhere"], "--retired: nowhere has no megatron/core"),
        (["--device", "cpu", "--small"], "--device cuda, not cpu"),
        (["--device", "cpu", "--small", "--repeat", "--sections", "faiss"], "(resume)"),
    ],
)
def test_bad_flags_are_refused(tmp_path, monkeypatch, flags, message, capsys):
    monkeypatch.setattr(command, "describe_apart", lambda device: MACHINE)
    record.write(tmp_path, Setting(), MACHINE)
    (tmp_path / "resume.json").write_text(json.dumps({"status": "passed"}))
    assert main(["--output", str(tmp_path), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


MACHINE = {"date": "a day", "device": "H100", "commit": "a", "code": "b", "torch": "2.13"}


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        ({"device": "H200"}, "device H100, not H200"),
        ({"code": "c", "commit": "d"}, "code b, not c"),
        ({"torch": "2.14"}, "torch 2.13, not 2.14"),
        ({"apex": "0.1"}, "apex none, not 0.1"),
        ({"megatron-core": "0.19.2", "small": True}, "small False, not True; megatron-core none"),
        ({"date": "another day", "commit": "d"}, None),
        ({"transformers": "5.0"}, None),  # what was skipped without it runs now
    ],
)
def test_results_of_something_else_are_not_mixed_in(tmp_path, now, difference):
    setting = Setting(small=now.pop("small", False))
    record.write(tmp_path, Setting(), MACHINE)
    record.check_same(tmp_path, setting, {**MACHINE, **now}, [])  # there is no result yet
    (tmp_path / "faiss.json").write_text("{}")
    record.check_same(tmp_path, setting, {**MACHINE, **now}, ["faiss"])
    if difference is None:
        record.check_same(tmp_path, setting, {**MACHINE, **now}, [])
        return
    with pytest.raises(ConfigurationError) as refused:
        record.check_same(tmp_path, setting, {**MACHINE, **now}, ["resume"])
    assert difference in str(refused.value)


def test_results_without_a_record_of_the_machine_are_refused(tmp_path):
    (tmp_path / "setting.json").write_text(json.dumps({"device": "cuda", "small": False}))
    (tmp_path / "faiss.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="are not recorded"):
        record.check_same(tmp_path, Setting(), MACHINE, [])


def test_the_code_is_told_by_its_files(tmp_path, monkeypatch):
    for name in ("benchmarks", "retro_mcore"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine.retro_mcore, "__file__", str(tmp_path / "retro_mcore/__init__.py"))
    before = machine.describe("cpu")
    assert before["commit"] == "unknown"
    (tmp_path / "benchmarks" / "README.md").touch()
    assert machine.describe("cpu")["code"] == before["code"]
    (tmp_path / "retro_mcore" / "__init__.py").write_text("1")
    assert machine.describe("cpu")["code"] != before["code"]


def test_the_retired_release_comes_first_and_other_packages_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "site:more")
    assert environment.variables(tmp_path)["PYTHONPATH"] == f"{tmp_path}:{ROOT}:site:more"
    monkeypatch.delenv("PYTHONPATH")
    assert environment.variables(tmp_path)["PYTHONPATH"] == f"{tmp_path}:{ROOT}"


def test_make_test_gpu_uses_all_cores(monkeypatch):
    from tests.gpu import test_gpu_report as tests

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = []
    monkeypatch.setattr(tests, "report", lambda _: threads.append(os.getenv("OMP_NUM_THREADS")))
    tests.run_report()
    assert threads == [None]
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_every_section_exists():
    named = {name for need in NEEDS for name in (*need.sections, *need.parts)}
    assert named <= set(SECTIONS)
    from importlib import import_module

    for section in SECTIONS.values():
        module, function = section.target.split(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "faiss", "fp8", "step_time"])
def test_cheap_sections_on_the_cpu(name, megatron):
    result = run_section(SECTIONS[name].target, SMALL)
    assert result["status"] == ("skipped" if name in ("fp8", "step_time") else "passed"), result


def test_faiss_on_a_gpu(monkeypatch):
    """With functions that stand for those of Faiss's GPU build."""
    build = stand_in(monkeypatch)
    result = run_section(SECTIONS["faiss"].target, Setting("cuda", small=True))
    assert result["status"] == "passed", result
    assert (build.clustered, len(build.options)) == (1, 2)
    assert not result["skipped"]
    found = {check["name"]: check["found"] for check in result["checks"]}
    assert found["trained on the GPU, distance to the centroids ÷ the CPU's"] == 1
    for name in ("list order", "filled on the GPU", "search on the GPU"):
        assert found[f"{name}, ids are compared"] > 0.1
        assert found[f"{name}, other ids where distances are not tied"] == 0


def test_other_neighbors_are_seen():
    distances = np.array([[0.0, 0.3, 0.30001, 0.5, 0.7]] * 2000, np.float32)
    ids = np.arange(10_000).reshape(2000, 5)
    swapped, wrong, elsewhere = ids.copy(), ids.copy(), distances.copy()
    swapped[:, [1, 2]] = ids[:, [2, 1]]
    wrong[7, 3] = -1
    elsewhere[:3] += 0.1
    assert statuses(distances, swapped, distances, ids) == [True, True, True]
    assert statuses(distances, wrong, distances, ids) == [True, True, False]
    assert statuses(elsewhere, wrong, distances, ids) == [False, True, False]
    assert statuses(elsewhere[:1], wrong[:1], distances[:1], ids[:1]) == [False, False, True]


def statuses(*found_and_expected) -> list[bool]:
    findings = Findings()
    found, expected = found_and_expected[:2], found_and_expected[2:]
    retrieval._same_neighbors(findings, "", found, expected)
    return [check.passed for check in findings.checks]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["transformer_engine", "attention", "bf16_training", "fp8", "utilization"]
)
def test_parts_with_transformer_engine(name, monkeypatch, megatron):
    """On local layers in its place, and fp32 in place of fp8: the parts themselves run."""
    make_plan = small_runs.make_plan

    def local_plan(setting, shape, steps, **flags):
        flags.pop("transformer_impl", None)
        if flags.pop("fp8_format", None):
            del flags["bf16"]
        return make_plan(setting, shape, steps, **flags)

    for module in (numerics, kernels, training, speed):
        monkeypatch.setattr(module, "require_engine", lambda setting: None)
    monkeypatch.setattr(small_runs, "make_plan", local_plan)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    result = run_section(SECTIONS[name].target, SMALL)
    assert result["status"] == "passed", result
    assert not result["skipped"]


@pytest.mark.slow
def test_cached_decoding_in_bf16_may_be_as_far_off_as_its_bound(megatron):
    """Two results that are rounded independently: the bound leaves half of itself."""
    options = generation.Options(hidden_size=64, num_layers=24, vocab_size=1024, dtype="bfloat16")
    in_bf16 = generation.build_model(options, 128)
    in_fp32 = generation.build_model(dataclasses.replace(options, dtype="float32"), 128)
    with torch.no_grad():
        for one, other in zip(in_fp32.parameters(), in_bf16.parameters(), strict=True):
            one.copy_(other)
        text = generation.text_of(options, 128, generation.RandomNeighbors(options))
        logits = [
            FullRecomputation(model, 0).next_logits([text]).float() for model in (in_bf16, in_fp32)
        ]
    apart = numerics.distance(*logits)
    assert 0.2 < apart * 2**0.5 / speed.DECODING_LOGITS < 0.8


@pytest.mark.slow
def test_the_query_rate_needs_no_package_with_a_vocabulary(monkeypatch):
    from retro_mcore.retrieval import bert_tokens

    monkeypatch.setattr(bert_tokens, "find_spec", lambda name: None)
    result = run_section(SECTIONS["queries"].target, SMALL)
    assert result["status"] == "passed", result


@pytest.mark.slow
def test_the_embedding_rate_needs_no_sentence_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    result = run_section(SECTIONS["embedding"].target, SMALL)
    assert result["status"] == "passed", result
    assert "tiny, fp32, chunks/s" in result["figures"]


@pytest.mark.slow
def test_sections_on_the_cpu(tmp_path, capsys):
    flags = ["--device", "cpu", "--small", "--output", str(tmp_path), "--time-limit", "3000"]
    assert main(flags) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    statuses = {name: result["status"] for name, result in found["sections"].items()}
    skipped = {"transformer_engine", "fp8", "step_time"}
    assert statuses == {name: "skipped" if name in skipped else "passed" for name in SECTIONS}
    assert found["machine"]["device"].startswith("CPU")
    assert found["machine"]["retro-mcore"] == retro_mcore.__version__
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
