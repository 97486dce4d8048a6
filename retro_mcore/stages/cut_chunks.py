"""A warning about chunks that are longer than the embedder reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from retro_mcore.distributed import get_rank
from retro_mcore.logs import PRINTED
from retro_mcore.retrieval.vectors import EmbeddingCounts

logger = logging.getLogger(__name__)


def warn_of_cut_chunks(
    stage: str, counts: Mapping[Any, EmbeddingCounts], max_tokens: int | None
) -> None:
    """Log on rank 0 how many chunks were cut, if any; a command shows it in its table.

    Args:
        stage: Name of the stage.
        counts: Counts by what was embedded.
        max_tokens: Most tokens of a chunk that the embedder reads.
    """
    cut = [f"{name}: {found.cut_share}" for name, found in counts.items() if found.chunks_cut]
    if cut and get_rank() == 0:
        logger.warning(
            "%s: the embedder reads %s tokens and cut longer chunks: %s",
            stage,
            max_tokens,
            "; ".join(cut),
            extra=PRINTED,
        )
