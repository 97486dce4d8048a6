"""Check that saved neighbors belong to the samples: same settings and same tokens.

Row i of the neighbors belongs to chunk i of the samples. A different seed, split, blend or corpus
gives different samples, possibly the same number of them. The search's settings are read from the
record of query_neighbors, or from the description that Megatron saves with its sample indexes.
Another program's directory that was moved without its cache has neither. Then the name of the
directory is checked, and that no neighbor comes from the sample's own documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokens.splits import parse_split
from retro_mcore.data.tokens.token_file import bin_path, idx_path
from retro_mcore.distributed import get_rank
from retro_mcore.errors import CorruptFileError, ProjectError, RetroError, raise_problems
from retro_mcore.project.config import ProjectConfig, ProjectSettings, Split, read_json_object
from retro_mcore.project.markers import checksum, fingerprint_of, read_marker
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.neighbor_tables import SavedNeighbors
from retro_mcore.samples.neighbor_noise import from_documents
from retro_mcore.samples.project_samples import GPTSamples

#: `train_<md5>`, followed by the digest of another database, if one is used.
_NAME = re.compile(r"(?P<split>train|valid|test)_(?P<hash>[0-9a-f]{32})(?P<tag>_[0-9a-f]{8})?")
#: `chunks_train` or `chunks_valid` of an aligned project, with such a digest.
_CHUNKS = re.compile(r"chunks_(?P<split>train|valid)(?P<tag>_[0-9a-f]{8})?")

#: Samples whose documents are compared with those of their neighbors.
_SAMPLES_TO_COMPARE = 256

# Settings that determine the samples and their order, and settings that determine their number.
_ORDER = (
    "retro_gpt_seed",
    "retro_gpt_split",
    "retro_gpt_data_path",
    "retro_gpt_seq_length",
    "retro_gpt_chunk_length",
)
_NUMBER = (
    "retro_gpt_train_samples",
    "retro_gpt_global_batch_size",
    "retro_gpt_eval_interval",
    "retro_gpt_eval_iters",
)


def check_neighbor_settings(
    paths: ProjectPaths, config: ProjectConfig, settings: ProjectSettings
) -> None:
    """Reject neighbors of another split, and neighbors that our search found for other settings or
    tokens.

    Runs before anything else is opened, so the changed setting is reported rather than its effects.

    Raises:
        ProjectError: a setting or file of the samples differs. Names it.
        SeveralErrors: more than one differs.
    """
    directories = config.neighbor_dirs(settings)
    raise_problems(list(_of_other_splits(paths, directories)))
    for split, directory in directories.items():
        record = _record(paths, directory)
        if record is not None:
            raise_problems(list(_differences_from_record(paths, config, split, directory, record)))


def _of_other_splits(paths: ProjectPaths, directories: Mapping[Split, str]) -> Iterator[RetroError]:
    """Problems of directories that belong to another split, according to their names."""
    seen: dict[str, Split] = {}
    for split, directory in directories.items():
        name = _match(Path(directory).name)
        owner = name["split"] if name else seen.setdefault(str(Path(directory)), split)
        if owner != split:
            yield CorruptFileError(
                paths.config,
                f"names query/{directory} for the {split} samples, the neighbors of {owner}",
                "Restore the file, or run query_neighbors again",
            )


def open_neighbors(
    paths: ProjectPaths, config: ProjectConfig, split: Split, database: ChunkDatabase
) -> SavedNeighbors:
    """Open the neighbors that config.json names for a split, one row per chunk of its samples.

    Args:
        paths: The project.
        config: Its configuration.
        split: One with neighbors.
        database: The database that was searched.

    Raises:
        CorruptFileError: neighbors of some samples are missing.
    """
    directory = paths.query / str(config.neighbor_dir(split))
    neighbors = SavedNeighbors(directory, len(database), database.removed)
    needed = config.num_samples(split) * config.chunks_per_sample
    if len(neighbors) != needed:
        raise CorruptFileError(
            neighbors.directory,
            f"holds neighbors of {len(neighbors)} chunks, the samples have {needed}",
            "Run query_neighbors again",
        )
    return neighbors


def check_neighbors(
    paths: ProjectPaths,
    config: ProjectConfig,
    samples: GPTSamples,
    neighbors: SavedNeighbors,
    database: ChunkDatabase,
) -> None:
    """Reject neighbors that another program searched for other samples.

    Args:
        paths: The project.
        config: The configuration that the samples were built with.
        samples: A split's samples.
        neighbors: From `open_neighbors`.
        database: The database that was searched.

    Raises:
        ProjectError: something differs. Names it.
        SeveralErrors: several things differ.
    """
    name = _NAME.fullmatch(neighbors.directory.name)
    if _record(paths, neighbors.directory.name) is not None:
        return
    if name is not None and name["hash"] == samples.description_hash:
        return
    description = _description(paths, name["hash"]) if name is not None else None
    if description is not None:
        raise_problems(list(_differences_from_description(paths, samples, description)))
    elif config.retro_database is None:
        _check_own_documents(paths, samples, neighbors, database)


def check_chunk_neighbors(
    paths: ProjectPaths, chunks: ChunkDatabase, neighbors: SavedNeighbors, database: ChunkDatabase
) -> None:
    """Reject neighbors of an aligned project's chunks that belong to other chunks.

    Args:
        paths: The project.
        chunks: Its own chunks, one of the merged databases.
        neighbors: Their neighbors.
        database: The database that was searched.

    Raises:
        ProjectError: the search was of another database, or neighbors come from a chunk's own
            document, which no search returns.
    """
    record = _record(paths, neighbors.directory.name) or {}
    name = paths.relative(chunks.path)
    searched = _mapping(record.get("inputs")).get(f"{name} (searched for)")
    if get_rank() == 0 and _is_another(chunks.path, searched):
        raise ProjectError(
            chunks.path,
            "is not the database that neighbors were searched for",
            f"Restore it, or run query_neighbors --project-dir {paths.root} in a new project",
        )
    if chunks.path.parent == database.path.parent:
        _check_own_chunks(chunks, neighbors, database)


def _check_own_chunks(
    chunks: ChunkDatabase, neighbors: SavedNeighbors, database: ChunkDatabase
) -> None:
    count = min(len(chunks), _SAMPLES_TO_COMPARE)
    rows = np.linspace(0, len(chunks) - 1, count).astype(np.int64)
    ids = np.asarray(neighbors.rows_at(rows), np.int64)
    own = database.documents(np.maximum(ids, 0)) == chunks.documents(rows)[:, None]
    if (own.all(axis=2) & (ids != NO_NEIGHBOR)).any():
        raise ProjectError(
            neighbors.directory,
            "holds neighbors of a chunk's own document, which no search returns",
            "Run query_neighbors again, or restore the directory",
        )


def _record(paths: ProjectPaths, directory: str) -> dict[str, Any] | None:
    """The record of the search; None if another program ran it."""
    record = paths.stage_record(stage_of_directory(directory))
    return read_json_object(record) if record.is_file() else None


def _match(directory: str) -> re.Match[str] | None:
    """The parts of a directory's name; None for names that our search does not give."""
    return _NAME.fullmatch(directory) or _CHUNKS.fullmatch(directory)


