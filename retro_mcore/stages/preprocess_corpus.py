"""`preprocess_corpus`: text to tokens, and the configuration that all later stages read."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.chunking import chunks_per_sample
from retro_mcore.cli.command import print_summary
from retro_mcore.data.corpus.counts import loss_rows, read_counts, total
from retro_mcore.data.corpus.documents import read_documents, text_cleaner
from retro_mcore.data.corpus.sources import digest_inputs, name_datasets
from retro_mcore.data.tokenizers.loading import (
    TOKENIZER_TYPES,
    GPTSentencePieceTokenizer,
    HuggingFaceTokenizer,
    SpecialTokenChoice,
    Tokenizer,
    build_tokenizer,
    load_project_tokenizer,
    recorded_choice,
    train_sentencepiece,
)
from retro_mcore.data.tokenizers.special_tokens import DECLARING_FILES, DeclaredTokens
from retro_mcore.data.tokens.splits import check_documents, document_ranges, parse_split
from retro_mcore.data.tokens.token_file import TokenFile, bin_path
from retro_mcore.data.tokens.token_input import begin_with_bos, find_token_input
from retro_mcore.data.tokens.tokenizing import CorpusReader, empty_corpus, make_dataset
from retro_mcore.distributed import (
    barrier,
    get_rank,
    initialize,
    raise_together,
)
from retro_mcore.errors import ConfigurationError, RetroError, TokenizerError, raise_problems
from retro_mcore.project.config import SPLITS, ProjectConfig, ProjectSettings
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import (
    FileState,
    checksum,
    fingerprint_of,
    signed_write,
    state_of,
)
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import check_stage, finish_stage, recorded_inputs
from retro_mcore.project.shards import choose_shard_length
from retro_mcore.retrieval.bert_tokens import default_bert_vocab
from retro_mcore.samples.passes import SplitPasses, count_passes

STAGE = "preprocess_corpus"
#: Texts tokenized in one call.
_BATCH = 256
#: Upstream's rows per file of neighbors; fewer for a small corpus, so that ranks can share it.
_LONGEST_BLOCK = 100_000


@dataclass
class PreprocessCorpusOptions:
    """Turn text into a project directory: tokens, tokenizer and configuration."""

    project_dir: str
    """Directory to make, or to go on with."""
    input: list[str]
    """JSONL files (also .gz, .zst), text files, folders of these (links are followed), or Megatron
    .bin/.idx pairs; each becomes a dataset of its own."""
    input_weights: list[float] = field(default_factory=list)
    """Share of each input in the samples (default: equal)."""
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    """Keys of a JSON line that hold the text; several are joined by an empty line."""
    id_key: str = "id"
    """Key of a JSON line that holds its id, shown as a neighbor's source (lines without it: file
    and byte)."""
    clean_text: bool = False
    """Mend broken characters with ftfy: mojibake, control characters, HTML entities."""
    tokenizer_type: str | None = None
    """GPTSentencePieceTokenizer, GPT2BPETokenizer or HuggingFaceTokenizer (default: trained
    SentencePiece)."""
    tokenizer_model: str | None = None
    """SentencePiece .model, or Hugging Face tokenizer.json or its directory."""
    vocab_file: str | None = None
    """GPT-2's vocab.json."""
    merge_file: str | None = None
    """GPT-2's merges.txt."""
    eod_token: str | None = None
    """Token that ends a document, its text or its id (default: as the tokenizer's files say)."""
    bos_token: str | None = None
    """Token that begins a text, its text or its id (default: as the tokenizer's files say)."""
    add_bos_token: bool | None = None
    """Begin every document with BOS, and so every prompt later (default: as the tokenizer itself
    does; tokens that are given: as they are)."""
    vocab_size: int = 8192
    """Pieces of a tokenizer that is trained; lowered for a small corpus."""
    tokenizer_training_documents: int = 1_000_000
    """Documents that a tokenizer is trained on, from the beginning of the inputs."""
    bert_vocab_file: str | None = None
    """WordPiece vocabulary that the database counts tokens with (default: MiniLM's)."""
    seq_length: int = 512
    """Tokens per sample."""
    retro_chunk_length: int = 64
    """Tokens per chunk."""
    split: str = "90,5,5"
    """Percentages of training, validation and test documents."""
    train_samples: int | None = None
    """Training samples over the whole training (default: --train-epochs)."""
    train_epochs: float = 1.0
    """Passes over the training documents that set --train-samples."""
    global_batch_size: int = 8
    """Samples per training step."""
    eval_interval: int = 1000
    """Training steps between evaluations."""
    eval_iters: int = 10
    """Batches per evaluation."""
    seed: int = 1234
    """Seed of the order of the samples."""
    retro_block_size: int | None = None
    """Rows per file of embeddings and neighbors (default: from the number of samples)."""


