"""Counts of documents and chunks per dataset, stored with the chunk database."""

from __future__ import annotations

from dataclasses import dataclass

from retro_mcore.errors import CorruptFileError
from retro_mcore.project.config import read_json_list
from retro_mcore.project.markers import verify
from retro_mcore.project.paths import ProjectPaths


@dataclass
class DatasetInfo:
    """One entry of db/indexed_dataset_infos.json."""

    ratio: float
    prefix: str
    n_docs: int
    n_docs_train: int
    n_chunks: int = 0
    n_chunks_train: int = 0
    n_chunks_invalid: int = 0
    n_chunks_sampled: int = 0


def read_dataset_infos(paths: ProjectPaths) -> list[DatasetInfo]:
    """Read db/indexed_dataset_infos.json, one entry per dataset.

    Raises:
        CorruptFileError: the file is missing, or holds impossible values.
    """
    path, hint = paths.dataset_infos, f"Run build_db --project-dir {paths.root} again"
    if not path.is_file():
        raise CorruptFileError(path, "no such file", hint)
    verify(path, hint)
    try:
        infos = [DatasetInfo(**values) for values in read_json_list(path)]
    except (TypeError, CorruptFileError) as error:
        found = "lacks a key, or has an unknown one"
        if isinstance(error, CorruptFileError):
            found = error.found
        raise CorruptFileError(path, found, hint) from error
    for info in infos:
        counts = [value for name, value in vars(info).items() if name.startswith("n_")]
        whole = all(type(count) is int and count >= 0 for count in counts)
        if not whole or not info.n_chunks_sampled <= info.n_chunks_train <= info.n_chunks:
            raise CorruptFileError(path, f"the counts of {info.prefix!r} are impossible", hint)
    return infos
