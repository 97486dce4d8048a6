"""Counts of what was dropped and replaced during tokenization, in a side file of the dataset.

`<prefix>.counts.json` maps names to numbers. The names come from `read_part`,
`CorpusFiles.counts`, `Tokenizer.count_losses` and `make_dataset`. Other readers ignore the file,
and datasets made by other programs do not have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import read_json_object

#: Counts that are not losses; summaries omit them.
_PLAIN = ("files", "documents", "tokens")


def counts_path(prefix: Path) -> Path:
    """The side file of the dataset `prefix` (a path without .bin and .idx)."""
    return prefix.with_name(f"{prefix.name}.counts.json")


def write_counts(prefix: Path, counts: Mapping[str, int], names: Mapping[str, list[str]]) -> None:
    """Write the side file.

    Args:
        prefix: The dataset.
        counts: Numbers by name; zeros are omitted.
        names: Examples for some counts, such as the names of skipped files.
    """
    kept = {name: int(count) for name, count in sorted(counts.items()) if count}
    examples = {name: values for name, values in names.items() if values}
    write_json(counts_path(prefix), {**kept, **({"such_as": examples} if examples else {})})


def read_counts(prefix: Path) -> dict[str, Any]:
    """Read what `write_counts` wrote; empty if there is no side file.

    Raises:
        CorruptFileError: the file is damaged.
    """
    path = counts_path(prefix)
    return read_json_object(path) if path.is_file() else {}


def total(counts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Sum the counts of several corpora by name."""
    summed: Counter[str] = Counter()
    for each in counts:
        summed.update({name: number for name, number in each.items() if isinstance(number, int)})
    return dict(summed)


def loss_rows(counts: Mapping[str, Any]) -> dict[str, str]:
    """Summary rows for what was dropped and replaced, such as `empty documents` and its number."""
    rows = {
        name.replace("_", " "): str(number)
        for name, number in counts.items()
        if isinstance(number, int) and number and name not in _PLAIN
    }
    if counts.get("documents_without_id") == counts.get("documents"):
        rows.pop("documents without id", None)  # normal: most corpora have no ids at all
    return rows
