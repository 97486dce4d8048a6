"""Metrics of answers: exact match, F1, ROUGE, and accuracy for multiple-choice questions.

Exact match and F1 are SQuAD's (Rajpurkar et al. 2016): words are compared without case,
punctuation and articles, and the best of the accepted answers counts. `answer_text` defines words
in other scripts. `qa_legacy` computes the retired Retro's scores.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from retro_mcore.errors import CorpusError, MissingDependencyError
from retro_mcore.evaluation.answer_text import (
    answer_words,
    join_words,
    normal_form,
    rouge_words,
    words_with_articles,
)

if TYPE_CHECKING:
    from retro_mcore.data.instruction.examples import InstructionExample

ROUGE = ("rouge1", "rouge2", "rougeL")

# "(B)" anywhere, or "B", "B." or "B) …" at the beginning. Full-width forms normalize to these.
_LETTER = re.compile(r"\(([A-Z])\)|^\s*([A-Z])(?:\s*$|[.):\u3001\u3002])")


def normalize_answer(text: str) -> str:
    """Lower-case text without punctuation and articles, with single spaces between words.

    Characters of scripts without spaces between words are not separated.
    """
    return join_words(answer_words(text))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers after `normalize_answer`, else 0."""
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of words against the best-matching answer: harmonic mean of precision and recall."""
    words = answer_words(prediction)
    return max(_f1(words, answer_words(answer)) for answer in answers)


def _f1(words: list[str], expected: list[str]) -> float:
    if not words or not expected:  # nothing to find, and nothing found
        return float(words == expected)
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected))


def rouge(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin 2004): stemmed F-measures, each against its best answer.

    For ASCII texts these are rouge-score's own numbers. Its tokenizer ignores other scripts, so
    words come from `rouge_words`, with ASCII words stemmed.

    Raises:
        MissingDependencyError: rouge-score is not installed.
    """
    best = _rouge_scorer().score_multi(list(answers), prediction)
    return {name: best[name].fmeasure for name in ROUGE}


@cache
def _rouge_scorer() -> Any:
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependencyError(
            "rouge-score", "not installed", "Install retro-mcore[eval]"
        ) from error
    return RougeScorer(list(ROUGE), tokenizer=_StemmedWords(PorterStemmer()))


class _StemmedWords:
    """Tokenizer in the interface of rouge-score."""

    def __init__(self, stemmer: Any) -> None:
        self._stemmer = stemmer

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(word) for word in rouge_words(text)]

    def _stem(self, word: str) -> str:
        # As in rouge-score, only words of more than three letters.
        return self._stemmer.stem(word) if word.isascii() and len(word) > 3 else word


def chosen_option(text: str, choices: Sequence[str]) -> int | None:
    """Index of the option that a text names; None if it names none or several.

    An option is recognized by its exact text, by its words, by its letter, or as the only option
    contained in the text. Options with the same words ("C" and "C++", "1" and "-1") are
    distinguished by their exact text only. An option whose words are part of another's ("red" in
    "dark red") does not count inside the other.
    """
    said = _option_words(text)
    if not said:
        return None
    if (written := _written_option(text, said, choices)) is not None:
        return written
    letters = _LETTER.finditer(unicodedata.normalize("NFKC", text))
    numbers = {ord(match[1] or match[2]) - ord("A") for match in letters}
    if lettered := [number for number in numbers if number < len(choices)]:
        return lettered[0] if len(lettered) == 1 else None
    held = _held(answer_words(text), [answer_words(choice) for choice in choices])
    return held[0] if len(held) == 1 else None


def _written_option(text: str, said: list[str], choices: Sequence[str]) -> int | None:
    """Index of the option that equals the whole text."""
    written = _as_written(text)
    alike = [number for number, one in enumerate(choices) if _option_words(one) == said]
    same = [number for number in alike if _as_written(choices[number]) == written]
    if same:
        return same[0]
    differ = len({_as_written(choices[number]) for number in alike}) > 1
    return None if differ or not alike else alike[0]


def _as_written(text: str) -> str:
    """Normalized text without the punctuation mark at its end."""
    text = normal_form(text).strip()
    return text.rstrip(".!?\u3002") or text


def _option_words(text: str) -> list[str]:
    """Words of an option, or the option itself if it is only an article or punctuation."""
    rest = text.strip().casefold()
    return answer_words(text) or words_with_articles(text) or ([rest] if rest else [])


def _held(said: list[str], options: Sequence[list[str]]) -> list[int]:
    """Indexes of options whose words occur in the text, except inside a longer option."""
    spans = [
        (start, start + len(option), number)
        for number, option in enumerate(options)
        for start in range(len(said) - len(option) + 1)
        if option and said[start : start + len(option)] == option
    ]
    return sorted(
        {
            number
            for start, end, number in spans
            if not any(a <= start and end <= b and b - a > end - start for a, b, _ in spans)
        }
    )


def accuracy(prediction: str, example: InstructionExample) -> float:
    """1 if the prediction names an option that is an accepted answer, else 0.

    Raises:
        CorpusError: no answer is among the options.
    """
    return float(chosen_option(prediction, example.choices) in correct_options(example))


def correct_options(example: InstructionExample) -> set[int | None]:
    """Indexes of the options that the accepted answers name.

    Raises:
        CorpusError: they name none.
    """
    correct = {chosen_option(answer, example.choices) for answer in example.answers} - {None}
    if not correct:
        raise CorpusError(
            example.source,
            f"none of its answers {list(example.answers)} is an option",
            f"The options are {list(example.choices)}",
        )
    return correct


def check_scorable(example: InstructionExample) -> None:
    """Reject an example that cannot be scored, before its question is answered.

    Raises:
        CorpusError: the example has no answers, or none of them is among its options.
        MissingDependencyError: rouge-score is not installed.
    """
    score("", example)


def score(prediction: str, example: InstructionExample) -> dict[str, float]:
    """Compute every applicable metric of an example, each from 0 to 1.

    Raises:
        CorpusError: the example has no answers, or none of them is among its options.
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
