"""Configuration of `preprocess_corpus`, its checks, and the options that the stage records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from retro_mcore.chunking import SampleLayout, chunks_per_sample
from retro_mcore.data.near_duplicates.options import LEAST_THRESHOLD, NearDuplicates
from retro_mcore.data.tokenizers.gguf import read_gguf_tokenizer
from retro_mcore.data.tokenizers.loading import (
    TOKENIZER_TYPES,
    GPT2BPETokenizer,
    GPTSentencePieceTokenizer,
    HuggingFaceTokenizer,
)
from retro_mcore.data.tokens.splits import parse_split
from retro_mcore.errors import ConfigurationError, RetroError, TokenizerError, flag_of, too_small
from retro_mcore.gguf_file import is_gguf
from retro_mcore.project.config import NearDuplicateMode
from retro_mcore.time_limit import DataTimeLimit

_LEAST = {
    "global_batch_size": 1,
    "eval_interval": 1,
    "eval_iters": 0,
    "vocab_size": 1,
    "retro_block_size": 1,
    "train_samples": 1,
    "tokenizer_training_documents": 1,
    "seed": 0,
}
_GPT2_FILES = ("vocab_file", "merge_file")
_VOCAB_SIZE, _TRAINING_DOCUMENTS = 8192, 1_000_000


@dataclass(kw_only=True)
class PreprocessCorpusConfig(DataTimeLimit):
    """Configuration of `preprocess_corpus`."""

    input: list[str]
    """JSONL files (also .gz, .zst), text files, folders of these (links are followed), or Megatron
    .bin/.idx pairs. Each becomes a separate dataset."""
    input_weights: list[float] = field(default_factory=list)
    """Weight of each input in the samples (default: equal)."""
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    """Keys of a JSON line that contain the text. Several texts are joined by an empty line."""
    id_key: str = "id"
    """Key of a JSON line that contains its id, shown as a neighbor's source (lines without one:
    file and byte)."""
    clean_text: bool = False
    """Clean texts with ftfy: mojibake, control characters, HTML entities."""
    tokenizer_type: str | None = None
    """GPTSentencePieceTokenizer, GPT2BPETokenizer or HuggingFaceTokenizer (default: trained
    SentencePiece)."""
    tokenizer_model: str | None = None
    """SentencePiece .model, a Hugging Face tokenizer.json or its directory, or a .gguf file."""
    vocab_file: str | None = None
    """GPT-2's vocab.json."""
    merge_file: str | None = None
    """GPT-2's merges.txt."""
    eod_token: str | None = None
    """Token that ends a document, as text or id (default: from the tokenizer's files)."""
    bos_token: str | None = None
    """Token that begins a text, as text or id (default: from the tokenizer's files)."""
    add_bos_token: bool | None = None
    """Begin every document, and later every prompt, with BOS (default: as the tokenizer does; for
    tokenized inputs: as they do)."""
    vocab_size: int | None = None
    """Vocabulary size of a trained tokenizer (default: 8192). Reduced for a small corpus."""
    tokenizer_training_documents: int | None = None
    """Number of documents to train a tokenizer on, from the beginning of the inputs (default: a
    million); at most 250 million characters of them are used."""
    bert_vocab_file: str | None = None
    """WordPiece vocabulary for counting the tokens of chunks (default: MiniLM's)."""
    samples: SampleLayout | None = None
    """aligned: every document begins a chunk and is padded to whole chunks, so its chunks are
    searched once for all samples. packed: documents follow one another, as in Megatron
    (default: the project's; aligned for a new one)."""
    near_duplicates: NearDuplicateMode = "keep"
    """What to do with documents that are nearly the same. keep: not searched for. count: report
    them. exclude-neighbors: no document retrieves its near-duplicates. decontaminate: drop training
    documents that are near-duplicates of held-out documents. drop: also drop those of earlier
    training documents."""
    near_duplicate_threshold: float | None = None
    """Least Jaccard similarity of near-duplicates: word sequences in both documents over those in
    either (default: 0.8)."""
    near_duplicate_words: int | None = None
    """Words per sequence for comparing documents (default: 5)."""
    seq_length: int = 512
    """Tokens per sample."""
    retro_chunk_length: int = 64
    """Tokens per chunk."""
    split: str = "90,5,5"
    """Percentages of training, validation and test documents."""
    train_samples: int | None = None
    """Number of samples in the whole training (default: determined by --train-epochs)."""
    train_epochs: float | None = None
    """Passes over the training documents, which determine the number of samples (default: 1)."""
    global_batch_size: int = 8
    """Samples per training step."""
    eval_interval: int = 1000
    """Training steps between evaluations."""
    eval_iters: int = 10
    """Batches per evaluation."""
    seed: int = 1234
    """Seed for the order of the samples."""
    retro_block_size: int | None = None
    """Rows per file of embeddings and neighbors (default: a 64th of the chunks, aligned of the
    documents, packed of the training samples, but 64 to 100,000)."""

    @property
    def trains_tokenizer(self) -> bool:
        """Whether no tokenizer is given, so that one is trained on the corpus."""
        return self.tokenizer_model is None and self.vocab_file is None

    @property
    def trained_vocab_size(self) -> int:
        """Vocabulary size to train a tokenizer for."""
        return _VOCAB_SIZE if self.vocab_size is None else self.vocab_size

    @property
    def training_documents(self) -> int:
        """Number of documents to train a tokenizer on."""
        given = self.tokenizer_training_documents
        return _TRAINING_DOCUMENTS if given is None else given

    @property
    def epochs(self) -> float | None:
        """Passes over the training documents; None: the number of samples is given."""
        if self.train_samples is not None:
            return None
        return 1.0 if self.train_epochs is None else self.train_epochs

    def chosen_tokenizer_type(self) -> str:
        """Type that is given, or inferred from the tokenizer's file.

        Raises:
            TokenizerError: the type is unknown, or not that of a GGUF file's tokenizer.
        """
        if self.tokenizer_type is not None:
            if self.tokenizer_type not in TOKENIZER_TYPES:
                raise TokenizerError(
                    "--tokenizer-type",
                    repr(self.tokenizer_type),
                    f"Choose one of {', '.join(TOKENIZER_TYPES)}",
                )
            self._check_gguf_type()
            return self.tokenizer_type
        model = self.tokenizer_model
        if model is not None and is_gguf(model):
            return read_gguf_tokenizer(Path(model)).type
        if model is not None and (Path(model).is_dir() or model.endswith(".json")):
            return HuggingFaceTokenizer.name
        return GPTSentencePieceTokenizer.name

    def _check_gguf_type(self) -> None:
        model = self.tokenizer_model
        if model is None or not is_gguf(model):
            return
        found = read_gguf_tokenizer(Path(model)).type
        if found != self.tokenizer_type:
            raise TokenizerError(
                f"--tokenizer-type {self.tokenizer_type}",
                f"given, and the tokenizer of {model} is a {found}",
                "Leave --tokenizer-type out",
            )

    @property
    def near(self) -> NearDuplicates:
        """How near-duplicates are searched and treated."""
        threshold, words = self.near_duplicate_threshold, self.near_duplicate_words
        return NearDuplicates.of(self.near_duplicates, threshold, words)

    @property
    def document_multiple(self) -> int:
        """Number of tokens that documents are padded to a multiple of; 1: not padded."""
        return self.retro_chunk_length if self.samples == "aligned" else 1


