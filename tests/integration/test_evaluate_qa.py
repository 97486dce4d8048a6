"""The command `evaluate_qa` on a small trained model and its project."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retro_mcore.cli.evaluate_qa import EvaluateQaOptions, evaluate_qa, main
from retro_mcore.errors import ConfigurationError, CorpusError, ProjectError, flag_of
from retro_mcore.evaluation import qa_config
from retro_mcore.project.lock import directory_lock
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project
from tests.unit.evaluation.questions import records, write_test_file
from tests.unit.inference.small import requests_for

ROOT = Path(__file__).parents[2]


def make_options(folder, **changes):
    values = {
        "project_dir": str(built_project()),
        "load": small_checkpoint(),
        "sample_input_file": str(write_test_file(folder)),
        "output": str(folder / "output"),
        "prompt_format": "reformat_prompt_short",
        "ft_neighbours": 1,
        "max_new_tokens": 12,
        "micro_batch_size": 3,
        "device": "cpu",
    }
    return EvaluateQaOptions(**{**values, **changes})


@pytest.fixture
def options(tmp_path):
    return lambda **changes: make_options(tmp_path, **changes)


def predictions(folder, arm):
    text = (folder / "output" / f"predictions_{arm}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    changes = {"retro_neighbors": "live", "ablate_retrieval": True, "legacy_scoring": True}
    return folder, evaluate_qa(make_options(folder, **changes))


def test_one_command_answers_with_the_encoder_on_and_off(ablation):
    folder, result = ablation
    assert list(result.scores) == ["live", "none"]
    on, off = predictions(folder, "live"), predictions(folder, "none")
    assert [row["id"] for row in on] == list(range(7))
    assert [row["question"] for row in on[:6]] == [r["question"] for r in records()[:6]]
    assert [row["pred"] for row in on] != [row["pred"] for row in off]
    for name in ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "accuracy"):
        gain = result.scores["live"][name].mean - result.scores["none"][name].mean
        assert result.difference[name].mean == pytest.approx(gain)
    written = json.loads((folder / "output" / "scores.json").read_text())
    assert written["scores"]["live"]["f1"]["mean"] == result.scores["live"]["f1"].mean
    assert written["legacy"]["none"]["f1"] == result.legacy["none"].f1
    assert written["num_questions"] == 7


def test_what_was_cut_or_empty_is_counted(ablation):
    """A window of 64 tokens cuts the prompts; who reads the scores must know."""
    folder, result = ablation
    written = json.loads((folder / "output" / "scores.json").read_text())
    for arm in ("live", "none"):
        rows = predictions(folder, arm)
        report = result.report[arm]
        assert written["report"][arm] == report
        assert report["prompts_cut"] == sum(row["prompt_tokens_cut"] > 0 for row in rows) > 0
        assert report["questions_cut"] == sum(row["question_tokens_cut"] > 0 for row in rows)
        assert report["answers_cut"] == sum(row["finish_reason"] == "length" for row in rows)
        assert report["answers_empty"] == sum(not row["pred"].strip() for row in rows)
        assert report["options_not_named"] <= 1


def test_a_question_that_is_cut_itself_is_counted(options, tmp_path, capsys):
    given = options(max_new_tokens=60, num_gen=1, ft_neighbours=0)
    result = evaluate_qa(given)
    assert predictions(tmp_path, "none")[0]["prompt_tokens"] == 4
    assert result.report["none"]["questions_cut"] == 1
    assert "1 questions cut themselves" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["file", "file/below", "folder.json"])
def test_results_that_cannot_be_written_are_refused_before_the_work(options, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.json" / "scores.json").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="--output"):
        evaluate_qa(options(output=str(tmp_path / place), load="nowhere"))
    assert (tmp_path / "file").read_text() == "mine"


def test_scores_are_those_of_the_predictions(ablation):
    from retro_mcore.evaluation.qa_metrics import f1

    folder, result = ablation
    rows = predictions(folder, "live")
    mean = sum(f1(row["pred"], row["answers"]) for row in rows) / len(rows)
    assert result.scores["live"]["f1"].mean == pytest.approx(mean)


def test_the_answer_is_what_generate_adds_to_the_prompt(ablation):
    from retro_mcore.inference.generation import generate
    from retro_mcore.inference.sampling import SamplingOptions
    from retro_mcore.session import load_model

    loaded = load_model(built_project(), small_checkpoint())
    record = records()[2]
    passage = f"title: , source: {record['ctxs'][0]['text']}\n\n"
    question = f"Question: {record['question']} Answer: The answer is"
    tokens = loaded.tokenizer.tokenize(passage)
    rest = loaded.tokenizer.tokenize(question)
    row = predictions(ablation[0], "none")[2]
    assert row["prompt_tokens"] <= 64 - 12
    # The passage is cut to what the question leaves of the window.
    kept = row["prompt_tokens"] - len(rest)
    prompt = loaded.tokenizer.tokenize(loaded.tokenizer.detokenize(tokens[:kept]) + question)
    (text,) = generate(
        loaded.model,
        loaded.tokenizer,
        requests_for([prompt], max_new_tokens=12, sampling=SamplingOptions(temperature=0.0)),
    )
    assert loaded.tokenizer.detokenize(text.new_tokens).strip() == row["pred"].strip()


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(options, tmp_path, monkeypatch):
    from retro_mcore.evaluation import question_answering

    whole = options(output=str(tmp_path / "whole"), temperature=0.8)
    evaluate_qa(whole)
    expected = (tmp_path / "whole" / "predictions_none.jsonl").read_bytes()
    generated = []
    original = question_answering.generate

    def stopping(*args, **kwargs):
        if len(generated) == 2:
            raise KeyboardInterrupt
        generated.append(len(args[2]))
        return original(*args, **kwargs)

    monkeypatch.setattr(question_answering, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_qa(options(temperature=0.8))
    assert generated == [3, 3]
    monkeypatch.setattr(question_answering, "generate", original)
    evaluate_qa(options(temperature=0.8))
    assert (tmp_path / "output" / "predictions_none.jsonl").read_bytes() == expected
    assert not (tmp_path / "output" / "predictions_none.jsonl.parts").exists()
    # A finished run is scored again without a model's work.
    monkeypatch.setattr(question_answering, "generate", None)
    evaluate_qa(options(temperature=0.8, num_resamples=10))


def test_two_runs_into_one_folder_are_refused(options, tmp_path):
    """The first to finish removed the other's answers."""
    lock = directory_lock(tmp_path / "output", "evaluate_qa")
    with lock, pytest.raises(ProjectError, match="another run works on it: evaluate_qa"):
        evaluate_qa(options())


