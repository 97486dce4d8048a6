"""Static embedders: the mean of the vectors of a text's tokens, with no model to run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.embedders.base import Embedder, Pooling
from retro_mcore.retrieval.embedders.loading import cannot_load
from retro_mcore.retrieval.embedders.static_models import (
    STATIC_EMBEDDER,
    StaticFiles,
    find_static_files,
    installed_files,
    is_static,
    read_token_vectors,
)

#: Texts tokenized in one call.
_TEXTS = 4096


class StaticEmbedder(Embedder):
    """A static model. It reads texts of any length; a text without tokens gets zeros.

    Args:
        name: Name that it was built from.
        files: Its files.

    Raises:
        ConfigurationError: the files are damaged, or do not go together.
    """

    def __init__(self, name: str, files: StaticFiles) -> None:
        self.name, self._normalize = name, files.normalize
        self.files = {"model": [files.weights, files.tokenizer, *files.settings]}
        try:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(files.tokenizer))
            table, drops_unknown = read_token_vectors(files.weights)
        except Exception as error:  # tokenizers raises plain Exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise cannot_load(name, reason) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokens = self._tokenizer.get_vocab_size()
        if tokens > len(table):
            raise cannot_load(name, f"{len(table)} vectors for {tokens} tokens")
        self._unknown = _unknown_token(self._tokenizer) if drops_unknown else None
        self._table, self.dimension = torch.from_numpy(table), table.shape[1]

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        return np.array([len(ids) for ids in self._tokenize(texts)], np.int64)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimension), np.float32)
        for start in range(0, len(texts), _TEXTS):
            rows = slice(start, start + _TEXTS)
            vectors[rows] = self._means(self._tokenize(texts[rows]))
        if self._normalize:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors /= np.where(lengths > 0, lengths, 1)
        return vectors

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        encoded = encode(list(texts), add_special_tokens=False)
        rows = [text.ids for text in encoded]
        if self._unknown is None:
            return rows
        return [[token for token in row if token != self._unknown] for row in rows]

    def _means(self, rows: list[list[int]]) -> np.ndarray:
        """Mean of the token vectors of each row, f32 [rows, dimension]."""
        ends = np.cumsum([len(row) for row in rows])
        tokens = np.fromiter((token for row in rows for token in row), np.int64, int(ends[-1]))
        starts = np.concatenate([[0], ends[:-1]])
        means = torch.nn.functional.embedding_bag(
            torch.from_numpy(tokens), self._table, torch.from_numpy(starts), mode="mean"
        )
        return means.numpy()


def _unknown_token(tokenizer: Any) -> int | None:
    """Id of the unknown token; None if the tokenizer has none."""
    model = json.loads(tokenizer.to_str())["model"]
    if "unk_id" in model:
        return model["unk_id"]
    return None if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])


is_of_kind = is_static


def build(name: str, batch_size: int, device: str | None, pooling: Pooling | None) -> Embedder:
    """Build a static embedder, which runs on the CPU; see `retrieval.embedders`.

    Raises:
        ConfigurationError: a pooling is given, or the files are damaged.
        MissingDependencyError: the wordllama package is not installed.
    """
    if pooling is not None:
        raise ConfigurationError("--embedder-pooling", "a static model is a mean", "Leave it out")
    files = installed_files() if name == STATIC_EMBEDDER else find_static_files(name)
    if files is None:
        raise cannot_load(name, "no static model")
    return StaticEmbedder(name, files)
