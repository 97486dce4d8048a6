"""Train a SentencePiece model on a corpus."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from retro_mcore.errors import TokenizerError
from retro_mcore.project.atomic import atomic_write

#: Longest line that a SentencePiece model is trained on, in bytes.
_LONGEST_LINE = 4192
#: Characters that a model is trained on at most: training takes about four times their memory.
MOST_CHARACTERS = 250_000_000
_LOG = logging.getLogger(__name__)


def first_characters(texts: Iterable[str], most: int = MOST_CHARACTERS) -> Iterator[str]:
    """The first texts, up to so many characters; logs where text is left out."""
    left = most
    for number, text in enumerate(texts):
        if len(text) > left:
            _LOG.info(
                "the tokenizer is trained on %d characters, of %d documents", most, number + 1
            )
            yield text[:left]
            return
        left -= len(text)
        yield text


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path | str) -> int:
    """Train a SentencePiece BPE model with byte fallback and write it to `path`.

    Text is not normalized, and characters without a piece become bytes, so
    `GPTSentencePieceTokenizer` restores any text exactly. The same texts give the same file. A
    corpus too small for `vocab_size` pieces yields fewer.

    Returns:
        The number of pieces.

    Raises:
        TokenizerError: the texts hold no characters, or `vocab_size` is too small for all bytes
            and the corpus's characters.
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
    return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())


class _TrainingLines:
    """Lines suitable for SentencePiece training; records an error raised by `texts`.

    SentencePiece reserves tabs, drops lines that are too long, and treats an exception in its
    iterator as the end of the text.
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
        """Raise the error that stopped `texts`, if any."""
        if self._error is not None:
            raise self._error
