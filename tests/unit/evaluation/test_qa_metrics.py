# ruff: noqa: RUF001 (letters of other scripts are what these tests are about)
"""SQuAD's metrics, ROUGE, options, and confidence intervals."""

from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_mcore.data.instruction.examples import InstructionExample
from retro_mcore.errors import CorpusError
from retro_mcore.evaluation.bootstrap import estimate_mean
from retro_mcore.evaluation.qa_metrics import (
    ROUGE,
    chosen_option,
    exact_match,
    f1,
    normalize_answer,
    rouge,
    score,
)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "expected_f1"),
    [
        (" The Eiffel Tower.", ["Eiffel tower"], 1, 1),
        ("in Paris, France", ["paris", "France"], 0, 0.5),
        ("U.S.A.", ["usa"], 1, 1),
        ("", ["the"], 1, 1),
        ("", ["x"], 0, 0),
        ("x", ["a"], 0, 0),
        ("x x y", ["x z z z", "y q"], 0, 0.4),
    ],
)
def test_exact_match_and_f1_take_the_best_answer(prediction, answers, em, expected_f1):
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(expected_f1)


def test_rouge_takes_the_best_answer_of_each_kind():
    scores = rouge("the cats sat on a mat", ["a cat sat", "mat on the floor"])
    # Stemmed: "cat sat" is common to the first answer, so one of 5 and 2 word pairs.
    assert scores["rouge2"] == pytest.approx(2 * (1 / 5) * (1 / 2) / (1 / 5 + 1 / 2))
    assert scores["rouge1"] == pytest.approx(2 * 3 / (6 + 3))
    assert scores["rougeL"] == pytest.approx(2 * 2 / (6 + 3))


SAME_IN_ANY_SCRIPT = [
    ("東京", "東京。"),
    ("「東京」", "東京"),
    ("東京 大阪", "東京、大阪"),
    ("ﾄｳｷｮｳ", "トウキョウ"),
    ("１９９８年", "1998年"),
    ("กรุงเทพ", "กรุงเทพ!"),
    ("हिन्दी", "हिन्दी।"),
    ("القاهرة", "القاهرة؟"),
    ("Москва", "«МОСКВА»"),
    ("서울", "서울"),
    ("Zu\u0308rich", "Zürich"),
    ("a\u0331b", "A\u0331B"),
    ("Straße", "STRASSE"),
    ("the\u200b cat", "cat"),
    ("ＡＢＣ（Ｄ）", "abc d"),
    ("Jean–Paul", "Jean-Paul"),
    ("🙂", "🙂"),
]


@pytest.mark.parametrize(("prediction", "answer"), SAME_IN_ANY_SCRIPT)
def test_the_same_words_are_a_match_in_any_script(prediction, answer):
    """Who evaluates a language other than English would meet it."""
    if answer != "abc d":  # punctuation joins SQuAD's words
        assert exact_match(prediction, [answer]) == 1
        assert f1(prediction, [answer]) == 1
    scores = rouge(prediction, [answer])
    if prediction != "the\u200b cat":  # ROUGE counts articles
        assert scores["rouge1"] == scores["rougeL"] == 1


@pytest.mark.parametrize(
    ("prediction", "answer", "share"),
    [
        ("東京都", "京都", 4 / 5),
        ("北京", "東京", 1 / 2),
        ("गाँव हिन्दी", "गाँव", 2 / 3),
        ("แมว", "ไก่", 0),
    ],
)
def test_parts_of_answers_count_in_any_script(prediction, answer, share):
    assert exact_match(prediction, [answer]) == 0
    assert f1(prediction, [answer]) == pytest.approx(share)
    assert rouge(prediction, [answer])["rouge1"] == pytest.approx(share)


