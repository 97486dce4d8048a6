"""Tokenize answers in any script into words, for metrics that compare them.

For ASCII texts the words are those of the official SQuAD and ROUGE programs. Beyond ASCII the same
rules apply by Unicode category after NFKC normalization, so composed accents and full-width letters
make no difference. Scripts without spaces between words are split into characters (with their
combining marks).
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterator

from retro_mcore.data.unspaced_scripts import UNSPACED

_ARTICLES = {"a", "an", "the"}


def normal_form(text: str) -> str:
    """Case-folded NFKC without format characters (such as a zero-width space)."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(char for char in folded if unicodedata.category(char) != "Cf")


def answer_words(text: str) -> list[str]:
    """Words as in SQuAD: without case, punctuation and (English) articles."""
    words = _without_punctuation(normal_form(text)).split()
    return [piece for word in words if word not in _ARTICLES for piece in _split(word)]


def words_with_articles(text: str) -> list[str]:
    """Like `answer_words`, but with articles."""
    words = _without_punctuation(normal_form(text)).split()
    return [piece for word in words for piece in _split(word)]


def join_words(words: list[str]) -> str:
    """Join words with spaces, except between characters of scripts without spaces."""
    text = ""
    for before, word in zip(["", *words], words, strict=False):
        joined = not before or (_is_unspaced(before[0]) and _is_unspaced(word[0]))
        text += word if joined else f" {word}"
    return text


def rouge_words(text: str) -> list[str]:
    """Runs of letters and digits, as in ROUGE's own tokenizer for ASCII; not stemmed.

    Beyond ASCII, a symbol such as an emoji is a separate word.
    """
    kept = "".join(_rouge_char(char) for char in normal_form(text))
    return [piece for word in kept.split() for piece in _split(word)]


def _without_punctuation(text: str) -> str:
    return "".join(
        char
        for char in text
        if char not in string.punctuation and not unicodedata.category(char).startswith("P")
    )


def _rouge_char(char: str) -> str:
    if char.isascii():
        return char if char.isalnum() else " "
    kind = unicodedata.category(char)[0]
    return f" {char} " if kind == "S" else char if kind in "LMN" else " "


def _split(word: str) -> Iterator[str]:
    """The word itself, or its characters if the script has no spaces between words."""
    if word.isascii():
        yield word
        return
    piece, unspaced = "", False
    for char in word:
        if unicodedata.category(char).startswith("M"):
            piece += char
            continue
        now = _is_unspaced(char)
        if piece and (now or unspaced):
            yield piece
            piece = ""
        piece, unspaced = piece + char, now
    if piece:
        yield piece


def _is_unspaced(char: str) -> bool:
    code = ord(char)
    return any(first <= code <= last for first, last in UNSPACED)