@dataclass(frozen=True)
class PreprocessedCorpus:
    """What `preprocess_corpus` made.

    Attributes:
        config: What it wrote to config.json.
        num_documents: Documents of all datasets.
        num_tokens: Their tokens.
        vocab_size: Token ids of the tokenizer.
        reused: Whether all datasets were there already.
        report: What was read, dropped, replaced and repeated; see docs/data_formats.md.
        eod_id: The token that ends every document.
        bos_id: The token that begins every document; None: there is none.
    """

    config: ProjectConfig
    num_documents: int
    num_tokens: int
    vocab_size: int
    reused: bool
    report: dict[str, Any] = field(default_factory=dict)
    eod_id: int = 0
    bos_id: int | None = None


def preprocess_corpus(options: PreprocessCorpusOptions) -> PreprocessedCorpus:
    """Tokenize the inputs, and write config.json.

    Raises:
        CorpusError: an input is missing, empty or malformed.
        TokenizerError: the tokenizer cannot be loaded or trained.
        ConfigurationError: options that cannot work.
        ProjectError: the project was built with other options or inputs, another run works on it,
            or the disk is full.
    """
    initialize()
    with raise_together():
        _check_options(options)
    with stage_lock(ProjectPaths(options.project_dir), STAGE, create=True):
        return _preprocess(options)


def _preprocess(options: PreprocessCorpusOptions) -> PreprocessedCorpus:
    with raise_together():
        cleaner = text_cleaner() if options.clean_text else None
        sources = [Path(source) for source in options.input]
        inputs = digest_inputs(sources, recorded_inputs(ProjectPaths(options.project_dir), STAGE))
        inputs.update(_digest_tokenizer_files(options))
        choice = _choice(options, ProjectPaths(options.project_dir))
        if not choice.first_known_eod:
            inputs.update(_digest_declared_tokens(options))
        prefixes = name_datasets(sources, options.json_keys)
        _require_tokenizer(options, sources)
    paths = ProjectPaths(options.project_dir)
    tokenize_options = _tokenize_options(options)
    sample_options = _sample_options(options)
    outputs = [bin_path(paths.data / prefix) for prefix in prefixes]
    with raise_together():
        check_stage(paths, STAGE, {**tokenize_options, **sample_options}, inputs, outputs[0])
        # Of earlier versions, special tokens in a text were tokens, and no document had BOS.
        version = [] if choice.first_known_eod else [_TEXT_VERSION]
        fingerprint = fingerprint_of([tokenize_options, inputs, *version])
    names = _prepare_tokenizer(options, paths, sources, cleaner, fingerprint, choice)
    with raise_together():
        model, vocab, merges = (
            paths.root / name if (name := names[key]) else None for key in _FILES
        )
        tokenizer = build_tokenizer(_tokenizer_type(options), model, vocab, merges, choice)
        _follow_given_tokens(tokenizer, sources, options.add_bos_token, choice)
    made = []
    reader = CorpusReader(options.json_keys, options.id_key, cleaner)
    for source, prefix in zip(sources, prefixes, strict=True):
        made.append(make_dataset(source, paths.data / prefix, tokenizer, reader, fingerprint))
    with raise_together():
        datasets = [TokenFile(paths.data / prefix) for prefix in prefixes]
        for source, dataset in zip(sources, datasets, strict=True):
            check_documents(options.split, len(dataset), source)
        config = _make_config(options, paths, prefixes, datasets, names)
        passes = count_passes(config, datasets)
        report = _report(paths, prefixes, datasets, passes)
        if get_rank() == 0:
            _save(config, options, paths, None if choice.first_known_eod else tokenizer)
            finish_stage(paths, STAGE, {**tokenize_options, **sample_options}, inputs, report)
    barrier()
    result = PreprocessedCorpus(
        config,
        sum(len(dataset) for dataset in datasets),
        sum(len(dataset.tokens) for dataset in datasets),
        tokenizer.vocab_size,
        reused=all(shards is None for shards in made),
        report=report,
        eod_id=tokenizer.eod,
        bos_id=tokenizer.bos if tokenizer.adds_bos else None,
    )
    _summarize(result, options, tokenizer, passes)
    return result


