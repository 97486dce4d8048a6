"""`query_neighbors`: the neighbors of every training, validation and test chunk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from retro_mcore.cli.command import print_summary
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.token_file import bin_path, idx_path
from retro_mcore.distributed import barrier, get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.platform import setup_device
from retro_mcore.project.arrays import save_array
from retro_mcore.project.config import (
    SPLITS,
    OtherDatabase,
    ProjectConfig,
    ProjectSettings,
    Split,
)
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import (
    FileState,
    fingerprint_of,
    signed_write,
    state_of,
)
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import check_stage, finish_stage, input_digests
from retro_mcore.project.shards import ShardReport, cut
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.base import load_project_embedder
from retro_mcore.retrieval.embedders.megatron_bert import register as register_megatron_bert
from retro_mcore.retrieval.index.project import ProjectIndex
from retro_mcore.retrieval.neighbor_search import (
    NUM_QUERY,
    NeighborSearch,
    QueryCounts,
    count_queried,
    query_split,
)
from retro_mcore.retrieval.rerank import count_tokens, load_reranker
from retro_mcore.samples.project_samples import (
    RenumberedSamples,
    build_all_gpt_samples,
    numbers_in_database,
    remove_truncated_cache,
)
from retro_mcore.stages.build_index import told_losses

STAGE = "query_neighbors"


@dataclass
class QueryNeighborsOptions:
    """Search the neighbors of every chunk of every sample, and save them."""

    project_dir: str
    """Project directory, after build_index."""
    num_neighbors_query: int | None = None
    """Candidates searched per chunk, before those of the sample's own documents are dropped; more
    where too few are left (default: 200, or all of a smaller database)."""
    num_neighbors_save: int = 20
    """Neighbors saved per chunk."""
    rerank: Literal["bm25"] | None = None
    """Order the candidates by BM25 over their tokens before the best are saved."""
    embed_batch_size: int = 16
    """Chunks per forward pass of the embedder."""
    embed_fp16: bool = False
    """Embed in half precision, on a GPU."""
    device: str = "auto"
    """Where the embedder runs: auto, cpu or cuda."""
    faiss_gpu: bool = True
    """Search on the GPUs where Faiss has any."""
    verify: bool = False
    """Compare the checksums of all files that are read, however large; else of 8 GiB a process."""


@dataclass(frozen=True)
class QueriedNeighbors:
    """What `query_neighbors` made or found, per split that has samples."""

    reports: dict[Split, ShardReport]
    num_chunks: dict[Split, int]
    counts: dict[Split, QueryCounts] = field(default_factory=dict)


def query_neighbors(options: QueryNeighborsOptions) -> QueriedNeighbors:
    """Fill query/ of a project, and name its directories in config.json.

    Raises:
        ProjectError: an earlier stage has not run, the neighbors were searched with other options,
            another run works on the project, or the disk is full.
        CorruptFileError: the database or the index is damaged.
    """
    initialize()
    with stage_lock(ProjectPaths(options.project_dir), STAGE):
        return _query(options)


def query_other_database(options: QueryNeighborsOptions, other: Path) -> QueriedNeighbors:
    """Search the samples' neighbors in another project's database, and switch to it at the end.

    The caller holds the project's lock. What the project used before stays, and is used until one
    write of config.json names the new neighbors and their database together.

    Args:
        options: As for the project's own database.
        other: The project whose database is searched, after build_index.

    Raises:
        ProjectError: as `query_neighbors`.
    """
    return _query(options, other)


def _query(options: QueryNeighborsOptions, other: Path | None = None) -> QueriedNeighbors:
    with raise_together():
        _check_options(options)
        paths = ProjectPaths(options.project_dir)
        source = paths if other is None else ProjectPaths(other)
        config = ProjectConfig.load(paths.root)
        settings = ProjectSettings.load(source.root)
        tokenizer = load_project_tokenizer(config, paths)
        database = ChunkDatabase.open(source.root, own=True)
        block_size = ProjectConfig.load(source.root).retro_block_size
        if settings.index_string is None and other is None:
            _refuse_finished(config, paths)
        project_index = ProjectIndex(source, settings, len(database), block_size)
        num_query = options.num_neighbors_query or min(NUM_QUERY, len(database))
        stage_options = {
            "--num-neighbors-query": num_query,
            "--num-neighbors-save": options.num_neighbors_save,
            "--embed-batch-size": options.embed_batch_size,
            "--nprobe of build_index": settings.nprobe,
            "--ef-search of build_index": settings.ef_search,
            **({"--embed-fp16": True} if options.embed_fp16 else {}),
            **({"--rerank": options.rerank} if options.rerank else {}),
            # Only where it is not as it always was: older projects go on.
            **(
                {"document_ends of build_index": settings.document_ends}
                if settings.document_ends != "line break"
                else {}
            ),
            **{
                key: getattr(config, key)
                for key in vars(config)
                if key.startswith(("retro_gpt_", "retro_block_size"))
                and not key.endswith("cache_path")
            },
        }
        prefixes = [paths.data / prefix for prefix in config.blend[1]]
        files = [path for prefix in prefixes for path in (bin_path(prefix), idx_path(prefix))]
        searched = input_digests(source, [source.merged_db("train")]) | project_index.digests()
        inputs = {**input_digests(paths, files), **searched}
        tag = "" if other is None else f"_{fingerprint_of(searched)[:8]}"
        first_output = _first_output(config, paths) if other is None else paths.query / "none"
        fingerprint = check_stage(paths, f"{STAGE}{tag}", stage_options, inputs, first_output)
        device = setup_device(options.device)  # type: ignore[arg-type]
        register_megatron_bert()
        embedder = load_project_embedder(
            settings, source, options.embed_batch_size, str(device), options.embed_fp16
        )
        index = project_index.open(share=True, k=num_query, gpu=options.faiss_gpu)
        if get_rank() == 0:
            remove_truncated_cache(paths)
        _check_dimension(settings, embedder.dimension, source)
        numbers = numbers_in_database(paths, config, source)
        if options.rerank is not None and get_rank() == 0:
            _count_tokens(database, tokenizer.vocab_size, source)
    with raise_together():
        neighbor_search = NeighborSearch(
            database,
            tokenizer,
            embedder,
            config.retro_gpt_chunk_length,
            num_query,
            options.num_neighbors_save,
            load_reranker(
                options.rerank,
                source,
                database,
                config.retro_gpt_chunk_length,
                tokenizer.vocab_size,
            ),
            settings.document_ends,
        )
    result = QueriedNeighbors({}, {})
    directories: dict[str, str | None] = dict.fromkeys(SPLITS)
    for split, samples in build_all_gpt_samples(config, paths, tokenizer).items():
        if samples is None:
            continue
        # A finished directory keeps its name in a project that was moved.
        name = config.retro_neighbor_dirs.get(split) or f"{split}_{samples.description_hash}"
        name += tag
        rows = len(samples) * config.chunks_per_sample
        result.num_chunks[split] = rows
        directories[split] = name
        shards = cut(paths.query / name, rows, config.retro_block_size)
        result.reports[split] = query_split(
            neighbor_search,
            RenumberedSamples(samples, numbers),
            index,
            shards,
            fingerprint,
            f"neighbors of {split}",
        )
        with raise_together():
            result.counts[split] = count_queried(shards)
    with raise_together():
        if get_rank() == 0:
            counted: dict[str, Any] = {
                split: asdict(counts) for split, counts in result.counts.items() if counts.chunks
            }
            finish_stage(paths, f"{STAGE}{tag}", stage_options, inputs, counted or None)
            if other is None:
                config.retro_neighbor_dirs = directories
                settings.num_neighbors_query = num_query
                settings.num_neighbors_save = options.num_neighbors_save
                settings.rerank = options.rerank
                settings.save(paths.root)
            else:
                config.retro_database = OtherDatabase(_place(source, paths), directories)
            config.save(paths.root)
    barrier()
    summary: dict[str, object] = {
        split: f"{result.num_chunks[split]} chunks in files {report}"
        for split, report in result.reports.items()
    }
    order = ", in the order of BM25" if options.rerank else ""
    summary["neighbors"] = f"{options.num_neighbors_save} saved of {num_query} searched{order}"
    for split, counts in result.counts.items():
        summary |= _told(split, counts, options.num_neighbors_save, embedder.max_tokens)
    print_summary(STAGE, summary)
    return result


def _told(
    split: Split, counts: QueryCounts, num_saved: int, max_tokens: int | None
) -> dict[str, object]:
    """Rows of a summary: chunks of a split that found too little, or were not read whole."""
    losses = told_losses(counts, max_tokens)
    if counts.chunks_short:
        without = f", {counts.chunks_without} of them without any" if counts.chunks_without else ""
        losses[f"fewer than {num_saved} neighbors"] = (
            f"{counts.chunks_short} of {counts.chunks} chunks{without}: the database has none "
            "left of other documents, or the index found none (build_index --nprobe, --ef-search)"
        )
    return {f"{split}, {name}": told for name, told in losses.items()}


def _place(source: ProjectPaths, paths: ProjectPaths) -> str:
    """Relative where it lies inside the project, so that both can be moved together."""
    inside = source.root.is_relative_to(paths.root)
    return paths.relative(source.root) if inside else str(source.root)


def _refuse_finished(config: ProjectConfig, paths: ProjectPaths) -> None:
    """Of another program's project nothing is left to do, though it has no index of ours.

    Raises:
        ProjectError: it has neighbors of every split that config.json names.
    """
    named = [paths.query / name for name in config.retro_neighbor_dirs.values() if name is not None]
    done = all(any(directory.glob("*.hdf5")) for directory in named)
    if named and done and not paths.stage_record(STAGE).is_file():
        raise ProjectError(
            paths.query,
            "holds the neighbors of every split already, searched by another program",
            f"This project is complete: go on with pretrain_retro --project-dir {paths.root}",
        )


def _first_output(config: ProjectConfig, paths: ProjectPaths) -> Path:
    """A file of the neighbors that config.json names, if there is one."""
    names = [name for name in config.retro_neighbor_dirs.values() if name is not None]
    files = [file for name in names for file in sorted((paths.query / name).glob("*.hdf5"))]
    return files[0] if files else paths.query / "none"


def _check_options(options: QueryNeighborsOptions) -> None:
    for flag in ("num_neighbors_query", "num_neighbors_save", "embed_batch_size"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{flag.replace('_', '-')}", str(value), "Give at least 1")
    if options.rerank not in (None, "bm25"):
        raise ConfigurationError("--rerank", str(options.rerank), "Choose bm25, or leave it out")
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError("--device", options.device, "Choose auto, cpu or cuda")


def _check_dimension(settings: ProjectSettings, dimension: int, paths: ProjectPaths) -> None:
    if settings.embedding_dimension != dimension:
        raise ProjectError(
            paths.index,
            f"the index holds vectors of {settings.embedding_dimension}, the embedder gives "
            f"{dimension}",
            f"Run build_index --project-dir {paths.root} again",
        )


def _count_tokens(database: ChunkDatabase, vocab_size: int, paths: ProjectPaths) -> None:
    """Save in how many chunks each token occurs."""
    fingerprint = fingerprint_of(input_digests(paths, [paths.merged_db("train")]))
    if state_of(paths.token_counts, fingerprint) is FileState.COMPLETE:
        return
    with signed_write(paths.token_counts, fingerprint) as temporary:
        save_array(temporary, count_tokens(database, vocab_size))
