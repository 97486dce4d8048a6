"""The table that `evaluate_qa` prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from retro_mcore.data.instruction.cuts import PROMPT_CUTS
from retro_mcore.evaluation.bootstrap import Estimate
from retro_mcore.evaluation.qa_legacy import LegacyScores

_NAMES = {
    "exact_match": "exact match",
    "f1": "F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "accuracy": "accuracy",
}
_REPORTED = {
    **PROMPT_CUTS,
    "answers_cut": "answers ended by --max-new-tokens",
    "answers_empty": "answers empty",
    "options_not_named": "answers name no option",
}


def print_qa_table(
    num_questions: int,
    scores: Mapping[str, Mapping[str, Estimate]],
    difference: Mapping[str, Estimate],
    legacy: Mapping[str, LegacyScores],
    report: Mapping[str, Mapping[str, int]],
) -> None:
    """A column for each thing that the encoder read, and one for their difference if there is.

    Below it, what was cut, empty or not to be read, as far as there is any.
    """
    table = Table(
        title=f"evaluate_qa: {num_questions} questions, %",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("metric")
    for arm in scores:
        table.add_column(_arm_name(arm), justify="right")
    if difference:
        table.add_column("difference", justify="right")
    first = next(iter(scores.values()))
    for name in first:
        cells = [_show(values[name]) for values in scores.values()]
        if difference:
            cells.append(_show(difference[name], sign="+"))
        table.add_row(_NAMES[name], *cells)
    for name in ("exact_match", "precision", "recall", "f1") if legacy else ():
        cells = [f"{100 * getattr(values, name):.2f}" for values in legacy.values()]
        table.add_row(f"legacy {_NAMES.get(name, name)}", *cells)
    Console(markup=False, emoji=False).print(table)
    for arm, counts in report.items():
        found = [f"{count} {_REPORTED[name]}" for name, count in counts.items() if count]
        if found:
            print(f"{_arm_name(arm)}, of {num_questions} questions: {', '.join(found)}")


def _arm_name(arm: str) -> str:
    names = {"live": "live neighbors", "passages": "passages in the encoder", "none": "encoder off"}
    return names.get(arm, arm)


def _show(estimate: Estimate, sign: str = "") -> str:
    low, mean, high = (100 * value for value in (estimate.low, estimate.mean, estimate.high))
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
