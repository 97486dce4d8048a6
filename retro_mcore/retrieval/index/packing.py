"""Lists for fast scans: Faiss packs their codes in blocks of 32 vectors.

Blocks of two parts cannot be joined. So parts hold the codes one by one, in an index of the plain
kind with the same quantizers, and are packed when they are merged. The bytes are those of an index
that was filled at once, if its lists are found without a graph.
"""

from __future__ import annotations

from typing import Any

from retro_mcore.retrieval.index.library import faiss_library


def is_packed(index: Any) -> bool:
    """Whether an index (below its transforms) has packed lists that can be converted."""
    name = type(index).__name__
    if name == "IndexIVFRaBitQFastScan":
        return faiss_version() >= (1, 15)  # the first that converts them
    return name == "IndexIVFPQFastScan"


def faiss_version() -> tuple[int, ...]:
    """Version of Faiss, major and minor."""
    return tuple(int(part) for part in faiss_library().__version__.split(".")[:2])


def unpacked(index: Any) -> Any:
    """Return an empty index of the plain kind in place of one with packed lists.

    Args:
        index: A trained, empty index; one with transforms is changed. Any other is returned as it
            is.
    """
    inner, outer = _inner_and_outer(index)
    if not is_packed(inner):
        return index
    pq = type(inner).__name__ == "IndexIVFPQFastScan"
    plain = _plain_pq(inner) if pq else _plain_rabitq(inner)
    plain.is_trained = True
    return _put(index, outer, plain, inner)


def packed(index: Any, before: Any) -> Any:
    """Pack the lists of an index from `unpacked`.

    Args:
        index: The index, filled; one with transforms is changed.
        before: The index with packed lists, below its transforms, that it was made from.
    """
    inner, outer = _inner_and_outer(index)
    result = type(before)(inner, before.bbs)
    if hasattr(before, "qb"):  # bits of a query, of RaBitQ
        result.qb, result.centered = before.qb, before.centered
    return _put(index, outer, result, inner)


def _inner_and_outer(index: Any) -> tuple[Any, Any | None]:
    """The index below the transforms, and the innermost transform if there is one."""
    faiss = faiss_library()
    inner, outer = faiss.downcast_index(index), None
    while isinstance(inner, faiss.IndexPreTransform):
        inner, outer = faiss.downcast_index(inner.index), inner
    return inner, outer


def _put(index: Any, outer: Any | None, new: Any, old: Any) -> Any:
    """Replace the index `old` below transforms by `new`, which uses its quantizer."""
    if outer is None:
        new.referenced_objects = [index]
        return new
    owned = outer.own_fields
    outer.index = new
    old.this.own(owned)  # before, the transform owned it
    index.referenced_objects = [*getattr(index, "referenced_objects", []), old]
    return index


def _plain_pq(index: Any) -> Any:
    plain = faiss_library().IndexIVFPQ(index.quantizer, index.d, index.nlist, index.M, index.nbits)
    plain.pq, plain.by_residual = index.pq, index.by_residual
    return plain


def _plain_rabitq(index: Any) -> Any:
    faiss, bits = faiss_library(), index.rabitq.nb_bits
    plain = faiss.IndexIVFRaBitQ(
        index.quantizer, index.d, index.nlist, index.metric_type, True, bits
    )
    plain.rabitq = index.rabitq
    return plain
