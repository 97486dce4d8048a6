"""sentence-transformers models as embedders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from retro_mcore.errors import ConfigurationError, MissingDependencyError
from retro_mcore.retrieval.embedders.base import DEFAULT_EMBEDDER, Encoder
from retro_mcore.retrieval.embedders.hugging_face import count_tokens_of, model_path, token_limit
from retro_mcore.retrieval.embedders.loading import loading_whole, require_words
from retro_mcore.retrieval.embedders.model_files import model_files
from retro_mcore.retrieval.embedders.precision import FLAG


class SentenceEncoder(Encoder):
    """A sentence-transformers model, or a Hugging Face encoder with mean pooling.

    Args:
        name_or_path: "minilm" for the installed MiniLM package, a folder, or a hub name.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA if available.

    Raises:
        MissingDependencyError: sentence-transformers or the MiniLM package is not installed.
        ConfigurationError: there is no such model.
    """

    def __init__(
        self,
        name_or_path: str = DEFAULT_EMBEDDER,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        self.name, self.batch_size = name_or_path, batch_size
        path = model_path(name_or_path)
        self._model = _load_sentence_transformer(path, name_or_path, device)
        self.files = {"model": model_files(path)}
        self.dimension = int(self._model.get_embedding_dimension())
        # Which of these attributes a model has depends on its modules and on the release.
        self.max_tokens = token_limit(getattr(self._model, "max_seq_length", None))

    def half(self) -> None:
        """Compute in half precision."""
        self._model.half()

    def bfloat16(self) -> None:
        """Compute in bfloat16; hidden states are pooled and normalized in single precision.

        Raises:
            ConfigurationError: the model does not begin with a transformer.
        """
        self._transformer("bf16").bfloat16()
        self._model[0].register_forward_hook(_pool_in_full)

    def int8(self) -> None:
        """Compute in int8, in ONNX Runtime.

        Raises:
            MissingDependencyError: a package is not installed.
            ConfigurationError: the model has no int8 file.
        """
        from retro_mcore.retrieval.embedders.onnx_body import run_in_int8

        file = run_in_int8(self._transformer("int8"), self.name, model_path(self.name))
        self.files = {**self.files, "int8": [file]}

    def _transformer(self, precision: str) -> Any:
        if not hasattr(self._model[0], "auto_model"):
            kind = type(self._model[0]).__name__
            raise ConfigurationError(FLAG, f"{precision} with {self.name}, a {kind}", "Use fp32")
        return self._model[0].auto_model

    def full(self) -> None:
        """Compute in single precision again."""
        self._model.float()

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        name = getattr(self._model, "default_prompt_name", None)
        prompt = self._model.prompts.get(name, "") if name else ""
        return count_tokens_of(self._model.tokenizer, [prompt + text for text in texts])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if self.batch_tokens is not None:
            return super().embed(texts)
        # sentence-transformers sorts by length before it cuts batches, so padding is small.
        return self._encode(list(texts), self.batch_size)

    def embed_batch(self, texts: list[str]) -> np.ndarray:
        return self._encode(texts, len(texts))

    def _encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        vectors = self._model.encode(
            texts, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def _pool_in_full(module: Any, inputs: Any, features: dict[str, Any]) -> dict[str, Any]:
    """Hand hidden states to the pooling in single precision."""
    features["token_embeddings"] = features["token_embeddings"].float()
    return features


def _load_sentence_transformer(path: str, name: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(
            "sentence-transformers", "not installed", "Install retro-mcore[embed]"
        ) from error
    logging.disable_progress_bar()
    with loading_whole(name):
        model = SentenceTransformer(path, device=device)
    require_words(name, model.tokenizer)
    return model
