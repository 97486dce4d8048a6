"""Configuration of the project that `preprocess_corpus` writes, for all later stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.data.tokens.splits import document_ranges
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.errors import ConfigurationError
from retro_mcore.project.config import SPLITS, ProjectConfig, ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import choose_shard_length
from retro_mcore.stages.preprocessing.config import PreprocessCorpusConfig
from retro_mcore.stages.preprocessing.tokenizer import TokenizerFiles

#: Upstream's rows per file of neighbors. A small corpus gets fewer, so that ranks can share it.
_LONGEST_BLOCK = 100_000


def make_project_config(
    config: PreprocessCorpusConfig,
    paths: ProjectPaths,
    prefixes: Sequence[str],
    datasets: Sequence[TokenFile],
    files: TokenizerFiles,
) -> ProjectConfig:
    """Configuration of the project, including the neighbors named by an earlier one.

    Args:
        config: Configuration of the stage.
        paths: The project.
        prefixes: Name of each dataset.
        datasets: Tokens of each dataset.
        files: Files of the tokenizers.

    Raises:
        ConfigurationError: there are more samples than can be numbered.
    """
    train_samples = _num_train_samples(config, datasets)
    rows = train_samples * (config.seq_length // config.retro_chunk_length)
    if config.samples == "aligned":  # the chunks of documents are searched, however many samples
        rows = sum(int(dataset.lengths.sum(dtype=np.int64)) for dataset in datasets)
        rows //= config.retro_chunk_length
    made = ProjectConfig(
        retro_block_size=config.retro_block_size or choose_shard_length(rows, _LONGEST_BLOCK),
        retro_gpt_chunk_length=config.retro_chunk_length,
        retro_gpt_seq_length=config.seq_length,
        retro_gpt_global_batch_size=config.global_batch_size,
        retro_gpt_train_samples=train_samples,
        retro_gpt_eval_interval=config.eval_interval,
        retro_gpt_eval_iters=config.eval_iters,
        retro_gpt_split=config.split,
        retro_gpt_seed=config.seed,
        retro_gpt_data_path=_data_path(config, prefixes),
        retro_gpt_tokenizer_type=files.type,
        retro_gpt_tokenizer_model=files.model,
        retro_gpt_vocab_file=files.vocab,
        retro_gpt_merge_file=files.merges,
        retro_bert_tokenizer_type="BertWordPieceLowerCase",
        retro_bert_vocab_file=files.bert,
        retro_neighbor_dirs={"train": None, "valid": None, "test": None},
    )
    _check_numbers(made, config)
    if paths.config.is_file():  # set by query_neighbors and update_db
        before = ProjectConfig.load(paths.root)
        made.retro_neighbor_dirs = before.retro_neighbor_dirs
        made.retro_database = before.retro_database
        # set_samples keeps it, since embeddings and neighbors are stored in files of this length.
        if config.retro_block_size is None and paths.stage_record("preprocess_corpus").is_file():
            made.retro_block_size = before.retro_block_size
    return made


def with_samples(
    project: ProjectConfig, config: PreprocessCorpusConfig, datasets: Sequence[TokenFile]
) -> ProjectConfig:
    """The configuration of a project with other samples of the same documents.

    Args:
        project: Configuration of the project.
        config: Configuration that the samples follow from.
        datasets: Tokens of each dataset.

    Raises:
        ConfigurationError: more samples than can be numbered.
    """
    weights = config.input_weights or [1.0] * len(datasets)
    path = project.retro_gpt_data_path
    if weights != project.blend[0]:
        path = _data_path(config, project.blend[1])
    made = replace(
        project,
        retro_gpt_seq_length=config.seq_length,
        retro_gpt_global_batch_size=config.global_batch_size,
        retro_gpt_train_samples=_num_train_samples(config, datasets),
        retro_gpt_eval_interval=config.eval_interval,
        retro_gpt_eval_iters=config.eval_iters,
        retro_gpt_seed=config.seed,
        retro_gpt_data_path=path,
    )
    _check_numbers(made, config)
    return made


def _data_path(config: PreprocessCorpusConfig, prefixes: Sequence[str]) -> list[str]:
    weights = config.input_weights or [1.0] * len(prefixes)
    pairs = zip(map(str, weights), prefixes, strict=True)
    return [item for pair in pairs for item in pair]


def _num_train_samples(config: PreprocessCorpusConfig, datasets: Sequence[TokenFile]) -> int:
    return config.train_samples or _samples_of_epochs(config, datasets)


def save_project(
    made: ProjectConfig,
    config: PreprocessCorpusConfig,
    paths: ProjectPaths,
    tokenizer: Tokenizer | None,
) -> None:
    """Write config.json and retro_mcore.json, on rank 0.

    Args:
        made: Configuration of the project.
        config: Configuration of the stage.
        paths: The project.
        tokenizer: Tokenizer whose special tokens are recorded; None: keep the recorded ones.

    Raises:
        TokenizerError: the tokenizer that was recorded cannot be loaded.
    """
    made.save(paths.root)
    # Lost settings are restored.
    known = paths.settings.is_file()
    settings = ProjectSettings.load(paths.root) if known else ProjectSettings()
    settings.json_keys = config.json_keys
    settings.id_key, settings.clean_text = config.id_key, config.clean_text
    settings.samples = config.samples or "packed"
    if config.near.are_searched:
        settings.near_duplicates = config.near.mode
        settings.near_duplicate_threshold = config.near.threshold
        settings.near_duplicate_words = config.near.words
    if tokenizer is not None:
        settings.eod_id, settings.bos_id = tokenizer.eod, tokenizer.bos
        settings.add_bos = tokenizer.adds_bos
    settings.save(paths.root)
    load_project_tokenizer(made, paths)


def _check_numbers(made: ProjectConfig, config: PreprocessCorpusConfig) -> None:
    for split in SPLITS:
        if made.num_samples(split) * made.chunks_per_sample > np.iinfo(np.int64).max:
            flags = "--train-samples" if config.train_samples else "--train-epochs"
            raise ConfigurationError(
                flags if split == "train" else f"{flags} and --eval-iters",
                f"more {split} samples than can be numbered",
                "Give fewer",
            )


def _samples_of_epochs(config: PreprocessCorpusConfig, datasets: Sequence[TokenFile]) -> int:
    """Number of samples for `epochs` passes over the training documents, in whole batches."""
    assert config.epochs is not None
    tokens = 0
    for dataset in datasets:
        start, end = document_ranges(config.split, len(dataset))["train"]
        tokens += int(dataset.lengths[start:end].sum(dtype=np.int64))
    samples = int(config.epochs * (tokens - 1) // config.seq_length)
    batch = config.global_batch_size
    return max(samples // batch, 1) * batch
