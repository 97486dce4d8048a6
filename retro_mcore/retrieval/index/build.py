"""The steps that build a project's index: embed, train, add, merge.

Each can be run by itself, embed and add by any number of jobs in any order. What a step writes
depends on the project and the options alone, so the bytes are those of one run of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.distributed import broadcast_object, get_rank, raise_together
from retro_mcore.errors import ConfigurationError, CorruptFileError, ProjectError
from retro_mcore.project.config import read_json_object
from retro_mcore.project.markers import FileState, signed_write, state_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import Shard, ShardReport, Share, require_shards, run_shards
from retro_mcore.project.space import require_space, show_bytes
from retro_mcore.retrieval.database_build import read_dataset_infos
from retro_mcore.retrieval.index.choice import AUTO, IndexChoice, choose_index, usable_memory
from retro_mcore.retrieval.index.embeddings import Embeddings, read_held_out
from retro_mcore.retrieval.index.files import lists_path, load_index, load_parts, save_index
from retro_mcore.retrieval.index.filling import (
    add_part,
    cut_parts,
    merge_on_disk,
    merge_parts,
    stored_bytes,
)
from retro_mcore.retrieval.index.recall import Recall, RecallMeasure, read_exact, tune, write_exact
from retro_mcore.retrieval.index.training import (
    IndexKind,
    has_graph,
    kind_of,
    make_index,
    num_lists,
    train_index,
)


@dataclass
class IndexBuild:
    """What the steps share.

    Attributes:
        paths: The project.
        embedding_shards: Files of the database's embeddings.
        block_size: The project's rows per file.
        embed_fingerprint: What the embeddings are made from.
        fingerprint: What the index is made from.
        index: Faiss factory string, or "auto".
        memory: Bytes that the index may take; None: most of the machine's.
        recall: Recall@2 wanted.
        nprobe: Lists to search; None: measured.
        ef_search: Breadth of graph searches; None: measured.
        on_disk: Keep the lists in a file of their own.
        split: Keep the parts, and don't merge them.
        gpu: Train and add on GPUs.
        take_over: Takes over the trained index (of a string, signed with a fingerprint) of a
            database that this one was grown from; whether there was one.
    """

    paths: ProjectPaths
    embedding_shards: list[Shard]
    block_size: int
    embed_fingerprint: str
    fingerprint: str
    index: str = AUTO
    memory: int | None = None
    recall: float = 0.95
    nprobe: int | None = None
    ef_search: int | None = None
    on_disk: bool = False
    split: bool = False
    gpu: bool = False
    take_over: Callable[[str, str], bool] | None = None

    def __post_init__(self) -> None:
        self.embeddings = Embeddings(self.embedding_shards)

    @property
    def choice(self) -> IndexChoice | None:
        """The index that `train` chose, once it has."""
        if state_of(self.paths.index_choice, self.fingerprint) is not FileState.COMPLETE:
            return None
        return IndexChoice.load(self.paths.index_choice)

    def is_complete(self) -> bool:
        """Whether the index is there, merged (or split) and measured. All ranks call it."""
        complete: bool | None = None
        with raise_together():
            if get_rank() == 0:
                choice = self.choice
                complete = choice is not None and self._is_complete(choice)
        return bool(broadcast_object(complete))

    def _is_complete(self, choice: IndexChoice) -> bool:
        added = self.paths.added_index(choice.string)
        files = [self.paths.recall_report(choice.string)]
        files += [] if self.split else [added]
        files += [lists_path(added)] if choice.on_disk else []
        return all(state_of(file, self.fingerprint) is FileState.COMPLETE for file in files)

    def train(self) -> None:
        """Choose the index and train it, on rank 0.

        Raises:
            ProjectError: embeddings are missing.
            ConfigurationError: no index reaches what was asked, or Faiss cannot train it.
        """
        require_shards(self.embedding_shards, self.embed_fingerprint, self._mend("embed"))
        with raise_together():
            if get_rank() == 0 and self._trained() is None:
                self._choose_and_train()

    def _trained(self) -> Path | None:
        """The trained index, if it is there."""
        choice = self.choice
        if choice is None:
            return None
        empty = self.paths.empty_index(choice.string)
        return empty if state_of(empty, self.fingerprint) is FileState.COMPLETE else None

    def _choose_and_train(self) -> None:
        choice = self.choice or self._choose()
        empty = self.paths.empty_index(choice.string)
        if self.take_over and self.take_over(choice.string, self.fingerprint):
            index = load_index(empty)
        else:
            sampled = training_rows_of(self.paths)
            index = train_index(choice.string, self.embeddings, sampled, self.memory, self.gpu)
            with signed_write(empty, self.fingerprint) as temporary:
                save_index(index, temporary)
        choice = self._place(choice, index)
        with signed_write(self.paths.index_choice, self.fingerprint) as temporary:
            temporary.write_text(json.dumps(asdict(choice), indent=4), encoding="utf-8")

    def _choose(self) -> IndexChoice:
        if self.index != AUTO:
            make_index(self.index, self.embeddings.dimension)  # raises if it cannot be
            return IndexChoice(self.index, "as --index says", on_disk=self.on_disk)
        memory = self.memory or usable_memory()
        return choose_index(self.embeddings, memory, self.recall, self.on_disk)

    def _place(self, choice: IndexChoice, index: Any) -> IndexChoice:
        """On the disk where it was asked to be, or where memory cannot hold it."""
        kind, needed = kind_of(index), stored_bytes(index, len(self.embeddings))
        if self.split and kind is IndexKind.WHOLE:
            raise ConfigurationError(
                "--split-index", f"{choice.string} cannot be split", "Name one with lists"
            )
        if choice.on_disk or (needed > (self.memory or usable_memory()) and not self.split):
            if kind is not IndexKind.LISTS:
                raise ConfigurationError(
                    "--on-disk" if self.on_disk else "--index-memory",
                    f"{choice.string} takes {show_bytes(needed)} of memory",
                    "Name an index with lists, such as IVF1024,Flat, which can stay on the disk",
                )
            return IndexChoice(choice.string, choice.reason, needed, on_disk=not self.split)
        return IndexChoice(choice.string, choice.reason, choice.num_bytes or needed or None)

    def parts(self) -> list[Shard]:
        """The parts that the index is filled in, in order.

        Raises:
            ProjectError: it is not trained yet.
        """
        empty = self._trained()
        if empty is None:
            raise ProjectError(self.paths.index_choice, "no trained index", self._mend("train"))
        folder = self.paths.index_parts(self.choice.string)  # type: ignore[union-attr]
        kind = kind_of(load_index(empty))
        return cut_parts(folder, len(self.embeddings), kind, self.block_size)

    def add(self, share: Share | None = None) -> ShardReport:
        """Add vectors, a part per file, on all ranks; with `share`, those of one job.

        Beside each part its exact neighbors of the held-out queries are saved, for the recall.

        Raises:
            ProjectError: the index is not trained, or embeddings are missing.
        """
        with raise_together():
            parts = self.parts()
            parts = share.of(parts) if share else parts
            held_out = Shard(0, 0, self.paths.held_out)
        needed = {s.start: s for p in parts for s in self.embeddings.shards_of(p.start, p.end)}
        inputs = [held_out, *needed.values()]
        require_shards(inputs, self.embed_fingerprint, self._mend("embed"))
        queries = read_held_out(self.paths.held_out)
        trained = load_index(self.paths.empty_index(self.choice.string))  # type: ignore[union-attr]

        def build(part: Shard, path: Path) -> None:
            write_exact(self.embeddings, queries, part, exact_path(part), self.fingerprint)
            add_part(trained, self.embeddings, part, path, self.gpu)

        row_bytes = float(stored_bytes(trained, 1))
        return run_shards(parts, build, self.fingerprint, "add to index", row_bytes, exact_path)

    def merge(self) -> Recall:
        """One index of all parts (none where it is split), and its recall; all ranks call it.

        Raises:
            ProjectError: a part is missing.
        """
        with raise_together():
            parts = self.parts()
        require_shards(parts, self.fingerprint, self._mend("add"), exact_path)
        outcome: Recall | None = None
        with raise_together():
            if get_rank() == 0:
                outcome = self._merge(parts)
        return broadcast_object(outcome)  # type: ignore[return-value]

    def _merge(self, parts: list[Shard]) -> Recall:
        choice = self.choice
        assert choice is not None
        empty, added = (
            self.paths.empty_index(choice.string),
            self.paths.added_index(choice.string),
        )
        if self.split:
            index = load_parts(empty, parts)
        else:
            size = sum(part.path.stat().st_size for part in parts)
            require_space(added, size, "the index's vectors")
            merge = merge_on_disk if choice.on_disk else merge_parts
            merge(empty, parts, added, self.fingerprint)
            index = load_index(added, mapped=True)
        exact = read_exact([exact_path(part) for part in parts])
        queries = read_held_out(self.paths.held_out)
        measure = RecallMeasure(index, queries, exact, self.embeddings)
        lists, graph = num_lists(load_index(empty)), has_graph(load_index(empty))
        recall = tune(measure, lists, graph, self.recall, self.nprobe, self.ef_search)
        report = {
            **asdict(choice),
            "num_vectors": len(self.embeddings),
            **asdict(recall),
            "recall_wanted": self.recall,
        }
        path = self.paths.recall_report(choice.string)
        with signed_write(path, self.fingerprint) as temporary:
            temporary.write_text(json.dumps(report, indent=4), encoding="utf-8")
        return recall

    def _mend(self, step: str) -> str:
        return f"Run build_index --project-dir {self.paths.root} --stage {step} first"


def exact_path(part: Shard) -> Path:
    """Where the exact neighbors of the held-out queries among a part's rows lie."""
    return part.path.parent / "exact" / f"{part.path.stem}.hdf5"


def training_rows_of(paths: ProjectPaths) -> np.ndarray:
    """Rows of train.hdf5 that sampled.hdf5 holds: the first ones of each dataset."""
    rows, start = [], 0
    for info in read_dataset_infos(paths):
        rows.append(np.arange(start, start + info.n_chunks_sampled))
        start += info.n_chunks_train
    return np.concatenate(rows)


def read_recall(paths: ProjectPaths, index_string: str) -> Recall:
    """The recall that was measured when the index was built.

    Raises:
        CorruptFileError: the report holds something else.
    """
    path = paths.recall_report(index_string)
    report = read_json_object(path)
    try:
        values = {name: report[name] for name in Recall.__dataclass_fields__}
        values["at"] = {int(k): float(value) for k, value in values["at"].items()}
        return Recall(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        mend = f"Remove {path.name} and run build_index again"
        raise CorruptFileError(path, "is no report of a recall", mend) from error