def stage_of_directory(directory: str) -> str:
    """Name of the record of the search that filled a directory under `query/`."""
    name = _match(directory)
    return f"query_neighbors{(name and name['tag']) or ''}"


def _of_another_search(
    paths: ProjectPaths, directory: str, record: Mapping[str, Any]
) -> Iterator[RetroError]:
    """Problems of files copied from another project with their markers, which look complete."""
    stage = stage_of_directory(directory)
    what = {
        "stage": stage,
        **{key: record.get(key) for key in ("options", "inputs")},
    }
    wanted = record.get("fingerprint") or fingerprint_of(what)
    for file in sorted((paths.query / directory).glob("*.hdf5")):
        marker = read_marker(file)
        if marker and marker.get("fingerprint") != wanted:
            yield CorruptFileError(
                file,
                f"was written by another search than stages/{stage}.json tells of",
                "Run query_neighbors again, or restore the directory",
            )
            return


def _differences_from_record(
    paths: ProjectPaths,
    config: ProjectConfig,
    split: Split,
    directory: str,
    record: Mapping[str, Any],
) -> Iterator[RetroError]:
    options, inputs = (_mapping(record.get(name)) for name in ("options", "inputs"))
    for key in _ORDER:
        if key in options and _meaning(key, options[key]) != _meaning(key, getattr(config, key)):
            yield _other_samples(paths.config, f"{key} is {getattr(config, key)}", options[key])
    then = replace(config, **{key: options[key] for key in _NUMBER if key in options})
    if then.num_samples(split) != config.num_samples(split):
        yield _other_samples(
            paths.config,
            f"{', '.join(_NUMBER)} ask for {config.num_samples(split)} {split} samples",
            f"{then.num_samples(split)}",
        )
    # One rank reads them and sends the result to the others.
    if get_rank() == 0:
        yield from _of_another_search(paths, directory, record)
    for prefix in config.blend[1] if get_rank() == 0 else ():
        files = [path(paths.data / prefix) for path in (bin_path, idx_path)]
        changed = [file for file in files if _is_another(file, inputs.get(paths.relative(file)))]
        if changed:
            yield _other_samples(changed[0], "holds other tokens", "those that it held then")


