"""The lexical embedder's weights, counted in a project's database."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.distributed import broadcast_object, get_rank, get_world_size, raise_together
from retro_mcore.project.arrays import save_array
from retro_mcore.project.markers import FileState, signed_write, state_of
from retro_mcore.retrieval.chunk_text import chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.lexical import count_texts, weights_of

#: Maximum number of chunks in which words are counted.
_COUNTED_CHUNKS = 200_000
_BATCH = 1024


def save_lexical_weights(
    database: ChunkDatabase, tokenizer: Tokenizer, path: Path, fingerprint: str
) -> None:
    """Count words in evenly spaced chunks on all ranks, and save their weights.

    Args:
        database: The retrieval database.
        tokenizer: The project's.
        path: File of the weights; one with the same fingerprint is kept.
        fingerprint: Fingerprint of their inputs.
    """
    with raise_together():
        saved = get_rank() == 0 and state_of(path, fingerprint) is FileState.COMPLETE
    if broadcast_object(saved):
        return
    count = min(len(database), _COUNTED_CHUNKS)
    rows = np.linspace(0, len(database) - 1, count).astype(np.int64)
    batches = np.array_split(rows, math.ceil(count / _BATCH))[get_rank() :: get_world_size()]
    texts = (text for ids in batches for text in chunk_texts(tokenizer, database.tokens(ids)))
    with raise_together():
        counts = torch.from_numpy(count_texts(texts))
    dist.all_reduce(counts)
    with raise_together():
        if get_rank() == 0:
            with signed_write(path, fingerprint) as temporary:
                save_array(temporary, weights_of(counts.numpy()))
