"""Shingles of a text: its sequences of n words, as hashes.

Words are compared without case, punctuation and Unicode's compatible forms (NFKC). In scripts
without spaces each character is a word. A text of fewer than n words is one shingle, so it equals
only texts of the same words. A text without words has no shingles, and no near-duplicates.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from retro_mcore.data.unspaced_scripts import UNSPACED

_BLOCKS = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED)
_WORD = re.compile(rf"[{_BLOCKS}]|[^\W_{_BLOCKS}]+")
#: Odd, so that multiplication modulo 2^64 loses nothing: 2^64 over the golden ratio.
_FACTOR = 0x9E3779B97F4A7C15
#: Finalizer of MurmurHash3: shift and factor of each round.
_ROUNDS = ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53))


def words_of(text: str) -> list[str]:
    """Words of a text, normalized."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(folded)


def shingles_of(text: str, length: int) -> np.ndarray:
    """Distinct shingles of a text, u64 [n], ascending. The same on every machine.

    Args:
        text: The text.
        length: Words per shingle.
    """
    words = words_of(text)
    if not words:
        return np.empty(0, np.uint64)
    codes = np.fromiter(map(_code, words), np.uint64, len(words))
    length = min(length, len(words))
    factors = np.array([pow(_FACTOR, power, 1 << 64) for power in range(length)], np.uint64)
    sums = (sliding_window_view(codes, length) * factors).sum(axis=1, dtype=np.uint64)
    return np.unique(_mixed(sums))


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sets of shingles: those of both over those of either."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / max(len(first) + len(second) - common, 1)


def digest_of(shingles: np.ndarray) -> int:
    """Digest of a set of shingles, 64 bits; 0 only for an empty one."""
    if not len(shingles):
        return 0
    return _hash(shingles.astype("<u8").tobytes()) or 1


@lru_cache(1 << 18)
def _code(word: str) -> int:
    return _hash(word.encode("utf-8", "surrogatepass"))


def _hash(value: bytes) -> int:
    return int.from_bytes(blake2b(value, digest_size=8).digest(), "little")


def _mixed(values: np.ndarray) -> np.ndarray:
    for shift, factor in _ROUNDS:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))
