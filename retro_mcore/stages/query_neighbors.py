"""Search the neighbors of every training, validation and test chunk, and save them.

The chunks are those of the samples, or in an aligned project those of the merged databases, which
all samples consist of; see `query_tables`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.distributed import (
    barrier,
    get_rank,
    initialize,
    is_first_on_host,
    raise_together,
)
from retro_mcore.errors import ConfigurationError, ProjectError, raise_problems, too_small
from retro_mcore.platform import choose_device
from retro_mcore.project.config import SPLITS, OtherDatabase, ProjectConfig, ProjectSettings, Split
from retro_mcore.project.integrity import verifying
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import (
    check_stage,
    finish_stage,
    recorded_fingerprint,
    recorded_inputs,
    recorded_options,
)
from retro_mcore.project.shards import ShardReport, cut
from retro_mcore.retrieval.embedders.precision import Precision
from retro_mcore.retrieval.index.gpu import log_once, num_gpus
from retro_mcore.retrieval.index.list_order import (
    TOGETHER,
    has_lists,
    obstacle,
    queries_together,
)
from retro_mcore.retrieval.neighbor_search import (
    NeighborSearch,
    count_queried,
    narrow_candidates,
    query_split,
)
from retro_mcore.retrieval.project_search import ProjectSearch, open_search
from retro_mcore.retrieval.query_chunks import ChunkEmbedder, QueryCounts
from retro_mcore.retrieval.removed import INPUT
from retro_mcore.retrieval.rerank import save_token_counts
from retro_mcore.samples.project_samples import numbers_in_database, remove_truncated_cache
from retro_mcore.stages.configuration import Project, project_paths
from retro_mcore.stages.cut_chunks import warn_of_cut_chunks
from retro_mcore.stages.embedding_choice import Batches, explicit_precision
from retro_mcore.stages.extended_search import ORDER, OldNeighbors, find_old_neighbors
from retro_mcore.stages.previous_search import PreviousNeighbors, find_previous_neighbors
from retro_mcore.stages.query_options import (
    database_digests,
    is_begun,
    options_of,
    possible_batches,
)
from retro_mcore.stages.query_tables import QueryTable, database_tables, sample_tables
from retro_mcore.stages.stored_vectors import held_out_vectors
from retro_mcore.time_limit import DataTimeLimit

STAGE = "query_neighbors"
_LEAST = {
    "num_neighbors_query": 1,
    "num_neighbors_save": 1,
    "embed_batch_size": 1,
    "embed_batch_tokens": 1,
}


@dataclass(kw_only=True)
class QueryNeighborsConfig(DataTimeLimit):
    """Configuration of `query_neighbors`."""

    num_neighbors_query: int | None = None
    """Candidates to search per chunk, before those from the sample's own documents are dropped.
    More are searched if too few are left (default: 200, or all of a smaller database)."""
    num_neighbors_save: int = 20
    """Neighbors to save per chunk."""
    rerank: Literal["bm25"] | None = None
    """Rerank the candidates by BM25 over their tokens before the best are saved."""
    rescore: bool = False
    """Sort the candidates by the distances of the stored vectors, so that a compressed index gives
    the exact order. Reads the embeddings of build_index (default: only if build_index was run with
    --rescore)."""
    embed_batch_size: int | None = None
    """Chunks per forward pass of the embedder (default: the search's own if it was begun before,
    otherwise as the database was embedded, in chunks or in tokens). "static" and "lexical" have
    none."""
    embed_batch_tokens: int | None = None
    """Tokens per forward pass of the embedder, padding included, instead of a number of chunks."""
    embed_precision: Precision | None = None
    """Precision of the embedder: fp32, fp16, bf16 or int8 (default: as the database was embedded);
    see build_index."""
    embed_fp16: bool = False
    """The same as --embed-precision fp16."""
    device: str = "auto"
    """Device of the embedder: auto, cpu or cuda."""
    faiss_gpu: bool = True
    """Search on GPUs if Faiss supports them."""
    verify: bool = False
    """Verify the checksums of all files that are read, however large (default: up to 8 GiB per
    process)."""


@dataclass(frozen=True)
class QueryNeighborsReport:
    """The result of `run`, per split that has samples.

    In an aligned project "train" and "valid" are the merged databases; "valid" holds all held-out
    documents.

    Attributes:
        config: The configuration of the run.
        reports: Files that were built or reused.
        num_chunks: Number of chunks whose neighbors were searched.
        counts: What happened to the chunks.
        num_candidates: Candidates searched per chunk.
        max_tokens: Maximum number of tokens that the embedder reads; None: no limit.
        num_searched: Number of new chunks that were searched, where neighbors among the old ones
            were known; None: all chunks were searched.
        num_again: Number of chunks that were searched again, because they had removed neighbors;
            None: all were searched.
    """

    config: QueryNeighborsConfig
    reports: dict[Split, ShardReport]
    num_chunks: dict[Split, int]
    counts: dict[Split, QueryCounts]
    num_candidates: int
    max_tokens: int | None
    num_searched: int | None = None
    num_again: int | None = None


def run(project: Project, config: QueryNeighborsConfig) -> QueryNeighborsReport:
    """Fill query/ of a project and name its directories in config.json, on all ranks together.

    Args:
        project: Project directory, after build_index.
        config: Configuration of this stage.

    Raises:
        ProjectError: an earlier stage has not run, the neighbors were searched with other options,
            another run works on the project, or the disk is full.
        CorruptFileError: the database or the index is damaged.
    """
    initialize(
        timeout_minutes=config.distributed_timeout_minutes,
        stall_minutes=config.stall_timeout_minutes,
    )
    paths = project_paths(project)
    with stage_lock(paths, STAGE):
        return _run(paths, config, None)


def query_other_database(
    project: Project, config: QueryNeighborsConfig, other: Project
) -> QueryNeighborsReport:
    """Search the samples' neighbors in another project's database, and switch to it at the end.

    The caller holds the project's lock. The neighbors that the project used before are kept. They
    stay in use until one write of config.json names the new neighbors and their database together.

    Args:
        project: Project directory, after query_neighbors.
        config: Configuration of this stage.
        other: The project whose database is searched, after build_index.

    Raises:
        ProjectError: as for `run`.
    """
    return _run(project_paths(project), config, project_paths(other))


def follow_removal(
    project: Project, config: QueryNeighborsConfig, other: Project, found_in: Project
) -> QueryNeighborsReport:
    """Search again after documents were removed, but only chunks whose neighbors were removed.

    As `query_other_database`, which it is where the current neighbors cannot be used.

    Args:
        project: Project directory, after query_neighbors.
        config: Configuration of this stage.
        other: The project whose database is searched; the project itself for its own.
        found_in: The project whose database the current neighbors were found in: `other`, or the
            one that it was compacted from.

    Raises:
        ProjectError: as for `run`.
    """
    return _run(project_paths(project), config, project_paths(other), project_paths(found_in))


def _run(
    paths: ProjectPaths,
    config: QueryNeighborsConfig,
    other: ProjectPaths | None,
    found_in: ProjectPaths | None = None,
) -> QueryNeighborsReport:
    with verifying(config.verify):
        with raise_together():
            _check(config)
            stage = _Run(paths, config, other, found_in)
        return stage.run()


def _check(config: QueryNeighborsConfig) -> None:
    raise_problems(list(too_small(config, _LEAST)))
    explicit_precision(config.embed_precision, config.embed_fp16)
    if config.rerank not in (None, "bm25"):
        raise ConfigurationError("--rerank", str(config.rerank), "Choose bm25, or leave it out")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError("--device", config.device, "Choose auto, cpu or cuda")


class _Run:
    """One run of the stage on one project."""

    def __init__(
        self,
        paths: ProjectPaths,
        config: QueryNeighborsConfig,
        other: ProjectPaths | None,
        found_in: ProjectPaths | None = None,
    ) -> None:
        if other is None:
            _refuse_finished(paths)
        self._search = open_search(paths, other or paths)
        rescore = config.rescore or self._search.source_settings.index_rescored
        config = replace(config, rescore=rescore)
        self._paths, self._config, self._other = paths, config, other
        self._project = self._search.config
        self._tokenizer = load_project_tokenizer(self._project, paths)
        self._aligned = self._search.settings.samples == "aligned"
        self._num_query = self._search.num_candidates(config.num_neighbors_query)
        explicit = explicit_precision(config.embed_precision, config.embed_fp16)
        self._precision = explicit or self._search.precision
        searched = self._search.database_digests(config.rescore)
        own = self._search.token_digests()
        if self._aligned:
            own |= database_digests(paths)
        if other is None and INPUT not in recorded_inputs(paths, STAGE):
            # Removed since the first search, whose neighbors are read without them.
            searched.pop(INPUT, None)
        self._inputs = {**own, **searched}
        self._tag = "" if other is None else f"_{fingerprint_of(searched)[:8]}"
        order = _order_of_search(paths, self._record, self._search)
        self._in_list_order = order is not None
        possible = possible_batches(config, self._search, self._record, STAGE)
        for batches in possible:
            self._take(batches, order, own, found_in)
            if len(possible) == 1 or self._is_begun():
                return
        self._take(possible[0], order, own, found_in)

    def _take(
        self,
        batches: Batches,
        order: str | None,
        own: Mapping[str, str],
        found_in: ProjectPaths | None,
    ) -> None:
        """Take options with these batches, and what the search goes on from."""
        config, self._batches = self._config, batches
        self._options = options_of(config, self._search, self._num_query, self._precision, batches)
        if order is not None:
            self._options[ORDER] = order
        self._old: OldNeighbors | None = None
        self._previous: PreviousNeighbors | None = None
        self._derived = False
        self._fingerprint = self._check_options()
        if found_in is not None:
            self._follow(found_in, own)
            return
        # A GPU may probe other lists than the CPU, so that the nearest of both are not the nearest.
        if self._aligned and self._other is not None and not (config.faiss_gpu and num_gpus()):
            self._old = find_old_neighbors(self._search, self._options, own)
        self._derive_fingerprint()

    def _is_begun(self) -> bool:
        """Whether files of this search are there, with its order or, from a GPU, without one."""
        unordered = {name: value for name, value in self._options.items() if name != ORDER}
        made = check_stage(self._paths, self._record, unordered, self._inputs, self._output)
        before = self._old or self._previous
        made = made if before is None else fingerprint_of([made, before.fingerprint])
        return is_begun(self._paths, {self._fingerprint, made})

    def _follow(self, found_in: ProjectPaths, own: Mapping[str, str]) -> None:
        """Go on from the current neighbors, unless the search has finished already."""
        if finished := recorded_fingerprint(self._paths, self._record):
            self._derived, self._fingerprint = self._fingerprint != finished, finished
            return
        self._previous = find_previous_neighbors(self._search, found_in, self._options, own)
        self._derive_fingerprint()

    def _derive_fingerprint(self) -> None:
        """Let the fingerprint of the files depend on those that the search goes on from."""
        if (before := self._old or self._previous) is not None:
            self._fingerprint = fingerprint_of([self._fingerprint, before.fingerprint])
            self._derived = True

    @property
    def _record(self) -> str:
        return f"{STAGE}{self._tag}"

    def _check_options(self) -> str:
        """Compare options and inputs with an earlier run's. Returns their fingerprint."""
        return check_stage(self._paths, self._record, self._options, self._inputs, self._output)

    @property
    def _output(self) -> Path:
        return self._first_output() if self._other is None else self._paths.query / "none"

    def run(self) -> QueryNeighborsReport:
        """Search all splits, and record them in the project."""
        with raise_together():
            self._open()
        self._agree_on_order()
        with raise_together():  # rank 0 has counted the tokens
            self._neighbor_search = self._make_neighbor_search()
        max_tokens = self._embedder.embedder.max_tokens
        searched = None if self._old is None else self._old.num_new
        again = None
        if self._previous is not None:
            again = self._previous.count_touched()
        report = QueryNeighborsReport(
            self._config, {}, {}, {}, self._num_query, max_tokens, searched, again
        )
        directories: dict[str, str | None] = dict.fromkeys(SPLITS)
        for table in self._tables():
            directories[table.split] = self._query(table, report)
        warn_of_cut_chunks(STAGE, report.counts, max_tokens)
        with raise_together():
            if get_rank() == 0:
                self._finish(report, directories)
        barrier()
        return report

    def _open(self) -> None:
        """Load the embedder and the index."""
        config, search = self._config, self._search
        device = str(choose_device(config.device))  # type: ignore[arg-type]
        embedder = search.load_embedder(
            self._batches.size,
            device,
            self._precision,
            self._batches.tokens,
            compare=is_first_on_host(),
        )
        ends = search.source_settings.document_ends
        self._embedder = ChunkEmbedder(self._tokenizer, embedder, ends)
        if self._old is not None:
            self._index = self._old.open_index(self._in_list_order)
        else:
            self._index = search.index.open(
                share=True,
                k=self._num_query,
                gpu=config.faiss_gpu,
                rescore=config.rescore,
                list_order=self._in_list_order,
            )
        self._numbers = numbers_in_database(self._paths, self._project, search.source)
        if get_rank() == 0:
            remove_truncated_cache(self._paths)
            if config.rerank is not None:
                save_token_counts(search.database, self._tokenizer.vocab_size, search.source)

    def _agree_on_order(self) -> None:
        """Agree on how many chunks are searched together, few candidates of each first.

        List order is recorded only if all ranks search in it: an index on a GPU is not. Chunks of
        packed samples are embedded on the way, which takes longer than their search and which a
        kill would lose, so no more than usual are taken.
        """
        few = min(self._num_query, narrow_candidates(self._config.num_neighbors_save))
        chosen = self._config.rescore or self._config.rerank is not None  # among all candidates
        narrow = not chosen and self._old is None
        first = few if narrow else self._num_query
        most = TOGETHER if not self._aligned else None
        numbers = queries_together(self._index, first, self._num_query, most=most)
        self._together, self._together_wide = numbers
        used, self._prefixes = self._together > 0, self._together > 0 and narrow
        finished = bool(recorded_options(self._paths, self._record))
        if self._in_list_order and not used and not finished:
            del self._options[ORDER]
            self._fingerprint = self._check_options()
            self._derive_fingerprint()

    def _make_neighbor_search(self) -> NeighborSearch:
        search, config = self._search, self._config
        reranker = search.load_reranker(config.rerank, self._tokenizer)
        self._log_order()
        return NeighborSearch(
            search.database,
            num_query=self._num_query if self._old is None else self._num_new_candidates,
            num_save=config.num_neighbors_save,
            rerank=reranker,
            num_searched=None if self._old is None else self._old.num_searched,
            together=self._together,
            together_wide=self._together_wide,
            prefixes=self._prefixes,
        )

    def _log_order(self) -> None:
        """Say how many chunks share the reading of the index, or why none do."""
        settings = self._search.source_settings
        string = settings.index_string or ""
        if self._together:
            what = "each list" if has_lists(string) else "the index"
            log_once(f"search reads {what} once for up to {self._together} chunks")
        elif not (self._config.faiss_gpu and num_gpus()):
            why = obstacle(string, settings.nprobe) or "so it was begun, or samples are packed"
            log_once(f"search goes from chunk to chunk: {why}")

    @property
    def _num_new_candidates(self) -> int:
        # Rows that known neighbors fill are not searched again for more candidates.
        return max(self._num_query, self._config.num_neighbors_save)

    def _tables(self) -> Iterable[QueryTable]:
        if not self._aligned:
            return sample_tables(self._search, self._tokenizer, self._embedder, self._numbers)
        held_out = partial(
            held_out_vectors,
            self._search,
            embedder=self._embedder,
            options=self._options,
            precision=self._precision,
            tag=self._tag,
        )
        with raise_together():
            return database_tables(self._search, self._embedder, self._numbers, held_out, self._old)

    def _query(self, table: QueryTable, report: QueryNeighborsReport) -> str:
        """Search one table and add it to the report. Returns its directory's name."""
        split, name = table.split, table.directory + self._tag
        report.num_chunks[split] = table.num_chunks
        shards = cut(self._paths.query / name, table.num_chunks, self._project.retro_block_size)
        search = self._neighbor_search
        if self._previous is not None:
            search = self._previous.follow(search, split)
        report.reports[split] = query_split(
            search,
            table.chunks,
            self._index,
            shards,
            self._fingerprint,
            f"neighbors of {split}",
        )
        with raise_together():
            report.counts[split] = count_queried(shards)
        return name

    def _first_output(self) -> Path:
        """A file of the neighbors that the project names; if none, one that does not exist."""
        named = self._project.retro_neighbor_dirs
        names = [name for name in named.values() if name is not None]
        names += (self._search.settings.chunk_neighbor_dirs or {}).values()
        query = self._paths.query
        files = [file for name in names for file in sorted((query / name).glob("*.hdf5"))]
        return files[0] if files else query / "none"

    def _finish(self, report: QueryNeighborsReport, directories: dict[str, str | None]) -> None:
        """Record the neighbors in the project, on rank 0."""
        counted: dict[str, Any] = {
            split: asdict(found) for split, found in report.counts.items() if found.chunks
        }
        finished = bool(recorded_options(self._paths, self._record))
        searched_now = not finished or any(files.built for files in report.reports.values())
        finish_stage(
            self._paths,
            self._record,
            self._options,
            self._inputs,
            counted or None,
            self._fingerprint if self._derived else None,
        )
        searched = {split: name for split, name in directories.items() if name is not None}
        if self._other is None:
            settings = self._search.settings
            if self._aligned:
                settings.chunk_neighbor_dirs = searched
                # Other readers would take these rows for those of samples.
                directories = dict.fromkeys(SPLITS)
            self._project.retro_neighbor_dirs = directories
            settings.num_neighbors_query = self._num_query
            settings.num_neighbors_save = self._config.num_neighbors_save
            settings.rerank = self._config.rerank
            settings.rescore = self._config.rescore
            if searched_now:
                settings.faiss_gpu = self._config.faiss_gpu
            settings.save(self._paths.root)
        else:
            place = _place(self._search.source, self._paths)
            if self._aligned:
                directories = {**searched}
            self._project.retro_database = OtherDatabase(place, directories)
        self._project.save(self._paths.root)


