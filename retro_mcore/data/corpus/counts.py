"""What was dropped and replaced while a corpus became tokens: a side file of counts.

`<prefix>.counts.json` holds a number for each name that `read_part`, `CorpusFiles.counts`,
`Tokenizer.count_losses` and `make_dataset` count under. Other readers know nothing of it; a dataset
that another program made has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import read_json_object

#: Counted, but no loss: a summary does not show them.
_PLAIN = ("files", "documents", "tokens")


def counts_path(prefix: Path) -> Path:
    """The side file of the dataset `prefix` (a path without .bin and .idx)."""
    return prefix.with_name(f"{prefix.name}.counts.json")


def write_counts(prefix: Path, counts: Mapping[str, int], names: Mapping[str, list[str]]) -> None:
    """Write the side file.

    Args:
        prefix: The dataset.
        counts: Numbers by name; zeros are left out.
        names: Examples of what was counted under a name, such as some of the files left out.
    """
    kept = {name: int(count) for name, count in sorted(counts.items()) if count}
    examples = {name: values for name, values in names.items() if values}
    write_json(counts_path(prefix), {**kept, **({"such_as": examples} if examples else {})})


def read_counts(prefix: Path) -> dict[str, Any]:
    """What `write_counts` wrote; empty where there is no side file.

    Raises:
        CorruptFileError: it is damaged.
    """
    path = counts_path(prefix)
    return read_json_object(path) if path.is_file() else {}


def total(counts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The sum over several corpora, by name."""
    summed: Counter[str] = Counter()
    for each in counts:
        summed.update({name: number for name, number in each.items() if isinstance(number, int)})
    return dict(summed)


def loss_rows(counts: Mapping[str, Any]) -> dict[str, str]:
    """Rows of a summary for what was dropped and replaced: `empty documents` to a number."""
    rows = {
        name.replace("_", " "): str(number)
        for name, number in counts.items()
        if isinstance(number, int) and number and name not in _PLAIN
    }
    if counts.get("documents_without_id") == counts.get("documents"):
        rows.pop("documents without id", None)  # no document has one, as in most corpora
    return rows
