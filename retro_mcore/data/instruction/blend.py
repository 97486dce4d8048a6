"""Parse instruction blends such as `--data-path 0.8 oasst 0.2 my_chats.jsonl`.

A name refers to `FOLDER/NAME/NAME_QA_train*.json` and `NAME_QA_dev.json`, the layout of the retired
Retro's blends. A path refers to that file.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.errors import ConfigurationError, CorpusError


@dataclass(frozen=True)
class BlendPart:
    """One dataset of a blend.

    Attributes:
        name: Dataset name, which selects the prompt; see `data.instruction.prompts`.
        weight: Sampling weight relative to the other datasets.
        train_files: Training files.
        valid_files: Validation files; may be empty.
    """

    name: str
    weight: float
    train_files: tuple[Path, ...]
    valid_files: tuple[Path, ...] = ()


def labels_of(parts: Sequence[BlendPart]) -> list[str]:
    """Label of each part: its name, or its first file if several parts share the name."""
    names = [part.name for part in parts]
    labels = [
        name if names.count(name) == 1 else str(part.train_files[0])
        for name, part in zip(names, parts, strict=True)
    ]
    # A blend may list a file twice.
    return [
        label if labels.count(label) == 1 else f"{label} ({place + 1})"
        for place, label in enumerate(labels)
    ]


def parse_blend(entries: Sequence[str], folder: Path | str = ".") -> list[BlendPart]:
    """Parse the parts of a blend.

    Args:
        entries: One name or path, or several, each preceded by a weight.
        folder: Base folder for names and relative paths.

    Raises:
        ConfigurationError: weights and names do not alternate.
        CorpusError: there are no such files.
    """
    if len(entries) == 1:
        return [_part(entries[0], 1.0, Path(folder))]
    if not entries or len(entries) % 2:
        raise ConfigurationError(
            "--data-path", f"{len(entries)} entries", "Give WEIGHT NAME, WEIGHT NAME, ..."
        )
    pairs = zip(entries[::2], entries[1::2], strict=True)
    return [_part(name, _weight(weight), Path(folder)) for weight, name in pairs]


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError as error:
        raise ConfigurationError(
            "--data-path", f"{text!r} stands where a weight is expected", "Give WEIGHT NAME pairs"
        ) from error
    if not 0 < weight < float("inf"):
        raise ConfigurationError("--data-path", f"weight {text}", "Give positive weights")
    return weight


def _part(name: str, weight: float, folder: Path) -> BlendPart:
    home = folder / name
    try:
        for file in (home, Path(name)):
            if file.is_file():
                return BlendPart(file.stem, weight, (file,))
        stem = glob.escape(home.name)
        train = tuple(sorted(home.glob(f"{stem}_QA_train*.json")))
        valid = tuple(home.glob(f"{stem}_QA_dev.json"))
    except OSError as error:  # for example a name that is not a valid file name
        raise CorpusError(
            f"--data-path {name[:200]}", f"{error.strerror}", "Name a file, or a dataset"
        ) from error
    if not train:
        raise CorpusError(
            f"--data-path {name}",
            f"is not a file, and {home} holds no {home.name}_QA_train*.json",
            "Name a JSON or JSONL file, or a dataset of --data-folder",
        )
    return BlendPart(home.name, weight, train, valid)
