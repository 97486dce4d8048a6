"""The steps that build a project's index: embed, train, add, merge.

Each step can run by itself; embed and add can be divided among any number of jobs in any order. A
step's output depends only on the project and the options, so its bytes do not depend on how the
work was divided.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.distributed import broadcast_object, get_rank, raise_together
from retro_mcore.errors import ConfigurationError, CorruptFileError, ProjectError
from retro_mcore.host import return_freed_memory
from retro_mcore.project.config import read_json_object
from retro_mcore.project.markers import FileState, signed_write, state_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import Shard, ShardReport, Share, require_shards, run_shards
from retro_mcore.project.space import require_space, show_bytes
from retro_mcore.retrieval.dataset_infos import read_dataset_infos
from retro_mcore.retrieval.index.choice import AUTO, IndexChoice, choose_index, usable_memory
from retro_mcore.retrieval.index.embeddings import EmbeddingFiles, Embeddings, read_held_out
from retro_mcore.retrieval.index.files import lists_path, load_index, load_parts, save_index
from retro_mcore.retrieval.index.filling import (
    add_part,
    exact_path,
    extend_index,
    find_parts,
    merge_on_disk,
    merge_parts,
    stored_bytes,
)
from retro_mcore.retrieval.index.inherited import InheritedIndex
from retro_mcore.retrieval.index.list_order import supports_list_order
from retro_mcore.retrieval.index.recall import (
    Measure,
    Recall,
    RecallMeasure,
    read_exact,
    tune,
    write_exact,
)
from retro_mcore.retrieval.index.rescoring import log_if_in_vain
from retro_mcore.retrieval.index.training import (
    IndexKind,
    has_graph,
    kind_of,
    make_index,
    num_lists,
    train_index,
)

_LOG = logging.getLogger(__name__)
#: What reports of older versions lack.
_LATER = ("error", "in_list_order")


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """The requested index.

    Attributes:
        string: Faiss factory string, or "auto".
        memory: Bytes that the index may take; None: most of the machine's memory.
        recall: Target recall@2.
        nprobe: Lists to search; None: measured.
        ef_search: Breadth of graph searches; None: measured.
        on_disk: Keep the lists in a separate file.
        split: Keep the parts instead of merging them.
        gpu: Train and add on GPUs.
        rescore: Choose and measure the index for candidates that are sorted by the stored vectors.
    """

    string: str = AUTO
    memory: int | None = None
    recall: float = 0.95
    nprobe: int | None = None
    ef_search: int | None = None
    on_disk: bool = False
    split: bool = False
    gpu: bool = False
    rescore: bool = False


@dataclass(frozen=True)
class IndexBuild:
    """The steps of building one project's index.

    Attributes:
        paths: The project.
        embedded: Files of the database's embeddings.
        block_size: The project's rows per file.
        fingerprint: Fingerprint of the embeddings and options that the index is made from.
        wanted: The index to build.
        inherited: Index of the project that this one was extended from, if it may be reused.
        growth: Number of vectors before each extension of the database.
    """

    paths: ProjectPaths
    embedded: EmbeddingFiles
    block_size: int
    fingerprint: str
    wanted: IndexOptions
    inherited: InheritedIndex | None = None
    growth: Sequence[int] = ()

    @cached_property
    def embeddings(self) -> Embeddings:
        """The database's vectors."""
        return Embeddings(self.embedded.shards)

    @property
    def choice(self) -> IndexChoice | None:
        """The index that `train` chose; None before that."""
        if state_of(self.paths.index_choice, self.fingerprint) is not FileState.COMPLETE:
            return None
        return IndexChoice.load(self.paths.index_choice)

    def is_complete(self) -> bool:
        """Whether the index exists, merged or split, and is measured. All ranks call it."""
        complete: bool | None = None
        with raise_together():
            if get_rank() == 0:
                choice = self.choice
                complete = choice is not None and self._is_complete(choice)
        return bool(broadcast_object(complete))

    def _is_complete(self, choice: IndexChoice) -> bool:
        added = self.paths.added_index(choice.string)
        files = [self.paths.recall_report(choice.string)]
        files += [] if self.wanted.split else [added]
        files += [lists_path(added)] if choice.on_disk else []
        return all(state_of(file, self.fingerprint) is FileState.COMPLETE for file in files)

    def train(self) -> None:
        """Choose the index and train it, on rank 0.

        Raises:
            ProjectError: embeddings are missing.
            ConfigurationError: no index reaches the target recall, or Faiss cannot train it.
        """
        require_shards(self.embedded.shards, self.embedded.fingerprint, self._hint("embed"))
        with raise_together():
            if get_rank() == 0 and self._trained() is None:
                self._choose_and_train()

    def _trained(self) -> Path | None:
        """The trained index's file, if it exists."""
        choice = self.choice
        if choice is None:
            return None
        empty = self.paths.empty_index(choice.string)
        return empty if state_of(empty, self.fingerprint) is FileState.COMPLETE else None

    def _choose_and_train(self) -> None:
        choice = self.choice or self._choose()
        if self.wanted.rescore:
            log_if_in_vain(choice.string)
        empty = self.paths.empty_index(choice.string)
        inherited = self.inherited
        if inherited and inherited.link_trained_index(choice.string, self.fingerprint):
            index = load_index(empty)
        else:
            sampled, begun = training_rows_of(self.paths), time.monotonic()
            _LOG.info("train index: %s, %s", choice.string, choice.reason)
            index = train_index(
                choice.string, self.embeddings, sampled, self.wanted.memory, self.wanted.gpu
            )
            _LOG.info("train index: done in %.0f s", time.monotonic() - begun)
            with signed_write(empty, self.fingerprint) as temporary:
                save_index(index, temporary)
        choice = self._place(choice, index)
        with signed_write(self.paths.index_choice, self.fingerprint) as temporary:
            temporary.write_text(json.dumps(asdict(choice), indent=4), encoding="utf-8")

    def _choose(self) -> IndexChoice:
        wanted = self.wanted
        if wanted.string != AUTO:
            make_index(wanted.string, self.embeddings.dimension)  # raises if it cannot be built
            return IndexChoice(wanted.string, "as --index says", on_disk=wanted.on_disk)
        memory = wanted.memory or usable_memory()
        return choose_index(
            self.embeddings,
            memory,
            wanted.recall,
            wanted.on_disk,
            rescore=wanted.rescore,
            split=wanted.split,
            gpu=wanted.gpu,
        )

    def _place(self, choice: IndexChoice, index: Any) -> IndexChoice:
        """Put the index on disk if requested, or if it does not fit into memory."""
        wanted = self.wanted
        kind, needed = kind_of(index), stored_bytes(index, len(self.embeddings))
        if wanted.split and kind in (IndexKind.WHOLE, IndexKind.PACKED):
            raise ConfigurationError(
                "--split-index", f"{choice.string} cannot be split", "Name one with lists"
            )
        if choice.on_disk or (needed > (wanted.memory or usable_memory()) and not wanted.split):
            if kind is not IndexKind.LISTS:
                raise ConfigurationError(
                    "--on-disk" if wanted.on_disk else "--index-memory",
                    f"{choice.string} takes {show_bytes(needed)} of memory",
                    "Name an index with lists, such as IVF1024,Flat, which can stay on the disk",
                )
            return IndexChoice(choice.string, choice.reason, needed, on_disk=not wanted.split)
        return IndexChoice(choice.string, choice.reason, choice.num_bytes or needed or None)

    def parts(self) -> list[Shard]:
        """The parts of the index, in order.

        Raises:
            ProjectError: the index is not trained yet.
        """
        empty = self._trained()
        if empty is None:
            raise ProjectError(self.paths.index_choice, "no trained index", self._hint("train"))
        folder = self.paths.index_parts(self.choice.string)  # type: ignore[union-attr]
        kind = kind_of(load_index(empty))
        return find_parts(folder, len(self.embeddings), kind, self.block_size, self.growth)

    def add(self, share: Share | None = None) -> ShardReport:
        """Add vectors, one file per part, on all ranks; with `share`, only that job's parts.

        An extended index keeps its old parts. The exact neighbors of the held-out queries in each
        part are saved with it, to measure the recall.

        Raises:
            ProjectError: the index is not trained, or embeddings are missing.
        """
        with raise_together():
            parts = self.parts()
            parts = share.of(parts) if share else parts
            held_out = Shard(0, 0, self.paths.held_out)
        needed = {s.start: s for p in parts for s in self.embeddings.shards_of(p.start, p.end)}
        inputs = [held_out, *needed.values()]
        require_shards(inputs, self.embedded.fingerprint, self._hint("embed"))
        queries = read_held_out(self.paths.held_out)
        string = self.choice.string  # type: ignore[union-attr]
        trained = load_index(self.paths.empty_index(string))
        with raise_together():
            filled = self._inherit(parts, string, kind_of(trained))

        def build(part: Shard, path: Path) -> None:
            write_exact(self.embeddings, queries, part, exact_path(part), self.fingerprint)
            if filled is not None:
                extend_index(filled, self.embeddings, path)
            else:
                add_part(trained, self.embeddings, part, path, self.wanted.gpu)

        row_bytes = float(stored_bytes(trained, 1))
        return run_shards(parts, build, self.fingerprint, "add to index", row_bytes, exact_path)

    def _inherit(self, parts: list[Shard], string: str, kind: IndexKind) -> Path | None:
        """Link old parts, on rank 0. Returns the old index if it cannot be cut into parts."""
        if self.inherited is None:
            return None
        if kind is IndexKind.WHOLE:
            return self.inherited.filled_index(string)
        if get_rank() == 0:
            self.inherited.link_parts(parts, string, kind, self.fingerprint)
        return None

    def merge(self) -> Recall:
        """Merge the parts into one index unless it is split, and measure its recall.

        All ranks call it.

        Raises:
            ProjectError: a part is missing.
        """
        with raise_together():
            parts = self.parts()
        require_shards(parts, self.fingerprint, self._hint("add"), exact_path)
        outcome: Recall | None = None
        with raise_together():
            if get_rank() == 0:
                outcome = self._merge(parts)
        return broadcast_object(outcome)  # type: ignore[return-value]

    def _merge(self, parts: list[Shard]) -> Recall:
        choice = self.choice
        assert choice is not None
        index = self._join(choice, parts)
        recall = self._tune(choice, parts, index)
        report = {
            **asdict(choice),
            "num_vectors": len(self.embeddings),
            **asdict(recall),
            "recall_wanted": self.wanted.recall,
        }
        path = self.paths.recall_report(choice.string)
        with signed_write(path, self.fingerprint) as temporary:
            temporary.write_text(json.dumps(report, indent=4), encoding="utf-8")
        return recall

    def _join(self, choice: IndexChoice, parts: list[Shard]) -> Any:
        """The parts as one index: merged into a file, or opened together if it is split."""
        empty, added = self.paths.empty_index(choice.string), self.paths.added_index(choice.string)
        if self.wanted.split:
            return load_parts(empty, parts)
        size = sum(part.path.stat().st_size for part in parts)
        require_space(added, size, "the index's vectors")
        merge = merge_on_disk if choice.on_disk else merge_parts
        merge(empty, parts, added, self.fingerprint)
        return_freed_memory()  # as much as the index, which is mapped next
        return load_index(added, mapped=True)

    def _tune(self, choice: IndexChoice, parts: list[Shard], index: Any) -> Recall:
        """Measure the recall, and choose the breadth of search unless it was given."""
        queries = read_held_out(self.paths.held_out)
        exact = read_exact([exact_path(part) for part in parts], len(queries.rows))
        trained, wanted = load_index(self.paths.empty_index(choice.string)), self.wanted

        def measuring(list_order: bool) -> Measure:
            recall_of = RecallMeasure(
                index, queries, exact, self.embeddings, wanted.rescore, list_order
            )

            def measure(nprobe: int | None, ef_search: int | None) -> Recall:
                recall = recall_of(nprobe, ef_search)
                breadth = {"nprobe": nprobe, "efSearch": None if list_order else ef_search}
                named = "".join(f"{name} {value}, " for name, value in breadth.items() if value)
                how = "in list order, " if list_order else ""
                _LOG.info("measure index: %s%srecall@2 %.3f", how, named, recall.decisive)
                return recall

            return measure

        in_order = measuring(True) if supports_list_order(index) else None
        lists, graph = num_lists(trained), has_graph(trained)
        given = wanted.nprobe, wanted.ef_search
        return tune(measuring(False), lists, graph, wanted.recall, *given, in_order)

    def _hint(self, step: str) -> str:
        return f"Run build_index --project-dir {self.paths.root} --stage {step} first"


def training_rows_of(paths: ProjectPaths) -> np.ndarray:
    """Rows of train.hdf5 that sampled.hdf5 contains, the first ones of each dataset, i64 [rows]."""
    rows, start = [], 0
    for info in read_dataset_infos(paths):
        rows.append(np.arange(start, start + info.n_chunks_sampled))
        start += info.n_chunks_train
    return np.concatenate(rows)


def read_recall(paths: ProjectPaths, index_string: str) -> Recall:
    """The recall measured when the index was built.

    Raises:
        CorruptFileError: the report is malformed.
    """
    path = paths.recall_report(index_string)
    report = read_json_object(path)
    try:
        names = Recall.__dataclass_fields__
        values = {name: report[name] for name in names if name in report or name not in _LATER}
        values["at"] = {int(k): float(value) for k, value in values["at"].items()}
        return Recall(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        hint = f"Remove {path.name} and run build_index again"
        raise CorruptFileError(path, "is not a recall report", hint) from error
