"""Scores as computed by the retired Retro's `evaluate.py`, for comparison with its numbers.

Differences from `qa_metrics`:

- F1 (with precision and recall) uses only the first answer. It replaces punctuation with spaces,
  where exact match drops it.
- Questions without an answer are skipped.
- Exact match treats an `answer` that is a string as a list of its letters.
- A ground truth whose path contains "dev" is truncated to 3,000 questions.
- Too few predictions are not noticed, only too many.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.data.instruction.examples import read_records
from retro_mcore.errors import CorpusError
from retro_mcore.json_text import JsonError, json_lines, parse_json

_END_OF_TEXT = "<|endoftext|>"
# Removed from a prediction in this order before exact match.
_LEAD_INS = ("Answer:", "Answer: ", "????  ", "A: ", "A:")
_DEV_QUESTIONS = 3000
_PUNCTUATION = re.compile(r"""[!"#$%&()*+,-./:;<=>?@\[\]\\^`{|}~_']""")
_DROPPED = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class LegacyScores:
    """Means over questions, from 0 to 1."""

    exact_match: float
    precision: float
    recall: float
    f1: float


def legacy_scores(predictions: Sequence[str], ground_truth: Path | str) -> LegacyScores:
    """Score predictions against a test file.

    Args:
        predictions: One line of text per question, from `legacy_line`.
        ground_truth: The test file.

    Raises:
        CorpusError: a question without usable answers, or more predictions than questions.
    """
    path = Path(ground_truth)
    records = list(read_records(path))
    precision, recall, f1 = _f1_scores(predictions, records, path)
    return LegacyScores(_exact_match(predictions, records, path), precision, recall, f1)


def legacy_line(text: str) -> str:
    """Format a generated text as in the retired Retro's prediction file."""
    if _END_OF_TEXT in text:
        text = text[: text.find(_END_OF_TEXT)].strip()
    return text.replace("\n", " ")


def read_predictions(path: Path | str) -> list[str]:
    """Read a file of predictions: `pred` of each JSON line, or each line of text.

    Raises:
        CorpusError: the file cannot be read. Names the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        # With universal newlines, as for text files.
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(path, f"cannot be read ({error})", "Name a UTF-8 file") from error
    if path.suffix != ".jsonl":
        return text.removesuffix("\n").split("\n")
    return [_pred(f"{path}:{number}", line) for number, line in json_lines(data)]


def _pred(where: str, line: bytes) -> str:
    try:
        value = parse_json(line, allow_nan=True, unique_keys=True)
    except JsonError as error:
        raise CorpusError(where, f"not JSON ({error.in_line})", "Expected {'pred': …}") from error
    if not isinstance(value, dict) or not isinstance(value.get("pred"), str):
        raise CorpusError(where, "has no text under 'pred'", "Expected {'pred': …}")
    return value["pred"]


def _exact_match(
    predictions: Sequence[str], records: Sequence[Mapping[str, Any]], path: Path
) -> float:
    if "dev" in str(path):
        predictions, records = predictions[:_DEV_QUESTIONS], records[:_DEV_QUESTIONS]
    if len(predictions) > len(records):
        raise CorpusError(
            path, f"has {len(records)} questions", f"There are {len(predictions)} predictions"
        )
    matches = []
    for number, prediction in enumerate(predictions):
        said = _normalized(_without_lead_ins(prediction))
        answers = records[number].get("answers", records[number].get("answer"))
        if not isinstance(answers, (list, str)) or not answers:
            raise _unusable(path, number)
        if not all(isinstance(answer, str) for answer in answers):
            raise _unusable(path, number)
        matches.append(any(said == _normalized(answer) for answer in answers))
    return float(np.mean(matches))


def _normalized(text: str) -> str:
    """Normalize like SQuAD's program, which knows only ASCII punctuation."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROPPED)).split())


def _unusable(path: Path, number: int) -> CorpusError:
    return CorpusError(
        f"{path}, record {number}",
        "has no answers that legacy scoring can read",
        "Expected a list of texts under 'answers'",
    )


def _without_lead_ins(prediction: str) -> str:
    for words in _LEAD_INS:
        prediction = prediction.replace(words, "")
    return prediction.strip().replace(_END_OF_TEXT, "")


def _f1_scores(
    predictions: Sequence[str], records: Sequence[Mapping[str, Any]], path: Path
) -> tuple[float, float, float]:
    scores = []
    for number, (prediction, record) in enumerate(zip(predictions, records, strict=False)):
        answer = _first_answer(record, path, number)
        if answer:
            said = prediction.strip().replace(_END_OF_TEXT, "")
            scores.append(_precision_recall_f1(said, answer))
    precision, recall, f1 = np.mean(scores, axis=0) if scores else (np.nan,) * 3
    return float(precision), float(recall), float(f1)


def _first_answer(record: Mapping[str, Any], path: Path, number: int) -> str | None:
    """The answer used for F1; None if the question is skipped."""
    if "answers" in record:
        answers = record["answers"] or [None]
        if not isinstance(answers, list | str):
            raise _unusable(path, number)
    elif "answer" in record:
        answer = record["answer"]
        answers = answer if isinstance(answer, list) else [str(answer)]
    else:
        raise _unusable(path, number)
    first = answers[0] if answers else None
    if first is None:
        return None
    if isinstance(first, dict):
        first = first.get("text")
    if not isinstance(first, str):
        raise _unusable(path, number)
    first = first.strip()
    return None if first == "no_passages_used" else first


def _precision_recall_f1(prediction: str, answer: str) -> tuple[float, float, float]:
    said, expected = _words(prediction), _words(answer)
    common = sum((Counter(said) & Counter(expected)).values())
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(said), common / len(expected)
    return precision, recall, 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split()
