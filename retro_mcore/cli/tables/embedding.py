"""Summary rows about chunks that the embedder did not read whole."""

from __future__ import annotations

from retro_mcore.retrieval.vectors import EmbeddingCounts


def embedding_losses(counts: EmbeddingCounts, max_tokens: int | None = None) -> dict[str, object]:
    """Rows for the chunks that were cut, exceeded half precision, or have a vector of zeros.

    Args:
        counts: Counts of the chunks.
        max_tokens: Most tokens of a chunk that the embedder reads; None: no limit.
    """
    reads = f"; the embedder reads {max_tokens} tokens" if max_tokens else ""
    rows: dict[str, object] = {}
    if counts.chunks_cut:
        rows["cut by the embedder"] = (
            f"{counts.cut_share}{reads}. Use an --embedder that reads more, or smaller chunks "
            "(preprocess_corpus --retro-chunk-length)"
        )
    if counts.in_full:
        rows["beyond half precision"] = f"{counts.in_full} texts, embedded in single precision"
    if beyond := getattr(counts, "beyond_fp16", 0):
        rows["vectors beyond fp16"] = f"{beyond} of {counts.chunks}; their files are in fp32"
    if counts.zero:
        rows["vectors of zeros"] = f"{counts.zero} of {counts.chunks}: nothing to embed in them"
    return rows
