"""SQuAD's metrics, ROUGE, options, and confidence intervals."""

from __future__ import annotations

import numpy as np
import pytest

from retro_mcore.data.instruction import InstructionExample
from retro_mcore.errors import CorpusError
from retro_mcore.evaluation.bootstrap import estimate_mean
from retro_mcore.evaluation.qa_metrics import chosen_option, exact_match, f1, rouge, score


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
        ("A red thing", 0),
        ("(F)", None),
        ("yellow", None),
    ],
)
def test_options_are_named_by_words_or_letters(text, option):
    assert chosen_option(text, CHOICES) == option


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
