"""Scores of answers: exact match, F1, ROUGE, and accuracy where there are options to choose from.

Exact match and F1 are SQuAD's (Rajpurkar et al. 2016): words are compared without case,
punctuation and articles, and the best of the accepted answers counts. `qa_legacy` scores as the
retired Retro did.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from retro_mcore.errors import CorpusError, MissingDependencyError

if TYPE_CHECKING:
    from retro_mcore.data.instruction import InstructionExample

ROUGE = ("rouge1", "rouge2", "rougeL")

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# "(B)" anywhere, or "B", "B." or "B) …" at the beginning.
_LETTER = re.compile(r"\(([A-Z])\)|^\s*([A-Z])(?:\s*$|[.):])")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, words set apart by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, as `normalize_answer` reads them."""
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, against the answer that gives the most."""
    return max(_f1(normalize_answer(prediction), normalize_answer(answer)) for answer in answers)


def _f1(predicted: str, answer: str) -> float:
    words, expected = predicted.split(), answer.split()
    if not words or not expected:  # nothing to find, and nothing found
        return float(words == expected)
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected))


def rouge(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin 2004): F measures, stemmed, of the best answer for each.

    Raises:
        MissingDependencyError: rouge-score is not installed.
    """
    best = _rouge_scorer().score_multi(list(answers), prediction)
    return {name: best[name].fmeasure for name in ROUGE}


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependencyError(
            "rouge-score", "not installed", "Install retro-mcore[eval]"
        ) from error
    return RougeScorer(list(ROUGE), use_stemmer=True)


def chosen_option(text: str, choices: Sequence[str]) -> int | None:
    """The option that a text names: by its words, by its letter, or as the only one it holds."""
    normalized = [normalize_answer(choice) for choice in choices]
    said = normalize_answer(text)
    if said in normalized:
        return normalized.index(said)
    for match in _LETTER.finditer(text):
        number = ord(match[1] or match[2]) - ord("A")
        if number < len(choices):
            return number
    held = [i for i, option in enumerate(normalized) if option and f" {option} " in f" {said} "]
    return held[0] if len(held) == 1 else None


def accuracy(prediction: str, example: InstructionExample) -> float:
    """1 if the prediction names an option that is an accepted answer.

    Raises:
        CorpusError: no answer is among the options.
    """
    correct = {chosen_option(answer, example.choices) for answer in example.answers} - {None}
    if not correct:
        raise CorpusError(
            example.source,
            f"none of its answers {list(example.answers)} is an option",
            f"The options are {list(example.choices)}",
        )
    return float(chosen_option(prediction, example.choices) in correct)


def score(prediction: str, example: InstructionExample) -> dict[str, float]:
    """Every metric that applies to an example, each from 0 to 1.

    Raises:
        CorpusError: the example has no answers, or options that none of them is among.
    """
    if not example.answers:
        raise CorpusError(example.source, "has no answers to score with", "Expected `answers`")
    scores = {
        "exact_match": exact_match(prediction, example.answers),
        "f1": f1(prediction, example.answers),
        **rouge(prediction, example.answers),
    }
    if example.choices:
        scores["accuracy"] = accuracy(prediction, example)
    return scores
