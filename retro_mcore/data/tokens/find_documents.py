"""Find documents by the ids of the corpus, or by dataset and number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retro_mcore.data.tokens.document_ids import DocumentIds
from retro_mcore.errors import ConfigurationError

#: Names that an error shows.
_NAMED = 5
#: A document's number, without leading zeros or signs.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def find_documents(
    names: Sequence[str], prefixes: Sequence[Path], sizes: Sequence[int], flag: str
) -> dict[str, np.ndarray]:
    """Find documents by name.

    A name is an id, which several documents may have, or DATASET:NUMBER.

    Args:
        names: Names of documents.
        prefixes: Paths of the datasets, without .bin and .idx.
        sizes: Number of documents of each dataset.
        flag: Where the names were given, for errors.

    Returns:
        For each name, dataset and document, i64 [documents, 2].

    Raises:
        ConfigurationError: a name is no document's, or could be either an id or a number.
        CorruptFileError: a file of ids is damaged.
    """
    by_id = _by_id(names, prefixes)
    by_number = _by_number(names, prefixes, sizes)
    unknown = [name for name in by_id if not len(by_id[name]) and name not in by_number]
    if unknown:
        without = [prefix.name for prefix in prefixes if DocumentIds.find(prefix) is None]
        note = f" ({', '.join(without)} has no ids)" if without else ""
        raise ConfigurationError(
            flag,
            f"{len(unknown)} of {len(by_id)} are no documents here, such as "
            f"{', '.join(unknown[:_NAMED])}{note}",
            "Give ids of the corpus, or DATASET:NUMBER, as inspect_neighbors shows both",
        )
    if both := [name for name in by_number if len(by_id[name])]:
        raise ConfigurationError(
            flag,
            f"{both[0]} is the id of a document and the number of another",
            "Give the number of the one that has the id",
        )
    return {name: by_number.get(name, found) for name, found in by_id.items()}


def _by_number(
    names: Sequence[str], prefixes: Sequence[Path], sizes: Sequence[int]
) -> Mapping[str, np.ndarray]:
    datasets = {prefix.name: number for number, prefix in enumerate(prefixes)}
    found = {}
    for name in names:
        dataset, _, number = name.rpartition(":")
        if dataset in datasets and _NUMBER.fullmatch(number):
            place = datasets[dataset]
            if int(number) < sizes[place]:
                found[name] = np.array([[place, int(number)]], np.int64)
    return found


def _by_id(names: Sequence[str], prefixes: Sequence[Path]) -> dict[str, np.ndarray]:
    wanted = {name.encode("utf-8", "replace"): name for name in names}
    found: dict[str, list[list[int]]] = {name: [] for name in names}
    for dataset, prefix in enumerate(prefixes):
        ids = DocumentIds.find(prefix)
        for document in () if ids is None else ids.matching(list(wanted)):
            assert ids is not None
            found[ids[document]].append([dataset, document])
    return {name: np.array(places, np.int64).reshape(-1, 2) for name, places in found.items()}