def problems_of(config: PreprocessCorpusConfig) -> Iterator[RetroError]:
    """Errors for all invalid values."""
    for check in (
        lambda: chunks_per_sample(config.seq_length, config.retro_chunk_length),
        lambda: parse_split(config.split),
    ):
        try:
            check()
        except RetroError as error:
            yield error
    yield from too_small(config, _LEAST)
    yield from near_duplicate_problems(config)
    if config.seed >= 1 << 32:
        yield ConfigurationError("--seed", str(config.seed), "Give less than 2^32")
    if config.train_epochs is not None and not 0 < config.train_epochs < math.inf:
        yield ConfigurationError("--train-epochs", str(config.train_epochs), "Give more than 0")
    if config.train_samples is not None and config.train_epochs is not None:
        yield ConfigurationError("--train-samples and --train-epochs", "both given", "Give one")
    if config.samples not in (None, *get_args(SampleLayout)):
        yield ConfigurationError("--samples", repr(config.samples), "Choose aligned or packed")
    if not config.input:
        yield ConfigurationError("--input", "none given", "Name a file or a folder")
    if not config.json_keys:
        yield ConfigurationError("--json-keys", "none given", "Name the key of the text")
    weights = config.input_weights
    usable = all(0 < weight < math.inf for weight in weights) and sum(weights) < math.inf
    if weights and (len(weights) != len(config.input) or not usable):
        yield ConfigurationError(
            "--input-weights",
            f"{weights} for {len(config.input)} inputs",
            "Give one positive weight per --input",
        )
    yield from _tokenizer_problems(config)


