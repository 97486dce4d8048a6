"""Hugging Face encoders as embedders, with a pooling of the user's choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retro_mcore.errors import MissingDependencyError
from retro_mcore.retrieval.embedders.base import Encoder, Pooling
from retro_mcore.retrieval.embedders.hugging_face import count_tokens_of, model_path, token_limit
from retro_mcore.retrieval.embedders.loading import loading_whole, num_positions, require_words
from retro_mcore.retrieval.embedders.model_files import model_files


class PooledEncoder(Encoder):
    """A Hugging Face encoder such as BERT with pooled last hidden states, not normalized.

    Args:
        name_or_path: "minilm", a folder, or a hub name.
        pooling: "mean" of the text's tokens, or "cls": the first token.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA if available.

    Raises:
        MissingDependencyError: transformers or the MiniLM package is not installed.
        ConfigurationError: there is no such model.
    """

    def __init__(
        self,
        name_or_path: str,
        pooling: Pooling,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        self.name, self._pooling, self.batch_size = name_or_path, pooling, batch_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        path = model_path(name_or_path)
        self._tokenizer, self._model = _load_transformer(path, name_or_path)
        self.files = {"model": model_files(path)}
        self._model.to(self._device).eval()
        self.dimension = int(self._model.config.hidden_size)
        limits = map(token_limit, (self._tokenizer.model_max_length, num_positions(self._model)))
        self.max_tokens = min((limit for limit in limits if limit is not None), default=None)

    def half(self) -> None:
        """Compute in half precision."""
        self._model.half()

    def bfloat16(self) -> None:
        """Compute in bfloat16; hidden states are pooled in single precision."""
        self._model.bfloat16()

    def int8(self) -> None:
        """Compute in int8, in ONNX Runtime.

        Raises:
            MissingDependencyError: a package is not installed.
            ConfigurationError: the model has no int8 file.
        """
        from retro_mcore.retrieval.embedders.onnx_body import run_in_int8

        file = run_in_int8(self._model, self.name, model_path(self.name))
        self.files = {**self.files, "int8": [file]}

    def full(self) -> None:
        """Compute in single precision again."""
        self._model.float()

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        return count_tokens_of(self._tokenizer, texts)

    @torch.inference_mode()
    def embed_batch(self, texts: list[str]) -> np.ndarray:
        batch = self._tokenizer(
            texts,
            padding=True,
            truncation=self.max_tokens is not None,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self._device)
        hidden = self._model(**batch).last_hidden_state.float()  # [texts, tokens, D]
        return _pool(hidden, batch["attention_mask"], self._pooling).cpu().numpy()


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
    with loading_whole(name):
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    require_words(name, tokenizer)
    return tokenizer, model
