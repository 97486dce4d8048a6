"""An embedder that needs no model: hashed TF-IDF through a random projection.

Words and pairs of neighboring words are hashed into buckets. Buckets are weighted by how rare they
are in the database and projected by random signs to a fixed dimension. This preserves inner
products up to noise (Johnson-Lindenstrauss; Achlioptas 2003, "Database-friendly random
projections"). All arithmetic before the last normalization uses integers, so vectors are bitwise
identical in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from retro_mcore.errors import ProjectError
from retro_mcore.project.arrays import load_array
from retro_mcore.project.markers import verify
from retro_mcore.retrieval.embedders.base import LEXICAL_EMBEDDER, Embedder

_BUCKETS = 1 << 17
_DIMENSION = 256
_SEED = b"retro-mcore lexical embedder, version 1"
#: Steps per unit of a bucket's weight.
_SCALE = 16
#: Texts counted or embedded together; bounds the memory.
_TEXTS = 1024
_WORD = re.compile(r"\w+|[^\w\s]")


def buckets_of(text: str) -> list[int]:
    """Buckets of all words and pairs of neighboring words, with repetitions."""
    words = [word.encode() for word in _WORD.findall(text.lower())]
    features = words + [b"%b %b" % pair for pair in itertools.pairwise(words)]
    return [crc32(feature) % _BUCKETS for feature in features]


def count_texts(texts: Iterable[str]) -> np.ndarray:
    """Count the texts that contain each bucket, i64 [buckets + 1]; the last entry counts all texts.

    Counts of subsets of the texts can be added.
    """
    counts, remaining = np.zeros(_BUCKETS + 1, np.int64), iter(texts)
    while batch := list(itertools.islice(remaining, _TEXTS)):
        found = [bucket for text in batch for bucket in set(buckets_of(text))]
        counts[:-1] += np.bincount(np.array(found, np.int64), minlength=_BUCKETS)
        counts[-1] += len(batch)
    return counts


def weights_of(counts: np.ndarray) -> np.ndarray:
    """Inverse document frequencies in fixed point, u16 [buckets], from `count_texts`."""
    total = int(counts[-1])
    # One logarithm per distinct count, rounded far more coarsely than machines differ.
    seen, where = np.unique(counts[:-1], return_inverse=True)
    weights = [round(_SCALE * (1 + math.log((1 + total) / (1 + int(n))))) for n in seen]
    return np.array(weights, np.uint16)[where]


class LexicalEmbedder(Embedder):
    """Places texts that share rare words and phrases near each other.

    Vectors are L2-normalized; an empty text's is zero.

    Args:
        weights: Weights of the buckets, from `weights_of`.
    """

    name = LEXICAL_EMBEDDER
    dimension = _DIMENSION

    def __init__(self, weights: np.ndarray) -> None:
        self._weights = torch.from_numpy(weights.astype(np.int64))
        bits = hashlib.shake_256(_SEED).digest(_BUCKETS * _DIMENSION // 8)
        signs = np.unpackbits(np.frombuffer(bits, np.uint8)).astype(np.int8) * np.int8(2) - 1
        self._signs = torch.from_numpy(signs.astype(np.int8).reshape(_BUCKETS, _DIMENSION))

    @classmethod
    def load(cls, path: Path) -> LexicalEmbedder:
        """Read the weights that `build_index` saved.

        Raises:
            ProjectError: there are none.
            CorruptFileError: the file is malformed.
        """
        if not path.is_file():
            raise ProjectError(path, "no such file", "Run build_index --embedder lexical first")
        hint = "Run build_index --embedder lexical again"
        verify(path, hint)
        return cls(load_array(path, (_BUCKETS,), "u", hint))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), _DIMENSION), np.float32)
        for start in range(0, len(texts), _TEXTS):
            vectors[start : start + _TEXTS] = self._embed_few(texts[start : start + _TEXTS])
        return vectors

    def _embed_few(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts together, f64 [n, dimension]."""
        found = [buckets_of(text) for text in texts]
        starts = np.cumsum([0, *map(len, found)])[:-1]
        buckets = torch.tensor([bucket for each in found for bucket in each], dtype=torch.int64)
        used, places = torch.unique(buckets, return_inverse=True)
        # Doubles hold these sums of integers exactly, in any order.
        table = self._signs[used].double() * self._weights[used, None]
        summed = torch.nn.functional.embedding_bag(
            places, table, torch.from_numpy(starts), mode="sum"
        )
        sums = summed.numpy().astype(np.int64)
        lengths = np.sqrt((sums**2).sum(axis=1, keepdims=True).astype(np.float64))
        return sums / np.where(lengths, lengths, 1)