_FILES = ("model", "vocab", "merges")
#: How text becomes tokens.
_TEXT_VERSION = "text is never special"


def _choice(options: PreprocessCorpusOptions, paths: ProjectPaths) -> SpecialTokenChoice:
    """What is asked for; of a project that is finished, what it was made with."""
    if paths.stage_record(STAGE).is_file() and paths.settings.is_file():
        return recorded_choice(paths)
    return SpecialTokenChoice(options.eod_token, options.bos_token, options.add_bos_token)


def _follow_given_tokens(
    tokenizer: Tokenizer, sources: Sequence[Path], asked: bool | None, choice: SpecialTokenChoice
) -> None:
    """Tokens that somebody has made decide whether the documents of the project have BOS."""
    given = [prefix for source in sources if (prefix := find_token_input(source)) is not None]
    if not given or (choice.add_bos is not None and asked is not False):
        return
    begun = begin_with_bos(given, tokenizer)
    if begun and asked is False:
        raise TokenizerError(
            bin_path(given[0]),
            f"documents begin with BOS ({tokenizer.bos}), and no document is to",
            "Leave --add-bos-token out, or make the tokens without",
        )
    tokenizer.adds_bos = begun


def _check_options(options: PreprocessCorpusOptions) -> None:
    raise_problems(list(_problems(options)))


def _problems(options: PreprocessCorpusOptions) -> Iterator[RetroError]:
    for check in (
        lambda: chunks_per_sample(options.seq_length, options.retro_chunk_length),
        lambda: parse_split(options.split),
    ):
        try:
            check()
        except RetroError as error:
            yield error
    for flag, least in (
        ("global_batch_size", 1),
        ("eval_interval", 1),
        ("eval_iters", 0),
        ("vocab_size", 1),
        ("retro_block_size", 1),
        ("train_samples", 1),
        ("tokenizer_training_documents", 1),
        ("seed", 0),
    ):
        value = getattr(options, flag)
        if value is not None and value < least:
            yield ConfigurationError(
                f"--{flag.replace('_', '-')}", str(value), f"Give at least {least}"
            )
    if options.seed >= 1 << 32:
        yield ConfigurationError("--seed", str(options.seed), "Give less than 2^32")
    if not 0 < options.train_epochs < math.inf:
        yield ConfigurationError("--train-epochs", str(options.train_epochs), "Give more than 0")
    if not options.input:
        yield ConfigurationError("--input", "none given", "Name a file or a folder")
    if not options.json_keys:
        yield ConfigurationError("--json-keys", "none given", "Name the key of the text")
    weights = options.input_weights
    usable = all(0 < weight < math.inf for weight in weights) and sum(weights) < math.inf
    if weights and (len(weights) != len(options.input) or not usable):
        yield ConfigurationError(
            "--input-weights",
            f"{weights} for {len(options.input)} inputs",
            "Give one positive weight per --input",
        )
    if options.tokenizer_type is None and (options.vocab_file or options.merge_file):
        yield ConfigurationError(
            "--vocab-file",
            "given without --tokenizer-type",
            "Add --tokenizer-type GPT2BPETokenizer",
        )


