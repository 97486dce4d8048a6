"""Tokenizers that the database, the datasets and generation share, without megatron.

They describe themselves as Megatron's legacy tokenizers do (`unique_identifiers`), because the
names of the neighbor directories are a hash of that description.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from retro_mcore.errors import TokenizerError
from retro_mcore.project.atomic import atomic_write
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.markers import FileState, marker_path, state_of
from retro_mcore.project.paths import ProjectPaths

END_OF_TEXT = "<|endoftext|>"
#: Longest line, in bytes, that a SentencePiece model is trained on.
_LONGEST_LINE = 4192


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: The value of `--tokenizer-type` and of `retro_gpt_tokenizer_type`.
        files: The files it was loaded from, in the order of Megatron's constructors.
        unique_identifiers: Class, paths and options as Megatron's legacy tokenizer records them.
    """

    name: ClassVar[str]
    _options: ClassVar[dict[str, str]] = {}

    def __init__(self, *files: Path | str) -> None:
        self.files = [Path(file) for file in files]
        for file in self.files:
            if not file.exists():
                raise TokenizerError(file, "no such file", f"Name the file of a {self.name}")
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = f"_{self.name}"
        self.unique_identifiers["tokenizer_path"] = [str(file) for file in self.files]
        self.unique_identifiers.update(self._options)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id of the token that ends a document."""

    @property
    def bos(self) -> int | None:
        """Id of the token that begins a text, if there is one."""
        return None

    @property
    def pad(self) -> int | None:
        """Id of the padding token, if there is one."""
        return None

    @abstractmethod
    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    @abstractmethod
    def detokenize_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each sequence of ids."""

    def count_losses(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> dict[str, int]:
        """What tokenizing has lost of some texts, by name, such as `removed_newlines`.

        `preprocess_corpus` adds the numbers up, and shows and records those that are not 0.
        """
        return {}

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self.tokenize_batch([text])[0]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return self.detokenize_batch([ids])[0]


class GPTSentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its </s> ends a document."""

    name = "GPTSentencePieceTokenizer"
    _options: ClassVar[dict[str, str]] = {"vocab_extra_ids": "0"}

    def __init__(self, model: Path | str) -> None:
        super().__init__(model)
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(
                model, "not a SentencePiece model", "Name a .model file of SentencePiece"
            ) from error
        if self._processor.eos_id() < 0:
            raise TokenizerError(
                model, "has no </s> to end documents with", "Train it with an eos_id"
            )

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def eod(self) -> int:
        return int(self._processor.eos_id())

    @property
    def bos(self) -> int | None:
        return _id_or_none(self._processor.bos_id())

    @property
    def pad(self) -> int | None:
        return _id_or_none(self._processor.pad_id())

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def detokenize_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        if not len(ids):
            return []
        return self._processor.decode(_plain(ids), num_threads=1)


class _FastTokenizer(Tokenizer):
    """One of Hugging Face's tokenizers, which work in Rust."""

    _eod: int

    def _use(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Ids may have gaps, so the number of tokens says too little.
        self._vocab_size = max(tokenizer.get_vocab().values()) + 1

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eod(self) -> int:
        return self._eod

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "Fast" leaves out offsets in the text, which nobody reads.
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def detokenize_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self._tokenizer.decode_batch(_plain(ids), skip_special_tokens=False)


class GPT2BPETokenizer(_FastTokenizer):
    """GPT-2's byte-level BPE; <|endoftext|> ends a document and is never read from text."""

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: Path | str, merge_file: Path | str) -> None:
        super().__init__(vocab_file, merge_file)
        from tokenizers import ByteLevelBPETokenizer

        try:
            # Without the class around it, which lacks encode_batch_fast.
            self._use(ByteLevelBPETokenizer(str(vocab_file), str(merge_file))._tokenizer)
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise TokenizerError(
                vocab_file, f"not GPT-2 vocab and merges ({error})", "Name vocab.json, merges.txt"
            ) from error
        eod = self._tokenizer.token_to_id(END_OF_TEXT)
        if eod is None:
            raise TokenizerError(vocab_file, f"lacks {END_OF_TEXT}", "Name GPT-2's vocab.json")
        self._eod = int(eod)


class HuggingFaceTokenizer(_FastTokenizer):
    """A tokenizer.json, or a directory that holds one."""

    name = "HuggingFaceTokenizer"
    _EOD_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<EOD>", "[EOD]", "[SEP]")

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        import tokenizers

        file = _tokenizer_json(Path(path))
        try:
            self._use(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise TokenizerError(
                file, f"not a tokenizer.json ({error})", "Name a tokenizer.json or its directory"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = (self._tokenizer.token_to_id(token) for token in self._EOD_TOKENS)
        eod = next((token_id for token_id in known if token_id is not None), None)
        if eod is None:
            raise TokenizerError(
                file,
                f"has none of {', '.join(self._EOD_TOKENS)} to end documents with",
                "Add one as a special token",
            )
        self._eod = int(eod)

    @property
    def pad(self) -> int | None:
        return next(
            (
                token_id
                for token in ("<pad>", "[PAD]", "<|pad|>")
                if (token_id := self._tokenizer.token_to_id(token)) is not None
            ),
            None,
        )

    @property
    def bos(self) -> int | None:
        return next(
            (
                token_id
                for token in ("<s>", "<|begin_of_text|>", "<bos>")
                if (token_id := self._tokenizer.token_to_id(token)) is not None
            ),
            None,
        )


def _plain(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of Python integers; the Rust and C++ libraries take no others."""
    return [
        row if type(row) is list and (not row or type(row[0]) is int) else list(map(int, row))
        for row in ids
    ]


def _tokenizer_json(path: Path) -> Path:
    """The file, or the one in a model's directory."""
    file = path / "tokenizer.json"
    if not path.is_dir() or file.is_file():
        return file if path.is_dir() else path
    mend = "Save the model's fast tokenizer there: save_pretrained makes a tokenizer.json"
    if (path / "tokenizer.model").is_file():
        mend = f"Use GPTSentencePieceTokenizer --tokenizer-model {path / 'tokenizer.model'}"
    elif (path / "vocab.json").is_file():
        files = f"--vocab-file {path / 'vocab.json'} --merge-file {path / 'merges.txt'}"
        mend = f"Use GPT2BPETokenizer {files}"
    raise TokenizerError(path, "has no tokenizer.json", mend)


def _id_or_none(token_id: int) -> int | None:
    return int(token_id) if token_id >= 0 else None


TOKENIZER_TYPES = (
    GPTSentencePieceTokenizer.name,
    GPT2BPETokenizer.name,
    HuggingFaceTokenizer.name,
)


def build_tokenizer(
    tokenizer_type: str,
    model: Path | str | None = None,
    vocab_file: Path | str | None = None,
    merge_file: Path | str | None = None,
) -> Tokenizer:
    """Load a tokenizer by Megatron's flags.

    Raises:
        TokenizerError: an unknown type, a flag that the type needs is not given, or a bad file.
    """
    if tokenizer_type == GPT2BPETokenizer.name:
        if vocab_file is None or merge_file is None:
            raise TokenizerError(
                "--vocab-file and --merge-file", "not both given", f"{tokenizer_type} needs them"
            )
        return GPT2BPETokenizer(vocab_file, merge_file)
    if tokenizer_type not in TOKENIZER_TYPES:
        raise TokenizerError(
            "--tokenizer-type", repr(tokenizer_type), f"Choose one of {', '.join(TOKENIZER_TYPES)}"
        )
    if model is None:
        raise TokenizerError("--tokenizer-model", "not given", f"{tokenizer_type} needs it")
    if tokenizer_type == HuggingFaceTokenizer.name:
        return HuggingFaceTokenizer(model)
    return GPTSentencePieceTokenizer(model)


def load_project_tokenizer(config: ProjectConfig, paths: ProjectPaths) -> Tokenizer:
    """The tokenizer that the project's tokens were made with.

    Raises:
        TokenizerError: a file is missing, malformed, or not the one that the project was built
            with.
    """

    def resolve(name: str | None) -> Path | None:
        if name is None:
            return None
        path = paths.root / name
        if not path.exists():
            raise TokenizerError(path, "no such file, but config.json names it", "Restore it")
        if marker_path(path).exists() and state_of(path) is not FileState.COMPLETE:
            raise TokenizerError(
                path, "not the tokenizer that the project was built with", "Restore the file"
            )
        return path

    return build_tokenizer(
        config.retro_gpt_tokenizer_type,
        resolve(config.retro_gpt_tokenizer_model),
        resolve(config.retro_gpt_vocab_file),
        resolve(config.retro_gpt_merge_file),
    )


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path | str) -> int:
    """Train a byte-level-complete SentencePiece BPE model and write it to `path`.

    Lossless for any text: nothing is normalized, unknown characters fall back to bytes. The same
    texts give the same file. A corpus too small for `vocab_size` pieces gives fewer.

    Returns:
        The number of pieces.

    Raises:
        TokenizerError: the texts hold no characters, or `vocab_size` has no room for the bytes and
            the corpus's characters.
    """
    import sentencepiece

    model, lines = io.BytesIO(), _TrainingLines(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_LONGEST_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        lines.raise_error()
        needed = re.search(r"(\d+) vs (\d+)", str(error))
        raise TokenizerError(
            "--vocab-size",
            f"{vocab_size} pieces are fewer than the {needed[2]} bytes and characters of the corpus"
            if needed
            else "the corpus holds no text to train a tokenizer on",
            f"Choose at least {needed[2]}" if needed else "Check --input",
        ) from error
    lines.raise_error()
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return GPTSentencePieceTokenizer(path).vocab_size


class _TrainingLines:
    """Lines that SentencePiece can learn from; keeps an error of `texts`.

    SentencePiece reserves tabs, drops lines that are too long, and takes an exception of its
    iterator for the end of the text.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                yield from self._lines(text)
        except Exception as error:  # raised again by raise_error
            self._error = error

    @staticmethod
    def _lines(text: str) -> Iterator[str]:
        width = _LONGEST_LINE // 4  # a character takes up to four bytes
        for line in text.replace("\t", " ").replace("\0", " ").splitlines():
            yield from (line[start : start + width] for start in range(0, len(line), width))

    def raise_error(self) -> None:
        """Raise what stopped the texts, if anything did."""
        if self._error is not None:
            raise self._error