def test_every_option_is_of_scores_or_refused_with_given_answers():
    """Or does not change results."""
    of_scores = {"sample_input_file", "output", "predictions", "num_gen", "seed", "verify"}
    of_scores |= {"legacy_scoring", "confidence_level", "num_resamples", "task"}
    refused_elsewhere = {"ablate_retrieval", "reuse_top", "context_parallel_size"}
    how = {"micro_batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"}
    how |= {"device", "distributed_timeout_minutes"}
    known = {*qa_config.OF_ANSWERS, *of_scores, *refused_elsewhere, *how}
    assert {field.name for field in dataclasses.fields(EvaluateQaOptions)} == known


def to_score(options, path, **changes):
    given = options()
    return EvaluateQaOptions(
        sample_input_file=given.sample_input_file,
        output=given.output,
        predictions=str(path),
        device="cpu",
        **changes,
    )


def test_more_questions_than_there_are_are_not_taken_silently(options, tmp_path, capsys):
    path = tmp_path / "answers.txt"
    path.write_text("an answer\n" * 7)
    evaluate_qa(to_score(options, path, num_gen=9))
    assert "--num-gen 9, but " in capsys.readouterr().err
    evaluate_qa(to_score(options, path, num_gen=7))
    assert "--num-gen" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [{"load": "folder"}, {"max_new_tokens": 5}, {"top_k": 3}, {"retro_neighbors": "live"}],
)
def test_options_of_answers_do_not_go_with_given_answers(options, tmp_path, given):
    (name,) = given
    with pytest.raises(ConfigurationError, match=f"{flag_of(name)}: given with --predictions"):
        evaluate_qa(to_score(options, tmp_path / "answers.txt", **given))


def test_predictions_of_other_settings_are_not_mixed(ablation, tmp_path):
    folder, _ = ablation
    with pytest.raises(ConfigurationError, match=r"--max-new-tokens: .* with 12, asked for 5"):
        evaluate_qa(make_options(folder, max_new_tokens=5, retro_neighbors="live"))


def test_passages_reach_the_encoder(options, tmp_path):
    evaluate_qa(options(retro_neighbors="passages", ft_neighbours=0, num_gen=3))
    with_passages = predictions(tmp_path, "passages")
    evaluate_qa(options(retro_neighbors="none", ft_neighbours=0, num_gen=3))
    without = predictions(tmp_path, "none")
    assert [row["prompt_tokens"] for row in with_passages] == [
        row["prompt_tokens"] for row in without
    ]
    assert [row["pred"] for row in with_passages] != [row["pred"] for row in without]


