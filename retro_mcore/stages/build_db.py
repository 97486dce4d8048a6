"""`build_db`: the chunk database of a project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retro_mcore.cli.command import print_summary
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.splits import check_documents
from retro_mcore.data.tokens.token_file import bin_path, idx_path, open_token_files
from retro_mcore.distributed import barrier, get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import check_stage, finish_stage, input_digests, require_stage
from retro_mcore.retrieval.bert_tokens import BertTokenCounter
from retro_mcore.retrieval.database_build import DatabaseReport, build_database

STAGE = "build_db"


@dataclass
class BuildDbOptions:
    """Cut the training documents into the chunks that are retrieved from."""

    project_dir: str
    """Project directory, made by preprocess_corpus."""
    retro_index_ntrain: int | None = None
    """Chunks that the index is trained on, shared by the data weights (default: all)."""
    retro_doc_block_size: int | None = None
    """Documents per file (default: from the number of documents)."""


def build_db(options: BuildDbOptions) -> DatabaseReport:
    """Build db/ of a project.

    Raises:
        ProjectError: preprocess_corpus has not run, the database was built with other options,
            another run works on the project, or the disk is full.
        CorruptFileError: the tokens are damaged.
        TokenizerError: the tokenizer is not the project's.
    """
    initialize()
    with stage_lock(ProjectPaths(options.project_dir), STAGE):
        return _build(options)


def _build(options: BuildDbOptions) -> DatabaseReport:
    with raise_together():
        for flag in ("retro_index_ntrain", "retro_doc_block_size"):
            value = getattr(options, flag)
            if value is not None and value < 1:
                raise ConfigurationError(
                    f"--{flag.replace('_', '-')}", str(value), "Give at least 1"
                )
        paths = ProjectPaths(options.project_dir)
        config = ProjectConfig.load(paths.root)
        prefixes = [paths.data / prefix for prefix in config.blend[1]]
        files = [path for prefix in prefixes for path in (bin_path(prefix), idx_path(prefix))]
        for path in files:
            require_stage(paths, path, "preprocess_corpus")
        if config.retro_bert_vocab_file is None:
            raise ProjectError(paths.config, "retro_bert_vocab_file is null", "Name a vocab.txt")
        bert = paths.root / config.retro_bert_vocab_file
        require_stage(paths, bert, "preprocess_corpus")
        verify_project(paths, [*files, bert], everything=True)  # all of it is read anyway
        tokenizer = load_project_tokenizer(config, paths)
        counter = BertTokenCounter(bert, config.retro_bert_tokenizer_type != "BertWordPieceCase")
        datasets = open_token_files(config, paths)
        whole = ProjectSettings.load(paths.root).whole_datasets
        for prefix, dataset in zip(config.blend[1], datasets, strict=True):
            if prefix not in whole:
                check_documents(config.retro_gpt_split, len(dataset), prefix)
        stage_options = {
            "retro_gpt_chunk_length": config.retro_gpt_chunk_length,
            "retro_gpt_split": config.retro_gpt_split,
            "retro_gpt_data_path": config.retro_gpt_data_path,
            "--retro-index-ntrain": options.retro_index_ntrain,
            "--retro-doc-block-size": options.retro_doc_block_size,
            **({"whole_datasets": whole} if whole else {}),
        }
        inputs = input_digests(paths, [*files, *tokenizer.files, bert])
        merged = paths.merged_db("train")
        fingerprint = check_stage(paths, STAGE, stage_options, inputs, merged)
        made_from = [_chunk_fingerprint(config, inputs, paths, prefix) for prefix in prefixes]
    report = build_database(
        config,
        paths,
        datasets,
        tokenizer,
        counter,
        options.retro_index_ntrain,
        options.retro_doc_block_size,
        fingerprint,
        made_from,
        whole,
    )
    if get_rank() == 0:
        finish_stage(paths, STAGE, stage_options, inputs)
    barrier()
    invalid = sum(info.n_chunks_invalid for info in report.infos)
    rows = {
        "files of chunks": "; ".join(str(shards) for shards in report.shards),
        "retrieval database": f"{report.num_train_chunks} chunks of training documents"
        + (" (reused)" if report.merged_reused else ""),
        "held-out chunks": sum(info.n_chunks - info.n_chunks_train for info in report.infos),
        "chunks without words": f"{invalid} (left out)",
    }
    print_summary(STAGE, rows)
    return report


def _chunk_fingerprint(
    config: ProjectConfig, inputs: dict[str, str], paths: ProjectPaths, prefix: Path
) -> str:
    """What one dataset's chunks are made from: the others and their weights have no part in it."""
    own = {paths.relative(bin_path(prefix)), paths.relative(idx_path(prefix))}
    others = {name for name in inputs if name.startswith("data/")} - own
    used = {name: digest for name, digest in inputs.items() if name not in others}
    return fingerprint_of(["chunks", config.retro_gpt_chunk_length, used])