def _is_another(file: Path, searched: object) -> bool:
    if searched is None or not file.is_file():
        return False
    marker = read_marker(file)
    if marker is not None:  # whether it is valid is checked when the file is opened
        return "sha256" in marker and marker["sha256"] != searched
    # Other programs record no checksums of tokens, and the tokens are not read to compute them.
    return file.suffix == ".idx" and checksum(file) != searched


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _differences_from_description(
    paths: ProjectPaths, samples: GPTSamples, then: Mapping[str, Any]
) -> Iterator[RetroError]:
    mine, theirs = _outline(json.loads(samples.description)), _outline(then)
    for key in mine:
        if mine[key] != theirs[key]:
            yield _other_samples(paths.config, f"{key} is {mine[key]}", theirs[key])


def _outline(description: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that determine the samples, normalized and without the project's location."""
    datasets = [_mapping(dataset) for dataset in description.get("datasets", ())]
    keys = ("num_samples", "random_seed", "sequence_length", "split_matrix")
    return {
        "dataset": [Path(str(dataset.get("dataset_path"))).name for dataset in datasets],
        "weights": description.get("weights"),
        **{key: [dataset.get(key) for dataset in datasets] for key in keys},
    }


def _other_samples(subject: Path, now: str, then: object) -> ProjectError:
    return ProjectError(
        subject,
        f"{now}, but the neighbors are those of other samples: they were searched with {then}",
        "Put back what was changed, or build a project of its own for it",
    )


def _meaning(key: str, value: Any) -> object:
    """A setting's value, independent of its notation."""
    try:
        if key == "retro_gpt_split":
            return parse_split(str(value))
        if key == "retro_gpt_data_path":
            entries = [str(entry) for entry in value]
            pairs = entries if len(entries) > 1 else ["1", *entries]
            weights = np.array([float(weight) for weight in pairs[::2]])
            return [*np.round(weights / weights.sum(), 12)], pairs[1::2]
    except (RetroError, TypeError, ValueError):
        return value
    return value


def _description(paths: ProjectPaths, digest: str) -> dict[str, Any] | None:
    """Megatron's description of the samples with hash `digest`, if it still exists."""
    for file in sorted(paths.data.rglob(f"{digest}-BlendedDataset-*description.txt")):
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(description, dict):
            return description
    return None


def _check_own_documents(
    paths: ProjectPaths, samples: GPTSamples, neighbors: SavedNeighbors, database: ChunkDatabase
) -> None:
    per_sample = len(neighbors) // max(len(samples), 1)
    count = min(len(samples), _SAMPLES_TO_COMPARE)
    for index in np.linspace(0, len(samples) - 1, count).astype(int).tolist():
        _, dataset, documents = samples.read(index)
        ids = np.asarray(neighbors.rows(index * per_sample, (index + 1) * per_sample), np.int64)
        ids = ids[(ids != NO_NEIGHBOR) & (ids < len(database))]
        if from_documents(database, ids, dataset, documents).any():
            raise ProjectError(
                neighbors.directory,
                f"sample {index} has neighbors of its own documents here, which no search returns: "
                "they were searched for other samples",
                f"Put {paths.config.name} and the tokens back as they were for the search",
            )
