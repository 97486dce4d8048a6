"""Writing Megatron's indexed datasets (.bin and .idx) with megatron-core's own builder.

Megatron is imported in the functions: the data pipeline's other stages run without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from retro_mcore.errors import TokenizerError


def token_dtype(vocab_size: int) -> type[np.number]:
    """The dtype in which Megatron stores tokens of a vocabulary of this size."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)


def write_indexed_dataset(
    binary: Path, index: Path, documents: Iterable[np.ndarray], dtype: type[np.number]
) -> int:
    """Write one sequence per document; returns the number of documents.

    Args:
        binary: Path of the tokens (.bin).
        index: Path of the index (.idx).
        documents: Tokens of each document, end-of-document token included.
        dtype: Storage type of the tokens.

    Raises:
        TokenizerError: a token id does not fit `dtype`.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    largest = np.iinfo(np.dtype(dtype)).max
    builder = IndexedDatasetBuilder(str(binary), dtype=dtype)
    try:
        for document in documents:
            if len(document) and int(document.max()) > largest:
                raise TokenizerError(
                    "--tokenizer-model",
                    f"token id {int(document.max())} is too large for {np.dtype(dtype).name}",
                    "Use a tokenizer with fewer tokens",
                )
            builder.add_document(document, [len(document)])
    except BaseException:
        builder.data_file.close()
        raise
    builder.finalize(str(index))
    return len(builder.sequence_lengths)
