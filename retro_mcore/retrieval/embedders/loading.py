"""Load encoders with Hugging Face's libraries, refusing incomplete ones.

The libraries replace what a folder lacks: missing weights by new random numbers each time, and a
tokenizer's words by one unknown token. The resulting vectors look like any others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.embedders.base import DEFAULT_EMBEDDER

#: Names of weights in transformers' warnings: 5.x has a table, 4.x a list.
_MISSING = re.compile(r"^(\S+)\s*\|[^|]*(?:MISSING|MISMATCH)", re.MULTILINE)
_LISTED = re.compile(r"'([^']+)'|^- (\S+): found shape", re.MULTILINE)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def cannot_load(name: str, reason: str) -> ConfigurationError:
    """The error of an embedder that cannot be loaded."""
    return ConfigurationError(
        "--embedder",
        f"{name!r} cannot be loaded ({reason})",
        f"Give {DEFAULT_EMBEDDER!r}, a model's folder, or a hub name that can be reached",
    )


@contextmanager
def loading_whole(name: str) -> Iterator[None]:
    """Refuse a model that the body cannot load, or loads without some of its weights.

    Poolers are not used here, and many encoders are saved without one.

    Raises:
        ConfigurationError: names the embedder, and a weight that is missing.
    """
    warnings = _Warnings()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(warnings)
    logger.setLevel(min(level, logging.WARNING) if level else logging.WARNING)
    try:
        yield
    except Exception as error:  # a damaged folder may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise cannot_load(name, reason) from error
    finally:
        logger.setLevel(level)
        logger.removeHandler(warnings)
    missing = [weight for weight in warnings.missing if "pooler" not in weight]
    if missing:
        found = f"{len(missing)} weights, such as {missing[0]}, are not in its files"
        raise cannot_load(name, f"{found} and would be random")


def require_words(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that knows only special tokens, which happens if its files are missing.

    Raises:
        ConfigurationError: names the embedder.
    """
    # A tokenizer need not be one of transformers'.
    special = getattr(tokenizer, "all_special_ids", None)
    if special is not None and len(tokenizer) <= len(set(special)):
        raise cannot_load(name, "its tokenizer has no vocabulary: every word would be unknown")


def num_positions(model: Any) -> int | None:
    """Number of tokens that a model has positions for; None if it has no such limit.

    RoBERTa-like models number positions from the one after padding's, so they have fewer than rows.
    Families of models differ in these attributes.
    """
    rows = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return rows if rows is None or padding is None else rows - padding - 1


class _Warnings(logging.Handler):
    """Collects the names of weights that transformers reports as newly initialized."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.missing: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = _ESCAPES.sub("", record.getMessage())
        if "newly initialized" in text:
            names = _MISSING.findall(text) or [a or b for a, b in _LISTED.findall(text)]
            self.missing += names