def test_answers_end_before_a_stop_text_and_two_chunks_give_others(options, tmp_path):
    evaluate_qa(options(num_gen=3))
    whole = [row["pred"] for row in predictions(tmp_path, "none")]
    stop = whole[0][2]
    evaluate_qa(options(num_gen=3, stop=[stop], output=str(tmp_path / "stopped" / "output")))
    stopped = [row["pred"] for row in predictions(tmp_path / "stopped", "none")]
    assert stopped == [text.split(stop)[0] for text in whole]
    # Read ten times as loud, so that greedy answers of this tiny model cannot stay as they are.
    given = {"retro_neighbors": "passages", "reuse_top": True, "retro_attention_gate": 10.0}
    evaluate_qa(options(**given))
    by_chunks = predictions(tmp_path, "passages")
    evaluate_qa(options(**given, two_chunks=True, output=str(tmp_path / "two" / "output")))
    assert predictions(tmp_path / "two", "passages") != by_chunks


def test_given_predictions_are_scored_without_a_model(options, tmp_path, capsys):
    path = tmp_path / "answers.txt"
    path.write_text("".join(f" The {record['answers'][0]}.\n" for record in records()))
    flags = ["--sample-input-file", options().sample_input_file, "--predictions", str(path)]
    flags += ["--output", str(tmp_path / "scored"), "--legacy-scoring", "--device", "cpu"]
    assert main(flags) == 0
    output = capsys.readouterr().out
    assert "answers empty" not in output
    assert "exact match" in output
    assert "100.00 [100.00, 100.00]" in output
    assert "legacy F1" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": None}, "--load: not given"),
        ({"ablate_retrieval": True}, "--ablate-retrieval: there is no retrieval"),
        ({"max_new_tokens": 64}, "--max-new-tokens: 64, but the model reads 64"),
        ({"micro_batch_size": 0}, "--micro-batch-size: 0"),
        ({"confidence_level": 1.0}, "--confidence-level: 1.0"),
        ({"temperature": -1.0}, "--temperature: -1.0"),
        ({"stop": [""]}, "--stop: an empty text"),
        ({"context_parallel_size": 2}, "--context-parallel-size: 2, but generation reads whole"),
        ({"reuse_top": True}, "--reuse-top: given, but the encoder reads none"),
        ({"template_id": 9}, "--template-id: 9"),
    ],
)
def test_impossible_options_are_refused_by_name(options, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        evaluate_qa(options(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"question": "q", "answers": ["a"], "ctxs": []},\n{"question": ]', r"test\.json:2"),
        ('[{"question": "q", "answers": ["a"]}]', "record 0: has no list 'ctxs'"),
        ('[{"question": "q", "answers": [], "ctxs": []}]', "record 0: has no answers"),
        ('[{"answers": ["a"], "ctxs": []}]', "record 0: has no question"),
        ("[]", "holds no questions"),
    ],
)
def test_a_malformed_test_file_is_refused_by_line_or_record(options, text, message):
    given = options()
    Path(given.sample_input_file).write_text(text)
    with pytest.raises(CorpusError, match=message):
        evaluate_qa(given)


def test_too_few_predictions_are_refused(options, tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    with pytest.raises(CorpusError, match="holds 1 predictions of 7 questions"):
        evaluate_qa(to_score(options, tmp_path / "p.txt"))


@pytest.mark.slow
def test_a_killed_process_loses_nothing(options, tmp_path):
    count = 21
    given = options(output=str(tmp_path / "whole"), micro_batch_size=1)
    write_test_file(tmp_path, count)
    evaluate_qa(given)
    expected = (tmp_path / "whole" / "predictions_none.jsonl").read_bytes()
    flags = ["--project-dir", given.project_dir, "--load", given.load]
    flags += ["--sample-input-file", given.sample_input_file]
    flags += ["--output", str(tmp_path / "output")]
    flags += ["--prompt-format", "reformat_prompt_short", "--ft-neighbours", "1"]
    flags += ["--max-new-tokens", "12", "--micro-batch-size", "1"]
    command = [sys.executable, str(ROOT / "tools" / "evaluate_qa.py"), *flags, "--device", "cpu"]
    parts = tmp_path / "output" / "predictions_none.jsonl.parts"
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(list(parts.glob("*.jsonl"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(list(parts.glob("*.jsonl"))) < count
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "output" / "predictions_none.jsonl").read_bytes() == expected