def _digest_tokenizer_files(options: PreprocessCorpusOptions) -> dict[str, str]:
    digests = {}
    for flag in ("tokenizer_model", "vocab_file", "merge_file"):
        if (value := getattr(options, flag)) is not None:
            digests[f"--{flag.replace('_', '-')}"] = checksum(_tokenizer_file(Path(value)))
    vocab = Path(options.bert_vocab_file) if options.bert_vocab_file else default_bert_vocab()
    digests["--bert-vocab-file"] = checksum(_tokenizer_file(vocab))
    return digests


def _digest_declared_tokens(options: PreprocessCorpusOptions) -> dict[str, str]:
    """A digest of what the tokenizer's directory says of special tokens."""
    given = options.tokenizer_model or options.vocab_file
    if given is None:
        return {}
    declared = DeclaredTokens.read(_tokenizer_file(Path(given)).parent)
    return {"special tokens of the tokenizer's directory": declared.digest} if declared else {}


def _tokenizer_file(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(file, "no such file", "Check the path")
    return file


def _tokenize_options(options: PreprocessCorpusOptions) -> dict[str, object]:
    training = options.tokenizer_model is None and options.vocab_file is None
    return {
        "--input": [Path(source).name for source in options.input],
        "--json-keys": options.json_keys,
        "--tokenizer-type": _tokenizer_type(options),
        "--vocab-size": options.vocab_size if training else None,
        "--tokenizer-training-documents": options.tokenizer_training_documents
        if training
        else None,
        # Only where it is set: projects made before it existed go on.
        **({"--clean-text": True} if options.clean_text else {}),
        **({"--id-key": options.id_key} if options.id_key != "id" else {}),
        **{
            f"--{name.replace('_', '-')}": value
            for name in ("eod_token", "bos_token", "add_bos_token")
            if (value := getattr(options, name)) is not None
        },
    }


def _sample_options(options: PreprocessCorpusOptions) -> dict[str, object]:
    return {
        "--input-weights": options.input_weights,
        "--seq-length": options.seq_length,
        "--retro-chunk-length": options.retro_chunk_length,
        "--split": options.split,
        "--train-samples": options.train_samples,
        "--train-epochs": None if options.train_samples else options.train_epochs,
        "--global-batch-size": options.global_batch_size,
        "--eval-interval": options.eval_interval,
        "--eval-iters": options.eval_iters,
        "--seed": options.seed,
        "--retro-block-size": options.retro_block_size,
    }


def _tokenizer_type(options: PreprocessCorpusOptions) -> str:
    if options.tokenizer_type is not None:
        if options.tokenizer_type not in TOKENIZER_TYPES:
            raise TokenizerError(
                "--tokenizer-type",
                repr(options.tokenizer_type),
                f"Choose one of {', '.join(TOKENIZER_TYPES)}",
            )
        return options.tokenizer_type
    model = options.tokenizer_model
    if model is not None and (Path(model).is_dir() or model.endswith(".json")):
        return HuggingFaceTokenizer.name
    return GPTSentencePieceTokenizer.name


def _prepare_tokenizer(
    options: PreprocessCorpusOptions,
    paths: ProjectPaths,
    sources: Sequence[Path],
    cleaner: Callable[[str], str] | None,
    fingerprint: str,
    choice: SpecialTokenChoice,
) -> dict[str, str | None]:
    """Put the tokenizers' files into the project; returns their types and names there."""
    tokenizer_type = _tokenizer_type(options)
    names: dict[str, str | None] = dict.fromkeys(_FILES)
    with raise_together():
        bert = Path(options.bert_vocab_file) if options.bert_vocab_file else default_bert_vocab()
        given = {
            "model": options.tokenizer_model,
            "vocab": options.vocab_file,
            "merges": options.merge_file,
            "bert": str(bert),
        }
        trains = tokenizer_type == GPTSentencePieceTokenizer.name and given["model"] is None
        if not trains:
            build_tokenizer(
                tokenizer_type,
                options.tokenizer_model,
                options.vocab_file,
                options.merge_file,
                choice,
            )
        for key, value in given.items():
            if value is None:
                continue
            file = _tokenizer_file(Path(value))
            name = f"bert-{file.name}" if key == "bert" else file.name
            names[key] = _copy(file, paths, name, fingerprint)
            if key in ("model", "vocab") and not choice.first_known_eod:
                for declaring in DECLARING_FILES:
                    if (beside := file.with_name(declaring)).is_file():
                        _copy(beside, paths, declaring, fingerprint)
        if trains:
            names["model"] = _train(options, paths, sources, cleaner, fingerprint)
    barrier()
    return {**names, "type": tokenizer_type}


def _copy(file: Path, paths: ProjectPaths, name: str, fingerprint: str) -> str:
    target = paths.tokenizer / name
    if get_rank() == 0 and state_of(target, fingerprint) is not FileState.COMPLETE:
        with signed_write(target, fingerprint) as temporary:
            shutil.copyfile(file, temporary)
    return paths.relative(target)


def _train(
    options: PreprocessCorpusOptions,
    paths: ProjectPaths,
    sources: Sequence[Path],
    cleaner: Callable[[str], str] | None,
    fingerprint: str,
) -> str:
    target = paths.tokenizer / "sentencepiece.model"
    if get_rank() == 0 and state_of(target, fingerprint) is not FileState.COMPLETE:
        texts = (text for source in sources for text in _texts(source, options.json_keys, cleaner))
        first = itertools.islice(texts, options.tokenizer_training_documents)
        with signed_write(target, fingerprint) as temporary:
            train_sentencepiece(first, options.vocab_size, temporary)
    return paths.relative(target)


def _texts(
    source: Path, json_keys: Sequence[str], cleaner: Callable[[str], str] | None
) -> Iterator[str]:
    found = False
    for document in read_documents(source, json_keys, cleaner):
        found = True
        yield document.text
    if not found:
        raise empty_corpus(source)


def _require_tokenizer(options: PreprocessCorpusOptions, sources: Sequence[Path]) -> None:
    """Tokens that were made elsewhere mean nothing without the tokenizer that made them."""
    if options.tokenizer_model is not None or options.vocab_file is not None:
        return
    for source in sources:
        if find_token_input(source) is not None:
            raise TokenizerError(
                f"--input {source}",
                "holds tokens, and no tokenizer is given",
                "Name the one that they were made with: --tokenizer-type, --tokenizer-model",
            )


def _make_config(
    options: PreprocessCorpusOptions,
    paths: ProjectPaths,
    prefixes: Sequence[str],
    datasets: Sequence[TokenFile],
    names: dict[str, str | None],
) -> ProjectConfig:
    train_samples = options.train_samples or _samples_of_epochs(options, datasets)
    weights = options.input_weights or [1.0] * len(prefixes)
    rows = train_samples * (options.seq_length // options.retro_chunk_length)
    config = ProjectConfig(
        retro_block_size=options.retro_block_size or choose_shard_length(rows, _LONGEST_BLOCK),
        retro_gpt_chunk_length=options.retro_chunk_length,
        retro_gpt_seq_length=options.seq_length,
        retro_gpt_global_batch_size=options.global_batch_size,
        retro_gpt_train_samples=train_samples,
        retro_gpt_eval_interval=options.eval_interval,
        retro_gpt_eval_iters=options.eval_iters,
        retro_gpt_split=options.split,
        retro_gpt_seed=options.seed,
        retro_gpt_data_path=[
            item
            for weight, prefix in zip(weights, prefixes, strict=True)
            for item in (str(weight), prefix)
        ],
        retro_gpt_tokenizer_type=str(names["type"]),
        retro_gpt_tokenizer_model=names["model"],
        retro_gpt_vocab_file=names["vocab"],
        retro_gpt_merge_file=names["merges"],
        retro_bert_tokenizer_type="BertWordPieceLowerCase",
        retro_bert_vocab_file=names["bert"],
        retro_neighbor_dirs={"train": None, "valid": None, "test": None},
    )
    _check_numbers(config, options)
    if paths.config.is_file():  # query_neighbors and update_db have filled these in
        before = ProjectConfig.load(paths.root)
        config.retro_neighbor_dirs = before.retro_neighbor_dirs
        config.retro_database = before.retro_database
    return config


def _check_numbers(config: ProjectConfig, options: PreprocessCorpusOptions) -> None:
    for split in SPLITS:
        if config.num_samples(split) * config.chunks_per_sample > np.iinfo(np.int64).max:
            flags = "--train-samples" if options.train_samples else "--train-epochs"
            raise ConfigurationError(
                flags if split == "train" else f"{flags} and --eval-iters",
                f"more {split} samples than can be numbered",
                "Give fewer",
            )


def _samples_of_epochs(options: PreprocessCorpusOptions, datasets: Sequence[TokenFile]) -> int:
    """Samples of `train_epochs` passes over the training documents, in whole batches."""
    tokens = 0
    for dataset in datasets:
        start, end = document_ranges(options.split, len(dataset))["train"]
        tokens += int(dataset.lengths[start:end].sum(dtype=np.int64))
    samples = int(options.train_epochs * (tokens - 1) // options.seq_length)
    batch = options.global_batch_size
    return max(samples // batch, 1) * batch


def _save(
    config: ProjectConfig,
    options: PreprocessCorpusOptions,
    paths: ProjectPaths,
    tokenizer: Tokenizer | None,
) -> None:
    """Write both configurations; the special tokens of `tokenizer` unless it is None."""
    config.save(paths.root)
    # One that is lost is made again.
    known = paths.settings.is_file()
    settings = ProjectSettings.load(paths.root) if known else ProjectSettings()
    settings.json_keys = options.json_keys
    settings.id_key, settings.clean_text = options.id_key, options.clean_text
    if tokenizer is not None:
        settings.eod_id, settings.bos_id = tokenizer.eod, tokenizer.bos
        settings.add_bos = tokenizer.adds_bos
    settings.save(paths.root)
    load_project_tokenizer(config, paths)


def _report(
    paths: ProjectPaths,
    prefixes: Sequence[str],
    datasets: Sequence[TokenFile],
    passes: Sequence[SplitPasses],
) -> dict[str, Any]:
    """Counts of all datasets together and of each, and how often the samples pass over a split."""
    each = {
        prefix: {
            **read_counts(paths.data / prefix),
            "documents": len(dataset),
            "tokens": len(dataset.tokens),
        }
        for prefix, dataset in zip(prefixes, datasets, strict=True)
    }
    return {
        **total(list(each.values())),
        "splits": {split.name: split.report for split in passes},
        "datasets": each,
    }


def _summarize(
    result: PreprocessedCorpus,
    options: PreprocessCorpusOptions,
    tokenizer: Tokenizer,
    passes: Sequence[SplitPasses],
) -> None:
    trained = options.tokenizer_model is None and options.vocab_file is None
    asked = options.vocab_size
    vocab = f"{result.vocab_size} pieces"
    if trained and result.vocab_size < asked:
        vocab += f" (lowered from {asked}: the corpus has no more)"
    rows = {
        "project": options.project_dir,
        "documents": f"{result.num_documents}{' (reused)' if result.reused else ''}",
        "tokens": result.num_tokens,
        **loss_rows(result.report),
        "tokenizer": f"{tokenizer.name}, {vocab}",
        "documents end with": _named(tokenizer, result.eod_id),
        "documents begin with": _named(tokenizer, result.bos_id),
        "samples": ", ".join(split.samples_text for split in passes),
        **{f"warning, {split.name}": split.warning for split in passes if split.warning},
        "chunks per sample": result.config.chunks_per_sample,
    }
    for prefix, counts in result.report["datasets"].items():
        for name, examples in counts.get("such_as", {}).items():
            rows[f"{name.replace('_', ' ')} of {prefix}"] = ", ".join(examples)
    print_summary(STAGE, rows)


def _named(tokenizer: Tokenizer, token: int | None) -> str:
    return "no BOS" if token is None else f"{tokenizer.token_name(token)} (token {token})"
