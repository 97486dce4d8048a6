"""Legacy scores, against what the retired Retro's own evaluate.py gave.

The expected numbers were computed by running core_v0.15.3's tools/retro/text_generation/evaluate.py
(evaluate_ems, evaluate_f1) on these records and predictions.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from retro_mcore.errors import CorpusError
from retro_mcore.evaluation.qa_legacy import legacy_line, legacy_scores, read_predictions
from tests.unit.data import any_json

RECORDS = [
    {"question": "q0", "answers": ["The Eiffel Tower", "Eiffel"]},
    {"question": "q1", "answers": ["U.S.A."]},
    {"question": "q2", "answer": "a b"},
    {"question": "q3", "answers": ["no_passages_used", "none"]},
    {"question": "q4", "answer": ["42", "forty-two"]},
    {"question": "q5", "answers": ["Jean-Paul Sartre", "Sartre"]},
    {"question": "q6", "answers": ["the"]},
    {"question": "q7", "answer": "x"},
    {"question": "q8", "answers": ["1,000"]},
    {"question": "q9", "answers": ["état major"]},
    {"question": "q10", "answers": ["left over"]},
]
PREDICTIONS = [
    " The answer is Eiffel",
    "Answer: usa",
    "B.",
    "none",
    "Forty two",
    "Sartre Jean Paul",
    "an",
    "A: x<|endoftext|>",
    "1000",
    "????  Etat-major, état major",
]


def scores(tmp_path, name, records, predictions):
    (tmp_path / name).write_text(json.dumps(records), encoding="utf-8")
    path = tmp_path / "predictions.txt"
    path.write_text("".join(line + "\n" for line in predictions), encoding="utf-8")
    result = legacy_scores(read_predictions(path), (tmp_path / name).relative_to(tmp_path))
    return [result.exact_match, result.precision, result.recall, result.f1]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_scores_are_those_of_the_retired_retro(tmp_path):
    found = scores(tmp_path, "test.json", RECORDS, PREDICTIONS)
    assert found == pytest.approx([0.6, 0.4259259259259259, 0.5, 0.45185185185185184], rel=1e-12)


def test_a_ground_truth_called_dev_is_cut(tmp_path):
    predictions = [*PREDICTIONS, "left over"] * 400
    found = scores(tmp_path, "dev.json", RECORDS * 400, predictions)
    expected = [0.6363333333333333, 0.4833333333333334, 0.55, 0.5066666666666666]
    assert found == pytest.approx(expected, rel=1e-12)


def test_predictions_are_read_from_both_formats(tmp_path):
    assert legacy_line(" one\ntwo<|endoftext|> three") == "one two"
    (tmp_path / "p.jsonl").write_text('{"pred": " x\\ny"}\n{"pred": "z"}\n')
    assert read_predictions(tmp_path / "p.jsonl") == [" x\ny", "z"]
    (tmp_path / "p.txt").write_text(" x\n\nz\n")
    assert read_predictions(tmp_path / "p.txt") == [" x", "", "z"]


@pytest.mark.parametrize(
    ("records", "predictions", "message"),
    [
        (RECORDS[:1], ["a", "b"], "has 1 questions. There are 2 predictions"),
        ([{"question": "q"}], ["a"], "record 0: has no answers"),
        ([RECORDS[0], {"question": "q", "answers": []}], ["a", "b"], "record 1: has no answers"),
        ([{"question": "q", "answers": [{"text": "x"}]}], ["a"], "record 0: has no answers"),
    ],
)
def test_what_cannot_be_scored_is_named(tmp_path, records, predictions, message):
    with pytest.raises(CorpusError, match=message):
        scores(tmp_path, "test.json", records, predictions)


def test_a_malformed_prediction_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"pred": "x"}\n{"text": "z"}\n')
    with pytest.raises(CorpusError, match=r"p\.jsonl:2: has no text under 'pred'"):
        read_predictions(tmp_path / "p.jsonl")


@any_json.few
@given(
    questions=any_json.files(any_json.records(["question", "answers", "answer"])),
    predictions=any_json.files(any_json.records(["pred"])),
)
def test_any_files_are_scores_or_one_error(scratch, questions, predictions):
    """Test files and predictions that somebody else wrote."""
    (scratch / "any.json").write_bytes(questions)
    (scratch / "any.jsonl").write_bytes(predictions)
    said = any_json.outcome(lambda: read_predictions(scratch / "any.jsonl"), CorpusError)
    said = ["a", ""] if isinstance(said, CorpusError) else said
    found = any_json.outcome(lambda: legacy_scores(said, scratch / "any.json"), CorpusError)
    if isinstance(found, CorpusError):
        assert "any.json" in found.subject
        assert "\n" not in str(found)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


def test_predictions_with_other_ends_of_lines(tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_text('{"pred": "a\u2028b"}\n{"pred": "c\u0085"}\n', encoding="utf-8")
    assert read_predictions(path) == ["a\u2028b", "c\u0085"]
    path = tmp_path / "said.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_predictions(path) == ["a", "b"]