def _tokenizer_problems(config: PreprocessCorpusConfig) -> Iterator[RetroError]:
    """Errors for options of the tokenizer that nothing would read."""
    kind, unread = config.tokenizer_type, ""
    if kind is None and (config.vocab_file or config.merge_file):
        yield ConfigurationError(
            "--vocab-file",
            "given without --tokenizer-type",
            "Add --tokenizer-type GPT2BPETokenizer",
        )
        return
    if kind in TOKENIZER_TYPES:
        files = ("tokenizer_model",) if kind == GPT2BPETokenizer.name else _GPT2_FILES
        unread = " and ".join(flag_of(name) for name in files if getattr(config, name) is not None)
    if unread:
        found = f"given with --tokenizer-type {kind}, which does not read it"
        yield ConfigurationError(unread, found, "Leave it out")
    for name in () if config.trains_tokenizer else ("vocab_size", "tokenizer_training_documents"):
        if getattr(config, name) is not None:
            found = "given with a tokenizer, so none is trained"
            yield ConfigurationError(flag_of(name), found, "Leave it out")


def text_options(config: PreprocessCorpusConfig) -> dict[str, object]:
    """Options that determine the tokens, by flag, for the stage's record.

    Raises:
        TokenizerError: the tokenizer's type is unknown.
    """
    training = config.trains_tokenizer
    options: dict[str, object] = {
        "--input": [Path(source).name for source in config.input],
        "--json-keys": config.json_keys,
        "--tokenizer-type": config.chosen_tokenizer_type(),
        "--vocab-size": config.trained_vocab_size if training else None,
        "--tokenizer-training-documents": config.training_documents if training else None,
    }
    # Only if set, so that projects of versions without these flags stay valid.
    if config.clean_text:
        options["--clean-text"] = True
    if config.samples == "aligned":
        options["--samples"] = config.samples
        options["--retro-chunk-length"] = config.retro_chunk_length
    if config.id_key != "id":
        options["--id-key"] = config.id_key
    for name in ("eod_token", "bos_token", "add_bos_token"):
        if (value := getattr(config, name)) is not None:
            options[flag_of(name)] = value
    return options


def near_duplicate_problems(config: PreprocessCorpusConfig) -> Iterator[RetroError]:
    """Errors for invalid options of near-duplicates."""
    mode, modes = config.near_duplicates, get_args(NearDuplicateMode)
    threshold, words = config.near_duplicate_threshold, config.near_duplicate_words
    if mode not in modes:
        yield ConfigurationError(
            "--near-duplicates", repr(mode), f"Choose one of {', '.join(modes)}"
        )
    for flag, value in (
        ("--near-duplicate-threshold", threshold),
        ("--near-duplicate-words", words),
    ):
        if mode == "keep" and value is not None:
            yield ConfigurationError(
                flag, "given without --near-duplicates", "Add --near-duplicates count, or leave out"
            )
    if threshold is not None and not LEAST_THRESHOLD <= threshold <= 1:
        yield ConfigurationError(
            "--near-duplicate-threshold", str(threshold), f"Give {LEAST_THRESHOLD} to 1"
        )
    if words is not None and words < 1:
        yield ConfigurationError("--near-duplicate-words", str(words), "Give at least 1")


def near_duplicate_options(config: PreprocessCorpusConfig) -> dict[str, object]:
    """Options of near-duplicates, by flag, for the stage's record; empty if they are kept."""
    near = config.near
    if near.mode == "keep":
        return {}
    return {
        "--near-duplicates": near.mode,
        "--near-duplicate-threshold": near.threshold,
        "--near-duplicate-words": near.words,
    }


def sample_options(config: PreprocessCorpusConfig) -> dict[str, object]:
    """Options that determine the samples, by flag, for the stage's record."""
    return {
        "--input-weights": config.input_weights,
        "--seq-length": config.seq_length,
        "--retro-chunk-length": config.retro_chunk_length,
        "--split": config.split,
        "--train-samples": config.train_samples,
        "--train-epochs": config.epochs,
        "--global-batch-size": config.global_batch_size,
        "--eval-interval": config.eval_interval,
        "--eval-iters": config.eval_iters,
        "--seed": config.seed,
        "--retro-block-size": config.retro_block_size,
    }
