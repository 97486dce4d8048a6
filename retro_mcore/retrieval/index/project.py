"""A project's finished index, as named by its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retro_mcore.distributed import get_rank, get_world_size
from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.markers import (
    digest_of,
    fingerprint_of,
    marker_path,
    verify,
    verify_size,
)
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import require_stage
from retro_mcore.project.shards import Shard, cut
from retro_mcore.retrieval.index.faiss_search import PartedIndex
from retro_mcore.retrieval.index.files import lists_path, load_index, load_parts
from retro_mcore.retrieval.index.filling import find_parts
from retro_mcore.retrieval.index.gpu import log_once, num_gpus, to_gpu_for_search
from retro_mcore.retrieval.index.list_order import ListOrderSearch, supports_list_order
from retro_mcore.retrieval.index.rescoring import (
    RescoredIndex,
    RescoredSharedIndex,
    log_if_in_vain,
)
from retro_mcore.retrieval.index.shared import SharedIndex
from retro_mcore.retrieval.index.training import kind_of
from retro_mcore.retrieval.index.vector_files import VectorFiles


class ProjectIndex:
    """The files of a project's index, and how to open it.

    Args:
        paths: The project.
        settings: Its settings.
        num_vectors: Chunks of its database.
        block_size: Its rows per file.

    Raises:
        ProjectError: build_index has not finished.
    """

    def __init__(
        self, paths: ProjectPaths, settings: ProjectSettings, num_vectors: int, block_size: int
    ) -> None:
        self._hint = f"Run build_index --project-dir {paths.root}"
        if settings.index_string is None or settings.embedder is None:
            raise ProjectError(paths.settings, "names no index", f"{self._hint} first")
        self._paths, self._settings, self._count = paths, settings, num_vectors
        self._block_size = block_size
        self._empty = paths.empty_index(settings.index_string)
        self._added = paths.added_index(settings.index_string)
        self._parts: list[Shard] = []
        if settings.index_split:
            require_stage(paths, self._empty, "build_index")
            folder = paths.index_parts(settings.index_string)
            kind = kind_of(load_index(self._empty))
            self._parts = find_parts(folder, num_vectors, kind, block_size, settings.growth)
        else:
            require_stage(paths, self._added, "build_index")

    @property
    def files(self) -> list[Path]:
        """The files of the index."""
        if self._parts:
            return [self._empty, *(part.path for part in self._parts)]
        lists = lists_path(self._added)
        return [self._added, lists] if lists.is_file() else [self._added]

    def digests(self) -> dict[str, str]:
        """Digests of the index's files, for a stage's inputs.

        Raises:
            CorruptFileError: a file is missing.
        """
        for file in self.files:
            verify_present(file, self._hint)
            # Otherwise its digest would differ, as if the index had been replaced.
            verify_size(file, f"{self._hint} again")
        if not self._parts and not marker_path(self._added).is_file():
            load_index(self._added, mapped=True)  # nothing else detects damage
        if self._parts:
            parts = fingerprint_of([digest_of(file) for file in self.files])
            return {self._paths.relative(self._parts[0].path.parent): parts}
        return {self._paths.relative(file): digest_of(file) for file in self.files}

    def vector_files(self) -> VectorFiles:
        """The vectors that the index was made from.

        Raises:
            ProjectError: they are not all there.
        """
        paths, settings = self._paths, self._settings
        hint = (
            f"Run build_index --project-dir {paths.root} --stage embed, with the options that the "
            "index was built with, or search without --rescore, which reads the stored vectors"
        )
        shards = cut(paths.embeddings, self._count, self._block_size, settings.growth)
        files = VectorFiles(paths, shards, hint, dimension=settings.embedding_dimension)
        files.require()
        return files

    def open(
        self,
        share: bool = False,
        k: int = 0,
        gpu: bool = False,
        rescore: bool = False,
        list_order: bool = False,
    ) -> Any:
        """Open the index memory-mapped, with the measured breadth of search.

        Args:
            share: If the index is in parts, open some on each rank, and search together.
            k: Number of neighbors to search; GPUs have a limit.
            gpu: Search on this rank's GPU if Faiss has one and the index fits.
            rescore: Sort the candidates by the distances of the stored vectors.
            list_order: Read each inverted list once per search, if it runs on the CPU.

        Raises:
            ProjectError: the index does not contain the database's chunks, or the stored vectors
                are missing.
            CorruptFileError: a file is damaged; if all ranks open all of it, on rank 0 only.
        """
        settings, together = self._settings, share and get_world_size() > 1
        breadth = settings.nprobe, settings.ef_search
        if self._parts:
            mine = self._parts[get_rank() :: get_world_size()] if together else self._parts
            for file in [self._empty, *(part.path for part in mine)]:
                verify(file, f"{self._hint} again")
            index = load_parts(self._empty, mine, *breadth)
            wanted = sum(part.end - part.start for part in mine)
        else:
            for file in self.files if get_rank() == 0 or not share else []:
                verify(file, f"{self._hint} again")
            index, wanted = load_index(self._added, *breadth, mapped=True), self._count
        for part in index.parts if isinstance(index, PartedIndex) else [index]:
            if settings.embedding_dimension not in (None, part.d):
                raise CorruptFileError(
                    self.files[-1],
                    f"holds vectors of dimension {part.d}, not {settings.embedding_dimension}",
                    f"{self._hint} again",
                )
        if index.ntotal != wanted:
            raise ProjectError(
                self._added,
                f"holds {index.ntotal} chunks, but the database {wanted}",
                f"{self._hint} again",
            )
        if gpu and num_gpus():
            if self._parts:
                log_once("search runs on the CPU: the index is split (--split-index)")
            else:
                index = to_gpu_for_search(index, k, settings.nprobe)
        if list_order and supports_list_order(index):
            index = ListOrderSearch(index)
        if together and self._parts:
            dimension = settings.embedding_dimension
            assert dimension is not None
            index = SharedIndex(index, self._count, dimension)
        if not rescore:
            return index
        log_if_in_vain(settings.index_string or "")
        kind = RescoredSharedIndex if isinstance(index, SharedIndex) else RescoredIndex
        return kind(index, self.vector_files().open(check=get_rank() == 0 or not share))


def verify_present(path: Path, hint: str) -> None:
    """Reject a missing file.

    Raises:
        ProjectError: the file is missing; `hint` says what to run.
    """
    if not path.is_file():
        raise ProjectError(path, "no such file", f"{hint} again")
