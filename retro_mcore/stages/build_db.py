"""Stage `build_db`: the chunk database of a project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.splits import check_documents
from retro_mcore.data.tokens.token_file import bin_path, idx_path, open_token_files
from retro_mcore.distributed import barrier, get_rank, initialize, raise_together
from retro_mcore.errors import ProjectError, raise_problems, too_small
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.integrity import verify_project
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import check_stage, finish_stage, input_digests, require_stage
from retro_mcore.retrieval.bert_tokens import BertTokenCounter
from retro_mcore.retrieval.database_build import DatabaseInputs, DatabaseReport, build_database
from retro_mcore.retrieval.removed import left_out_documents
from retro_mcore.stages.configuration import Project, project_paths
from retro_mcore.time_limit import DataTimeLimit

STAGE = "build_db"
#: Chunks of each dataset, files that were built, and whether the merged databases existed already.
BuildDbReport = DatabaseReport
_LEAST = {"retro_index_ntrain": 1, "retro_doc_block_size": 1}


@dataclass(kw_only=True)
class BuildDbConfig(DataTimeLimit):
    """Configuration of `build_db`."""

    retro_index_ntrain: int | None = None
    """Number of chunks that the index is trained on, distributed by the data weights (default:
    all)."""
    retro_doc_block_size: int | None = None
    """Documents per file (default: depends on the number of documents)."""


def run(project: Project, config: BuildDbConfig) -> BuildDbReport:
    """Build db/ of a project, on all ranks together.

    Args:
        project: Project directory, after preprocess_corpus.
        config: Configuration of this stage.

    Raises:
        ProjectError: preprocess_corpus has not run, the database was built with another
            configuration, another run works on the project, or the disk is full.
        CorruptFileError: the tokens are damaged.
        TokenizerError: the tokenizer differs from the project's.
    """
    initialize(
        timeout_minutes=config.distributed_timeout_minutes,
        stall_minutes=config.stall_timeout_minutes,
    )
    paths = project_paths(project)
    with stage_lock(paths, STAGE):
        with raise_together():
            raise_problems(list(too_small(config, _LEAST)))
            inputs = _Inputs.open(paths)
            options = _recorded_options(inputs, config)
            merged = paths.merged_db("train")
            fingerprint = check_stage(paths, STAGE, options, inputs.digests, merged)
        report = build_database(
            inputs,
            fingerprint=fingerprint,
            chunk_fingerprints=[_chunk_fingerprint(inputs, prefix) for prefix in inputs.prefixes],
            num_sampled=config.retro_index_ntrain,
            document_block_size=config.retro_doc_block_size,
        )
        if get_rank() == 0:
            finish_stage(paths, STAGE, options, inputs.digests)
        barrier()
    return report


@dataclass(frozen=True)
class _Inputs(DatabaseInputs):
    """The inputs, all verified, with their files' digests."""

    prefixes: list[Path]
    digests: dict[str, str]

    @classmethod
    def open(cls, paths: ProjectPaths) -> _Inputs:
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
        settings = ProjectSettings.load(paths.root)
        whole, aligned = settings.whole_datasets, settings.samples == "aligned"
        for prefix, dataset in zip(config.blend[1], datasets, strict=True):
            if prefix not in whole:
                check_documents(config.retro_gpt_split, len(dataset), prefix)
        digests = input_digests(paths, [*files, *tokenizer.files, bert])
        left_out = left_out_documents(paths)
        if len(left_out):
            digests |= input_digests(paths, [paths.left_out_documents])
        return cls(
            paths=paths,
            config=config,
            datasets=datasets,
            tokenizer=tokenizer,
            counter=counter,
            whole_datasets=whole,
            aligned=aligned,
            left_out=left_out,
            prefixes=prefixes,
            digests=digests,
        )


def _recorded_options(inputs: _Inputs, config: BuildDbConfig) -> dict[str, object]:
    """Everything that determines the chunks, for the stage's record."""
    project, whole = inputs.config, inputs.whole_datasets
    data_path = project.retro_gpt_data_path
    if inputs.aligned and config.retro_index_ntrain is None:  # set_samples may change the weights
        data_path = project.blend[1]
    return {
        "retro_gpt_chunk_length": project.retro_gpt_chunk_length,
        "retro_gpt_split": project.retro_gpt_split,
        "retro_gpt_data_path": data_path,
        "--retro-index-ntrain": config.retro_index_ntrain,
        "--retro-doc-block-size": config.retro_doc_block_size,
        **({"whole_datasets": whole} if whole else {}),
        **({"samples": "aligned"} if inputs.aligned else {}),
    }


def _chunk_fingerprint(inputs: _Inputs, prefix: Path) -> str:
    """Fingerprint of one dataset's chunks; other datasets and the weights do not affect it."""
    relative = inputs.paths.relative
    own = {relative(bin_path(prefix)), relative(idx_path(prefix))}
    others = {name for name in inputs.digests if name.startswith("data/")} - own
    others.add(relative(inputs.paths.left_out_documents))  # left out when they are merged
    used = {name: digest for name, digest in inputs.digests.items() if name not in others}
    aligned = ["aligned"] if inputs.aligned else []
    return fingerprint_of(["chunks", inputs.config.retro_gpt_chunk_length, used, *aligned])