def _order_of_search(paths: ProjectPaths, record: str, search: ProjectSearch) -> str | None:
    """The order to search in, None: query by query; a finished stage goes on as it was run.

    Older versions followed a graph over the lists, if there was one, and visited other lists.
    """
    before = recorded_options(paths, record)
    if before:
        return before.get(ORDER)
    settings = search.source_settings
    string = settings.index_string or ""
    if not has_lists(string):
        # Packed projects, which other programs read, are searched as by Faiss.
        whole = search.settings.samples == "aligned" and obstacle(string, None) is None
        return "blocks" if whole else None
    if obstacle(string, settings.nprobe) is not None:
        return None
    return "lists, the nearest ones" if "_HNSW" in string else "lists"


def _place(source: ProjectPaths, paths: ProjectPaths) -> str:
    """Path of another project; relative if it is inside this one, so that both can be moved."""
    inside = source.root.is_relative_to(paths.root)
    return paths.relative(source.root) if inside else str(source.root)


def _refuse_finished(paths: ProjectPaths) -> None:
    """Reject a project finished by another program, which has neighbors but no index of ours.

    Raises:
        ProjectError: it has neighbors for every split that config.json names.
    """
    config = ProjectConfig.load(paths.root)
    if ProjectSettings.load(paths.root).index_string is not None:
        return
    named = [paths.query / name for name in config.retro_neighbor_dirs.values() if name is not None]
    done = all(any(directory.glob("*.hdf5")) for directory in named)
    if named and done and not paths.stage_record(STAGE).is_file():
        raise ProjectError(
            paths.query,
            "holds the neighbors of every split already, searched by another program",
            f"This project is complete: continue with pretrain_retro --project-dir {paths.root}",
        )
