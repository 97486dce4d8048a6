"""Remove documents from the database that a project retrieves from (`update_db --remove`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_mcore.data.tokens.find_documents import find_documents
from retro_mcore.data.tokens.token_file import open_token_files
from retro_mcore.distributed import barrier, get_rank, on_first_rank, raise_together
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.dataset_infos import read_dataset_infos
from retro_mcore.retrieval.removed import (
    add_removed,
    find_removed,
    lineage,
    removed_documents,
    union,
)
from retro_mcore.samples.project_samples import build_gpt_samples, numbers_in_database

_LOG = logging.getLogger(__name__)
_FLAG = "--remove"


@dataclass(frozen=True)
class RemovalReport:
    """Documents that were named, and what holds them.

    Attributes:
        num_named: Documents that the names stand for.
        num_removed: Documents removed by this run.
        num_chunks: Chunks of these in the database.
        num_before: Documents that had been removed before.
        num_held_out: Held-out documents, which no database holds.
        num_train_samples: Training samples that contain text of any of these documents. They stay
            as they are.
        all_train_samples: Training samples of the project.
    """

    num_named: int
    num_removed: int
    num_chunks: int
    num_before: int
    num_held_out: int
    num_train_samples: int
    all_train_samples: int


def read_names(names: Sequence[str], file: str | None) -> list[str]:
    """The names of documents that were given, each once.

    Args:
        names: Names.
        file: A file with one per line; blank lines are skipped.

    Raises:
        ConfigurationError: the file cannot be read, is not UTF-8 or holds no names.
    """
    lines: list[str] = []
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            hint = "Give a text file with one id per line"
            raise ConfigurationError(f"--remove-file {file}", reason, hint) from error
        lines = [line for line in text.split("\n") if line.strip()]
        lines = [line.removesuffix("\r") for line in lines]
        if not lines:
            raise ConfigurationError(f"--remove-file {file}", "names no documents", "Name some")
    return list(dict.fromkeys([*names, *lines]))


def remove_documents(paths: ProjectPaths, names: Sequence[str]) -> RemovalReport:
    """Mark documents as removed, on all ranks; from then on nothing retrieves them.

    The caller holds the project's lock. Saved neighbors are searched again afterwards.

    Args:
        paths: The project.
        names: Ids of the corpus, or DATASET:NUMBER.

    Raises:
        ConfigurationError: a name is no document's, or all of the database would be removed.
        ProjectError: the project retrieves from another project's database.
    """
    config = ProjectConfig.load(paths.root)
    source = config.database_paths(paths.root)
    with raise_together():
        _require_own(paths, source)
        database = ChunkDatabase.open(source.root, own=True)
    documents = on_first_rank(lambda: _find(source, names))
    with raise_together():
        trained = _in_database(source, documents)
        before = removed_documents(source)
        now = union(before, trained)
        gone = find_removed(database.chunks, now)
        if gone is not None and len(gone) == len(database):
            raise ConfigurationError(_FLAG, "leaves no chunks to retrieve", "Keep some documents")
    with raise_together():  # all ranks have read what was removed before
        if get_rank() == 0:
            _mark(paths, source, trained)
    barrier()
    samples = build_gpt_samples(config, paths, "train")
    with raise_together():
        numbers = numbers_in_database(paths, config, source)
        own = {
            mine: documents[documents[:, 0] == number, 1]
            for mine, number in enumerate(numbers)
            if (documents[:, 0] == number).any()
        }
        new = _difference(trained, before)
        chunks = find_removed(database.chunks, new)
        return RemovalReport(
            num_named=len(documents),
            num_removed=len(new),
            num_chunks=0 if chunks is None else len(chunks),
            num_before=len(trained) - len(new),
            num_held_out=len(documents) - len(trained),
            num_train_samples=0 if samples is None else samples.num_containing(own),
            all_train_samples=0 if samples is None else len(samples),
        )


def _require_own(paths: ProjectPaths, source: ProjectPaths) -> None:
    if _is_within(source, paths):
        return
    raise ProjectError(
        paths.config,
        f"retrieves from the database of {source.root}, which other projects may use too",
        f"Run update_db --project-dir {source.root} --remove, then update_db --project-dir "
        f"{paths.root} --exchange {source.root}",
    )


def _find(source: ProjectPaths, names: Sequence[str]) -> np.ndarray:
    """The named documents, dataset and number, i64 [documents, 2], sorted."""
    config = ProjectConfig.load(source.root)
    prefixes = [source.data / prefix for prefix in config.blend[1]]
    sizes = [len(file) for file in open_token_files(config, source)]
    return union(*find_documents(names, prefixes, sizes, _FLAG).values())


def _in_database(source: ProjectPaths, documents: np.ndarray) -> np.ndarray:
    """Those of the documents that belong to the database, not to the held-out ones."""
    ends = np.array([info.n_docs_train for info in read_dataset_infos(source)])
    return documents[documents[:, 1] < ends[documents[:, 0]]]


def _difference(documents: np.ndarray, others: np.ndarray) -> np.ndarray:
    known = set(map(tuple, others.tolist()))
    kept = [pair for pair in documents.tolist() if tuple(pair) not in known]
    return np.array(kept, np.int64).reshape(-1, 2)


def _mark(paths: ProjectPaths, source: ProjectPaths, documents: np.ndarray) -> None:
    """Mark documents in the database in use and in those that it was made from, on rank 0.

    So they do not come back if the project returns to an earlier database. The oldest comes first:
    databases made from it read its marks, so that one write removes its documents from all.
    """
    marked = [each for each in lineage(source) if _is_within(each, paths)]
    for each in reversed(marked):
        held = len(ProjectConfig.load(each.root).blend[1])
        add_removed(each, documents[documents[:, 0] < held])
    _report_unreached(paths, {each.root.resolve() for each in marked})


def _report_unreached(paths: ProjectPaths, marked: set[Path]) -> None:
    """Warn of a project's other databases that read none of the marked ones' files."""
    databases = [paths, *map(ProjectPaths, sorted(paths.grown("").glob("*")))]
    unreached = [
        str(each.root)
        for each in databases
        if each.written_config.is_file()
        and marked.isdisjoint(older.root.resolve() for older in lineage(each))
    ]
    if unreached:
        _LOG.warning(
            "The documents are not removed from %s: it was not made from the database in use, or "
            "one in between is gone. Run --remove again after an --exchange to it",
            ", ".join(unreached),
        )


def _is_within(source: ProjectPaths, paths: ProjectPaths) -> bool:
    """Whether a database belongs to a project, however its path is written."""
    return source.root.resolve().is_relative_to(paths.root.resolve())
