"""Faiss indexes on disk, with their vectors in the same or separate files, and memory-mapped
reading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retro_mcore.errors import CorruptFileError
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.index.faiss_search import PartedIndex, set_search_breadth
from retro_mcore.retrieval.index.library import faiss_library, message_of
from retro_mcore.retrieval.index.training import IndexKind, innermost, kind_of


def save_index(index: Any, path: Path) -> None:
    """Write a Faiss index."""
    faiss_library().write_index(index, str(path))


def load_index(
    path: Path | str,
    nprobe: int | None = None,
    ef_search: int | None = None,
    mapped: bool = False,
) -> Any:
    """Read a Faiss index and set how broadly it searches.

    Args:
        path: A .faissindex file.
        nprobe: Lists to search, for an index that has lists.
        ef_search: Breadth of the graph search, for an index that has a graph.
        mapped: Memory-map vectors and lists, read-only: processes on a machine share them, and they
            may exceed its memory. Lists in a separate file are always mapped.

    Raises:
        CorruptFileError: Faiss cannot read it.
    """
    faiss = faiss_library()
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    try:
        if mapped and not lists_path(Path(path)).is_file():
            flags = faiss.IO_FLAG_MMAP_IFC if _is_flat(Path(path)) else flags | faiss.IO_FLAG_MMAP
        index = faiss.read_index(str(path), flags)
    except (RuntimeError, OSError, MemoryError, ValueError) as error:
        raise CorruptFileError(
            path, f"unreadable ({message_of(error)})", "Run build_index again"
        ) from error
    if kind_of(index) is IndexKind.LISTS:
        _search_from_threads(faiss.downcast_InvertedLists(innermost(index).invlists))
    set_search_breadth(index, nprobe, ef_search)
    return index


def _search_from_threads(lists: Any) -> None:
    """Turn off read-ahead for mapped lists, since its threads serve only one search at a time."""
    if isinstance(lists, faiss_library().OnDiskInvertedLists):
        lists.prefetch_nthread = 0


def lists_path(path: Path) -> Path:
    """File with the lists of an on-disk index, in the same folder."""
    return path.with_suffix(".ivfdata")


def _is_flat(path: Path) -> bool:
    """Whether the index is flat, which Faiss maps differently from lists."""
    with path.open("rb") as file:
        return file.read(4) in (b"IxF2", b"IxFI", b"IxFl")


def write_lists(index: Any, path: Path) -> None:
    """Write the inverted lists of an index, without its quantizer and transforms."""
    faiss = faiss_library()
    writer = faiss.FileIOWriter(str(path))
    faiss.write_InvertedLists(innermost(index).invlists, writer)
    del writer  # closes the file


def read_lists(path: Path, mapped: bool) -> Any:
    """Inverted lists that `write_lists` wrote.

    Raises:
        CorruptFileError: Faiss cannot read them.
    """
    faiss = faiss_library()
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if mapped else 0
    try:
        lists = faiss.read_InvertedLists(faiss.FileIOReader(str(path)), flags)
    except (RuntimeError, OSError, MemoryError, ValueError) as error:
        raise CorruptFileError(
            path, f"unreadable ({message_of(error)})", "Run build_index again"
        ) from error
    typed = faiss.downcast_InvertedLists(lists)
    _search_from_threads(typed)
    return typed


def free_lists(lists: Any) -> None:
    """Free inverted lists of `read_lists` that no index refers to; otherwise they stay in memory.

    Python does not own them. (It cannot be told to: that confuses SWIG's reference counts.)
    """
    lists.__swig_destroy__(lists)


def replace_lists(index: Any, lists: Any) -> None:
    """Replace the inverted lists of an index, which keeps them alive."""
    inner = innermost(index)
    inner.replace_invlists(lists, False)
    index.referenced_objects = [lists]
    inner.ntotal = lists.compute_ntotal()
    set_total(index, inner.ntotal)


def set_total(index: Any, total: int) -> None:
    """Set the number of vectors in the transforms around an index."""
    faiss = faiss_library()
    outer = faiss.downcast_index(index)
    while isinstance(outer, faiss.IndexPreTransform):
        outer.ntotal = total
        outer = faiss.downcast_index(outer.index)


def load_parts(
    empty: Path,
    parts: Sequence[Shard],
    nprobe: int | None = None,
    ef_search: int | None = None,
) -> Any:
    """Open the vectors of some parts as one memory-mapped index.

    Args:
        empty: The trained index.
        parts: Files that `add_part` wrote.
        nprobe: Lists to search.
        ef_search: Breadth of the graph search over lists.

    Raises:
        CorruptFileError: Faiss cannot read a file.
    """
    faiss = faiss_library()
    index = load_index(empty, nprobe, ef_search)
    if kind_of(index) is not IndexKind.LISTS:
        indexes = [load_index(part.path, mapped=True) for part in parts]
        return PartedIndex(indexes, [part.start for part in parts])
    if not parts:
        return index
    lists = [read_lists(part.path, mapped=True) for part in parts]
    pointers = faiss.InvertedListsPtrVector()
    for part in lists:
        pointers.push_back(part)
    joined = faiss.HStackInvertedLists(pointers.size(), pointers.data())
    joined.referenced_objects = lists
    replace_lists(index, joined)
    return index
