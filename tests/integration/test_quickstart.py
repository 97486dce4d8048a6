"""The quickstart: from text to two models and a generated paragraph, on real data and processes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
COMMANDS = [
    "preprocess_corpus",
    "build_db",
    "build_index",
    "query_neighbors",
    "pretrain_retro",
    "pretrain_retro",
    "evaluate_perplexity",
    "evaluate_perplexity",
    "generate",
]


def run_script(name: str, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, QUICKSTART / name, *flags]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, check=False
    )


def load_script(name: str) -> Any:
    """A script of the quickstart as a module."""
    spec = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def commands_shown(output: str) -> list[str]:
    """The commands that were printed for the newcomer to learn."""
    return re.findall(r"^\$ .*tools/(\w+)\.py", output, re.MULTILINE)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on two processes: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    result = run_script("run.py", "--smoke", "--nproc", 2, "--output", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_go_from_text_to_a_paragraph(finished):
    folder, output = finished
    assert commands_shown(output) == COMMANDS
    assert output.count("torchrun --standalone --nproc-per-node 2") == len(COMMANDS)
    assert (folder / "retro_against_gpt.png").read_bytes().startswith(b"\x89PNG")
    measured = json.loads((folder / "checkpoints" / "perplexity.json").read_text("utf-8"))
    assert [row["neighbors"] for row in measured] == ["real", "shuffled", "none"]
    assert len({row["perplexity"] for row in measured}) == 3
    assert (folder / "prompt.txt").read_text("utf-8").strip() in output
    assert re.search(r"distance \d", output)
    closing = output[output.rindex("\nquickstart ") :]  # the table, not a path in it
    assert all(re.search(rf"{name} .*\d s", closing) for name in COMMANDS)
    assert re.search(r"GPT +\d+\.\d\d █", closing)
    assert f"plot: {(folder / 'retro_against_gpt.png').as_uri()}" in closing
    page = folder / "generated.html"
    assert page.as_uri() in closing
    assert page.read_text("utf-8").lower().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_second_run_on_one_process_reuses_what_is_finished(finished):
    folder, _ = finished
    built = contents(folder / "project" / "db") | contents(folder / "project" / "query")
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    trained_at = tracker.stat().st_mtime_ns
    result = run_script("run.py", "--smoke", "--output", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert commands_shown(result.stdout) == COMMANDS
    shown = result.stdout.split("\n$ ")[1:]
    for name, printed in list(zip(COMMANDS, shown, strict=True))[:6]:
        assert f"tools/{name}.py" in printed
        assert "reused" in printed, name
    assert contents(folder / "project" / "db") | contents(folder / "project" / "query") == built
    assert tracker.stat().st_mtime_ns == trained_at


@pytest.mark.parametrize(
    "nproc", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.distributed])]
)
def test_a_commands_failure_is_forwarded_with_its_code_and_message(tmp_path, nproc):
    corpus = tmp_path / "broken.jsonl"
    corpus.write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    result = run_script(
        "run.py", "--smoke", "--input", corpus, "--nproc", nproc, "--output", tmp_path / "out"
    )
    assert result.returncode == 2
    assert f"error: {corpus}:2: invalid JSON" in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "preprocess_corpus stopped with exit code 2" in result.stderr
    assert commands_shown(result.stdout) == ["preprocess_corpus"]


def test_commands_beside_others_are_printed_when_it_is_their_turn(tmp_path, monkeypatch, capsys):
    stages = load_script("stages")
    monkeypatch.setattr(
        stages, "command_line", lambda stage, nproc: [sys.executable, "-c", *stage.flags]
    )

    def stage(title, code):
        return stages.Stage(title, title, [code], log=tmp_path / "logs" / title)

    first, failing = stage("first", "print('one')"), stage("failing", "raise SystemExit(3)")
    beside = stages.Beside([first, failing, stage("never", "")], 1)
    assert beside.finish(first)[0] == 0
    assert re.search(r"^\$ .*print.*\none$", capsys.readouterr().out, re.MULTILINE)
    assert beside.finish(failing)[0] == 3
    beside.stop()
    assert not beside.is_running
    assert not (tmp_path / "logs" / "never").exists()
    endless = stages.Beside([stage("endless", "import time; time.sleep(600)")], 1)
    endless.stop()
    assert not endless.is_running


def test_the_corpus_is_pythons_documentation_always_the_same(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for path in (first, second):
        result = run_script("make_corpus.py", "--text", "python", "--output", path)
        assert result.returncode == 0, result.stderr
    assert first.read_bytes() == second.read_bytes()
    documents = {
        record["id"]: record["text"] for record in map(json.loads, first.open(encoding="utf-8"))
    }
    assert len(documents) > 300
    assert sum(map(len, documents.values())) > 1_500_000
    assert "PriorityQueue" in documents["module:queue"]
    assert "yield expression" in documents["topic:yield"]
    assert "str.partition" in documents["module:builtins"]
    assert not any(name.startswith(("module:test", "module:idlelib")) for name in documents)


def test_a_models_files_are_one_document_with_each_section_once(tmp_path):
    path = tmp_path / "models.jsonl"
    result = run_script("make_corpus.py", "--output", path, "--max-documents", 20)
    assert result.returncode == 0, result.stderr
    documents = [json.loads(line) for line in path.open(encoding="utf-8")]
    assert len({one["id"] for one in documents}) == len(documents) == 20
    assert all(one["id"].startswith("model:") for one in documents)
    for one in documents:
        headings = re.findall(r"(?m)^class \w+Config\(.*\)$", one["text"])
        assert len(headings) == len(set(headings)), one["id"]
    refused = run_script("make_corpus.py", "--output", path, "--max-modules", 1)
    assert refused.returncode == 2
    assert "only --text python has modules" in refused.stderr


def test_fewer_documents_are_the_first_ones(tmp_path, monkeypatch, capsys):
    # In this process, to parse the standard library once.
    corpus = load_script("make_corpus")
    read = corpus.source_documents
    monkeypatch.setattr(corpus, "source_documents", cache(lambda library: [*read(library)]))
    for count in (3, 5):
        flags = ["--text", "python", "--output", str(tmp_path / f"{count}.jsonl")]
        flags += ["--max-documents", str(count)]
        monkeypatch.setattr(sys, "argv", ["make_corpus.py", *flags])
        assert corpus.main() == 0
        assert f"{count} documents" in capsys.readouterr().out
    three, five = (
        (tmp_path / name).read_text("utf-8").splitlines() for name in ("3.jsonl", "5.jsonl")
    )
    assert five[:3] == three
    refused = run_script("make_corpus.py", "--output", tmp_path / "0.jsonl", "--max-documents", 0)
    assert refused.returncode == 2
    assert "--max-documents 0" in refused.stderr
