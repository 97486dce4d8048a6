"""The lm-evaluation-harness itself, on a local task, with a small trained model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.small_checkpoint import small_checkpoint
from tests.processes import run_ranks
from tests.unit.data.projects import built_project, documents

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{whole}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"local_choice": CHOICE, "local_rolling": ROLLING, "local_generate": GENERATE}


def write_tasks(folder: Path) -> list[dict]:
    """Task files, and documents whose beginning is followed by its own end or by another's."""
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    texts = documents()[:2]
    rows = [
        {
            "text": text[:50].rstrip(),
            "choices": [f" {text[50:60].strip()}", f" {texts[i - 1][30:45].strip()}"],
            "whole": text[:170],
        }
        for i, text in enumerate(texts)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    return rows


def model_arguments(neighbors: str) -> dict:
    return {
        "project_dir": str(built_project()),
        "load": small_checkpoint(),
        "retro_neighbors": neighbors,
        "batch_size": 2,
        "device": "cpu",
    }


def evaluate(folder: str, arguments: dict) -> dict:
    """Every task's samples and results, by the harness."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import retro_mcore.evaluation.lm_eval  # noqa: F401 (registers the model)

    outcome = lm_eval.simple_evaluate(
        model="retro_mcore",
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
    )
    return {
        name: {
            "results": {
                key: value
                for key, value in outcome["results"][name].items()
                if isinstance(value, float)
            },
            "samples": sorted(
                (sample["doc_id"], json.dumps(sample["filtered_resps"]))
                for sample in outcome["samples"][name]
            ),
        }
        for name in TASKS
    }


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = write_tasks(folder)
    results = {kind: evaluate(str(folder), model_arguments(kind)) for kind in ("live", "none")}
    return folder, rows, results


@pytest.fixture(scope="module")
def loaded(harness):
    from retro_mcore.session import load_model

    return load_model(built_project(), small_checkpoint(), retrieval=True)


FOUND: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}


def search(loaded, chunk: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    if chunk not in FOUND:
        found = loaded.retriever.search_tokens([chunk])
        FOUND[chunk] = found.tokens, found.mask
    return FOUND[chunk]


def logits_of(loaded, tokens: list[int], retrieval: bool) -> torch.Tensor:
    """The next token's logits after a text alone, f64 [V]."""
    context = {}
    chunks = len(tokens) // 16
    if retrieval and chunks:
        found = [search(loaded, tuple(tokens[16 * i :][:16])) for i in range(chunks)]
        retrieved, mask = (np.concatenate(parts) for parts in zip(*found, strict=True))
        context["context_input_ids"] = torch.from_numpy(retrieved).flatten(0, 1)
        context["context_mask"] = torch.from_numpy(mask).flatten(0, 1)
    with torch.no_grad():
        read = torch.tensor([tokens])
        logits = loaded.model(read, torch.arange(len(tokens))[None], None, **context)
    return logits[0, -1, : loaded.tokenizer.vocab_size].double()


def likelihood(loaded, context: list[int], continuation: list[int], retrieval: bool) -> float:
    total, tokens = 0.0, list(context)
    for token in continuation:
        total += logits_of(loaded, tokens, retrieval).log_softmax(-1)[token].item()
        tokens.append(token)
    return total


@pytest.mark.parametrize("kind", ["live", "none"])
def test_choices_have_the_models_likelihoods(harness, loaded, kind):
    _, rows, results = harness
    right = []
    for row, (_, answers) in zip(rows, results[kind]["local_choice"]["samples"], strict=True):
        context = loaded.tokenizer.tokenize(row["text"])
        expected = []
        for choice in row["choices"]:
            whole = loaded.tokenizer.tokenize(row["text"] + choice)
            expected.append(likelihood(loaded, context, whole[len(context) :], kind == "live"))
        found = [float(answer[0]) for answer in json.loads(answers)]
        assert found == pytest.approx(expected, rel=1e-5)
        right.append(np.argmax(expected) == 0)
    assert results[kind]["local_choice"]["results"]["acc,none"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("kind", ["live", "none"])
def test_rolling_likelihood_is_that_of_whole_texts_in_windows(harness, loaded, kind):
    _, rows, results = harness
    total = 0.0
    for row in rows:
        tokens = loaded.tokenizer.tokenize(row["whole"])
        read = [loaded.tokenizer.eod, *tokens]
        for position in range(1, len(read)):
            # The harness' windows: full ones side by side, the last one shifted back to be full.
            end = min(-(-position // loaded.window) * loaded.window, len(tokens))
            start = max(0, end - loaded.window)
            part = read[start:position]
            total += likelihood(loaded, part, read[position : position + 1], kind == "live")
    expected = -total / sum(len(row["whole"].encode()) for row in rows) / math.log(2)
    found = results[kind]["local_rolling"]["results"]["bits_per_byte,none"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["live", "none"])
def test_texts_grow_greedily_up_to_a_stop_text(harness, loaded, kind):
    _, rows, results = harness
    for row, (_, answers) in zip(rows, results[kind]["local_generate"]["samples"], strict=True):
        prompt = loaded.tokenizer.tokenize(row["text"])
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6:
            token = int(logits_of(loaded, tokens, kind == "live").argmax())
            if token == loaded.tokenizer.eod:
                break
            tokens.append(token)
        text = loaded.tokenizer.detokenize(tokens)
        expected = text[len(loaded.tokenizer.detokenize(prompt)) :].split("e")[0]
        assert json.loads(answers)[0] == expected


def test_retrieval_shows(harness):
    results = harness[2]
    live, none = (results[kind]["local_rolling"]["results"] for kind in ("live", "none"))
    assert live["bits_per_byte,none"] != pytest.approx(none["bits_per_byte,none"], rel=1e-4)


def on_one_rank(folder, arguments, tensor_parallel):
    results = [evaluate(folder, arguments)]
    return [*results, evaluate(folder, {**arguments, **tensor_parallel})]


@pytest.mark.distributed
def test_two_ranks_give_the_results_of_one(harness):
    folder, _, results = harness
    tensor_parallel = {"tensor_model_parallel_size": 2}
    ranks = run_ranks(2, on_one_rank, str(folder), model_arguments("live"), tensor_parallel)
    for rank in ranks:
        assert rank[0] == results["live"]
        for name in TASKS:
            expected = results["live"][name]["results"]
            assert rank[1][name]["results"] == pytest.approx(expected, rel=1e-5)


def test_the_command_line_knows_the_model(harness, tmp_path):
    folder, _, results = harness
    arguments = ",".join(f"{k}={v}" for k, v in model_arguments("none").items() if k != "device")
    command = [sys.executable, "-m", "retro_mcore.cli.lm_eval", "run", "--model", "retro_mcore"]
    command += ["--model_args", arguments.replace(",batch_size=2", ""), "--batch_size", "2"]
    command += ["--device", "cpu", "--include_path", str(folder), "--tasks", "local_rolling"]
    command += ["--output_path", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (path,) = tmp_path.rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["local_rolling"]["bits_per_byte,none"]
    expected = results["none"]["local_rolling"]["results"]["bits_per_byte,none"]
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_mistake_is_one_line(tmp_path):
    command = [sys.executable, "-m", "retro_mcore.cli.lm_eval", "run", "--model", "retro_mcore"]
    command += ["--model_args", f"project_dir={tmp_path},load=x", "--tasks", "local_rolling"]
    command += ["--include_path", str(tmp_path), "--device", "cpu"]
    write_tasks(tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not a project directory" in done.stderr.splitlines()[-1]
