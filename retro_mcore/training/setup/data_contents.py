"""Compare a run's data by content, so that it is not resumed on other data of the same name.

A project or dataset may be moved; only its bytes matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_mcore.data.instruction.blend import BlendPart
from retro_mcore.data.tokens.token_file import bin_path, idx_path
from retro_mcore.errors import CheckpointError, ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import fingerprint_of, marker_path
from retro_mcore.project.paths import ProjectPaths

_BLOCK = 1 << 16


@dataclass(frozen=True)
class DatasetContents:
    """One dataset of a blend.

    Attributes:
        name: Name used in messages.
        weight: Weight in the blend.
        files: Name to `quick_digest`, in the order in which they are read.
        name_matters: Whether the name affects the samples (wording of the prompts).
    """

    name: str
    weight: float
    files: dict[str, str]
    name_matters: bool = False


@dataclass(frozen=True)
class DataContents:
    """Contents of a run's samples.

    Attributes:
        datasets: The blend.
        neighbors: Digest of the neighbor files; None without retrieval from a project.
    """

    datasets: tuple[DatasetContents, ...]
    neighbors: str | None = None

    def record(self) -> dict[str, Any]:
        """The entry in a checkpoint's arguments."""
        datasets = [
            {"name": dataset.name, "weight": dataset.weight, "files": dataset.files}
            for dataset in self.datasets
        ]
        return {"datasets": datasets, "neighbors": self.neighbors}

    def differences(self, saved: Mapping[str, Any], checkpoint: Path) -> Iterator[CheckpointError]:
        """Differences from a checkpoint's contents that prevent resuming.

        Args:
            saved: Its `record`.
            checkpoint: Its directory.
        """
        before = saved["datasets"]
        if len(before) != len(self.datasets):
            names = [", ".join(d["name"] for d in before), ", ".join(d.name for d in self.datasets)]
            yield _other_data(checkpoint, f"the datasets {names[0]}, and now they are {names[1]}")
            return
        for mine, theirs in zip(self.datasets, before, strict=True):
            if [*mine.files.values()] != [*theirs["files"].values()]:
                yield _other_data(checkpoint, f"another {_changed(mine, theirs)}")
            elif mine.name_matters and mine.name != theirs["name"]:
                yield _other_data(checkpoint, f"{mine.name} under the name {theirs['name']}")
            if abs(mine.weight - theirs["weight"]) > 1e-9:
                yield _other_data(
                    checkpoint, f"{mine.name} by {theirs['weight']:g}, and now by {mine.weight:g}"
                )


def _changed(mine: DatasetContents, theirs: Mapping[str, Any]) -> str:
    pairs = zip(mine.files.items(), theirs["files"].values(), strict=False)
    changed = [name for (name, digest), before in pairs if digest != before]
    # A changed .bin usually has a changed .idx; a dataset may also have more or fewer files.
    return changed[0] if changed else mine.name


def _other_data(checkpoint: Path, what: str) -> CheckpointError:
    return CheckpointError(
        str(checkpoint),
        f"was trained on {what}",
        "Restore the data, or train on it with another --save (--finetune keeps the weights)",
    )


def contents_of_project(config: ProjectConfig, paths: ProjectPaths) -> DataContents:
    """Contents of a project's training samples.

    Raises:
        ProjectError: a file is missing.
    """
    weights, prefixes = config.blend
    files = [[path(paths.data / prefix) for path in (bin_path, idx_path)] for prefix in prefixes]
    directory = config.neighbor_dirs(ProjectSettings.load(paths.root)).get("train")
    neighbors = None if directory is None else _files_digest(paths.query / directory)
    return DataContents(_datasets(prefixes, weights, files), neighbors)


def contents_of_blend(parts: Sequence[BlendPart]) -> DataContents:
    """Contents of the files used in instruction tuning.

    Raises:
        ProjectError: a file is missing.
    """
    names, weights = [part.name for part in parts], [part.weight for part in parts]
    return DataContents(_datasets(names, weights, [part.train_files for part in parts], True))


def _datasets(
    names: Sequence[str],
    weights: Sequence[float],
    files: Sequence[Sequence[Path]],
    name_matters: bool = False,
) -> tuple[DatasetContents, ...]:
    return tuple(
        DatasetContents(
            name,
            weight / sum(weights),
            {file.name: quick_digest(file) for file in of_dataset},
            name_matters,
        )
        for name, weight, of_dataset in zip(names, weights, files, strict=True)
    )


def quick_digest(path: Path, blocks: int = 1024) -> str:
    """Digest of a file's size and bytes; for a large file, of evenly spaced blocks.

    Args:
        path: The file.
        blocks: Maximum number of blocks of 64 KiB to read.

    Raises:
        ProjectError: the file does not exist.
    """
    if not path.is_file():
        raise ProjectError(path, "no such file", "Restore it")
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in _block_starts(size, blocks):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _block_starts(size: int, blocks: int) -> Iterable[int]:
    if size <= _BLOCK * blocks:
        return range(0, size, _BLOCK)
    return ((size - _BLOCK) * block // (blocks - 1) for block in range(blocks))


def _files_digest(directory: Path) -> str:
    """Digest of the files' names, sizes and, where they have markers, checksums."""
    files = sorted(directory.glob("*.hdf5"))
    markers = [marker_path(file) for file in files]
    read = [marker.read_bytes().hex() if marker.is_file() else "" for marker in markers]
    return fingerprint_of(
        [[file.name, file.stat().st_size, text] for file, text in zip(files, read, strict=True)]
    )