@pytest.mark.parametrize("other", ["東", "à", "é", "б", "ก", "🙂"])
def test_another_answer_is_none(other):
    for answer in ("西", "e", "а", "ข", "🙃"):
        assert exact_match(other, [answer]) == f1(other, [answer]) == 0
        assert rouge(other, [answer])["rouge1"] == 0


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text(string.printable, max_size=30), st.text(string.printable, max_size=30))
def test_ascii_scores_are_those_of_squad_and_of_rouge_score(prediction, answer):
    from rouge_score.rouge_scorer import RougeScorer

    from retro_mcore.evaluation.qa_legacy import _normalized  # SQuAD's own lines

    expected = RougeScorer(list(ROUGE), use_stemmer=True).score(answer, prediction)
    assert rouge(prediction, [answer]) == {name: expected[name].fmeasure for name in ROUGE}
    assert normalize_answer(answer) == _normalized(answer)


CHOICES = ("red", "the green one", "blue", "Dark red")


@pytest.mark.parametrize(
    ("text", "option"),
    [
        (" Blue.", 2),
        ("(B) green", 1),
        ("B", 1),
        ("C. blue", 2),
        ("The answer is (A).", 0),
        ("it is blue, I think", 2),
        ("red or blue", None),
        ("Both (A) and (B).", None),
        ("(B), not (F): (B)", 1),
        ("A red thing", 0),
        ("(F)", None),
        ("yellow", None),
    ],
)
def test_options_are_named_by_words_or_letters(text, option):
    assert chosen_option(text, CHOICES) == option


@pytest.mark.parametrize(
    ("text", "choices", "option"),
    [
        ("", ("A", "B"), None),
        (" ", ("", "x"), None),
        ("???", ("A", "B"), None),
        ("A", ("A", "B"), 0),
        ("(a)", ("A", "B"), 0),
        ("A red thing", ("A", "B"), None),
        ("Apple", ("A", "Apple"), 1),
        ("an apple", ("A", "Apple"), 1),
        ("The", ("A", "The"), 1),
        ("it is dark red", ("red", "dark red"), 1),
        ("dark red or red", ("red", "dark red"), None),
        ("東京です", ("東", "東京"), 1),
        ("答えは「京都」。", ("東京", "京都"), 1),
        ("（Ｂ）", ("東", "京"), 1),
        ("B、京", ("東", "京"), 1),
        ("-1", ("1", "-1"), 1),
        ("1.5", ("15", "1.5"), 1),
        ("C#.", ("C++", "C", "C#"), 2),
        (" c", ("C++", "C", "C#"), 1),
        ("(1)", ("1", "-1"), None),
        ("$5", ("5 $", "5%"), None),
        ("it is -1", ("1", "-1"), None),
        ("x", ("x", "X."), 0),
        ("+", ("+", "-"), 0),
        ("-", ("+", "-"), 1),
    ],
)
def test_no_option_is_named_by_nothing_or_by_a_part_of_another(text, choices, option):
    """Who scores a young model, which answers with nothing, would meet it."""
    assert chosen_option(text, choices) == option


def example(**changes):
    return InstructionExample("race", "race.json, record 3", "q", **changes)


def test_accuracy_is_scored_where_there_are_options():
    assert "accuracy" not in score("x", example(answers=("x",)))
    assert score("(C)", example(answers=("blue",), choices=CHOICES))["accuracy"] == 1
    assert score("red", example(answers=("C",), choices=CHOICES))["accuracy"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "record 3: has no answers to score"),
        ({"answers": ("pink",), "choices": CHOICES}, r"record 3: none of its answers \['pink'\]"),
    ],
)
def test_an_example_without_a_usable_answer_is_named(changes, message):
    with pytest.raises(CorpusError, match=message):
        score("x", example(**changes))


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        found = estimate_mean((generator.random(80) < 0.3).tolist(), 0.9, 400, seed)
        held += found.low <= 0.3 <= found.high
    assert 0.83 < held / 200 < 0.97


def test_intervals_are_reproducible_and_shrink_to_a_point():
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    assert estimate_mean(values) == estimate_mean(values)
    assert estimate_mean(values).low < 0.55 < estimate_mean(values).high
    same = estimate_mean([1.0] * 5)
    assert (same.low, same.mean, same.high) == (1, 1, 1)
    assert estimate_mean([0.5]).high == 0.5
