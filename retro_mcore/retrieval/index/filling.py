"""Fill a trained index in parts, by many processes, and merge the parts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.progress import track
from retro_mcore.project.markers import signed_write
from retro_mcore.project.shards import Shard, choose_shard_length, name_shards
from retro_mcore.retrieval.index.centers import Centers
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.index.files import (
    free_lists,
    lists_path,
    load_index,
    read_lists,
    replace_lists,
    save_index,
    set_total,
    write_lists,
)
from retro_mcore.retrieval.index.gpu import to_gpu
from retro_mcore.retrieval.index.library import faiss_library, faiss_threads, worker_threads
from retro_mcore.retrieval.index.packing import packed, unpacked
from retro_mcore.retrieval.index.rough_scores import Queries
from retro_mcore.retrieval.index.training import (
    QUANTIZERS,
    WITH_LISTS,
    IndexKind,
    has_graph,
    innermost,
    kind_of,
)
from retro_mcore.retrieval.index.transforms import transformed

#: Faiss multiplies flat vectors in blocks of this size; parts of whole blocks keep its rounding.
_FLAT_BLOCK = 1024
_SHORTEST_PART = 8 * _FLAT_BLOCK
_LONGEST_PART = 16384 * _FLAT_BLOCK
#: Number of vectors that one thread encodes in one call.
_ENCODED = 4096
_ADD_BATCH = 65_536
#: Of so many lists that a vector is not compared with all centers, the graph looks at so many.
_PLACING_BREADTH = 128


def cut_parts(
    directory: Path, count: int, kind: IndexKind, block_size: int, growth: Sequence[int] = ()
) -> list[Shard]:
    """Cut an index into parts, one file each, independent of the number of ranks or jobs.

    Args:
        directory: Directory of the files.
        count: Number of vectors.
        kind: Kind of the index; an index that cannot be merged has a single part.
        block_size: The project's rows per file; parts are at least this long, up to a limit.
        growth: Earlier numbers of vectors. The parts that the index had then are kept.
    """
    suffix = ".invlists" if kind in WITH_LISTS else ".faissindex"
    bounds = [(0, count)] if kind is IndexKind.WHOLE else []
    if kind is not IndexKind.WHOLE:
        for first, last in pairwise([0, *growth, count]):
            length = _part_length(last - first, block_size)
            first = first_row_of_new_parts(first, kind)
            last = last if last == count else first_row_of_new_parts(last, kind)
            bounds += [(start, min(start + length, last)) for start in range(first, last, length)]
    parts = name_shards(directory, bounds)
    return [Shard(part.start, part.end, part.path.with_suffix(suffix)) for part in parts]


def first_row_of_new_parts(count: int, kind: IndexKind) -> int:
    """First row of the parts that an index of `count` vectors gets when it grows.

    Without lists, a part that ends within a block is not kept.
    """
    return count - count % _FLAT_BLOCK if kind is IndexKind.CODES else count


def _part_length(count: int, block_size: int) -> int:
    shortest = min(_SHORTEST_PART, block_size)
    length = choose_shard_length(count, _LONGEST_PART, shards=64, shortest=shortest)
    return math.ceil(length / _FLAT_BLOCK) * _FLAT_BLOCK if length > _FLAT_BLOCK else length


def find_parts(
    directory: Path, count: int, kind: IndexKind, block_size: int, growth: Sequence[int]
) -> list[Shard]:
    """The parts of an index: as `cut_parts`, or as older versions cut them, which forgot growth."""
    parts = cut_parts(directory, count, kind, block_size, growth)
    if growth and not all(part.path.is_file() for part in parts):
        older = cut_parts(directory, count, kind, block_size)
        if all(part.path.is_file() for part in older):
            return older
    return parts


def exact_path(part: Shard) -> Path:
    """File of the held-out queries' exact neighbors among a part's rows."""
    return part.path.parent / "exact" / f"{part.path.stem}.hdf5"


def add_part(
    trained: Any, embeddings: Embeddings, part: Shard, path: Path, gpu: bool = False
) -> None:
    """Write the vectors of one part, in lists with their database rows as ids.

    Args:
        trained: The trained index; its vectors are replaced.
        embeddings: The database's vectors.
        part: The rows to add.
        path: The file to write.
        gpu: Place and encode on this rank's GPU, if it supports such an index. Without lists there
            is nothing to gain.
    """
    trained.reset()
    trained = unpacked(trained)
    # Faiss builds an NSG graph once, from all its vectors.
    at_once = hasattr(innermost(trained), "nsg")
    size = max(part.end - part.start, 1) if at_once else _ADD_BATCH
    if gpu and kind_of(trained) is IndexKind.LISTS:
        trained = _add_on_gpu(trained, _batches(embeddings, part))
    else:
        for rows, vectors in _batches(embeddings, part, size):
            add_rows(trained, vectors, rows)
    if kind_of(trained) is IndexKind.LISTS:
        write_lists(trained, path)
    else:
        save_index(trained, path)
    trained.reset()


def extend_index(filled: Path, embeddings: Embeddings, path: Path) -> None:
    """Write an index that holds a database's first vectors with all others added to it.

    Args:
        filled: An index that cannot be merged, such as a graph.
        embeddings: The database's vectors.
        path: The file to write.
    """
    index = load_index(filled)
    add_to_index(index, embeddings, index.ntotal)
    save_index(index, path)


def _batches(
    embeddings: Embeddings, part: Shard, size: int = _ADD_BATCH
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(part.start, part.end, size):
        rows = np.arange(start, min(start + size, part.end))
        yield rows, embeddings.rows(rows)


def _add_on_gpu(trained: Any, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Any:
    """Fill an empty index that has lists on this rank's GPU, or on the CPU where that fails.

    Returns:
        The filled index, on the CPU.
    """
    copy = to_gpu(trained, "adding to the index")
    for rows, vectors in batches:
        if copy is None:
            add_rows(trained, vectors, rows)
        else:
            copy.add_with_ids(vectors, rows)
    return trained if copy is None else faiss_library().index_gpu_to_cpu(copy)


def add_rows(index: Any, vectors: np.ndarray, rows: np.ndarray) -> None:
    """Add vectors under the ids `rows`, with the same bytes on any number of threads."""
    kind = kind_of(index)
    if kind is IndexKind.PACKED:
        with faiss_threads(1):  # as `_encode` does
            for start in range(0, len(vectors), _ENCODED):
                piece = slice(start, start + _ENCODED)
                index.add_with_ids(vectors[piece], rows[piece])
        return
    if kind is IndexKind.WHOLE:
        with faiss_threads(1 if has_graph(index) else faiss_library().omp_get_max_threads()):
            index.add(vectors)  # threads would race when building a graph
        return
    pieces = [vectors[start : start + _ENCODED] for start in range(0, len(vectors), _ENCODED)]
    inner = innermost(index)
    if kind is IndexKind.LISTS:
        with _centers(inner) as centers:
            codes = list(worker_threads().map(_encode, repeat(index), repeat(centers), pieces))
    else:
        codes = list(worker_threads().map(_encode, repeat(index), repeat(None), pieces))
    inner.add_sa_codes(np.concatenate(codes), rows if kind is IndexKind.LISTS else None)
    set_total(index, inner.ntotal)


@contextmanager
def _centers(ivf: Any) -> Iterator[Centers | None]:
    """Centers of lists that are found without the graph that the index has; None: Faiss places.

    In a list that is not its nearest, a vector is found later: with Faiss's default breadth of 16,
    for one in twelve, searches must visit a fifth more lists.
    """
    quantizer = faiss_library().downcast_index(ivf.quantizer)
    if not hasattr(quantizer, "hnsw") or type(quantizer).__name__ not in QUANTIZERS:
        yield None
        return
    before = quantizer.hnsw.efSearch
    quantizer.hnsw.efSearch = max(_PLACING_BREADTH, before)
    try:
        yield Centers(quantizer, 1)
    finally:
        quantizer.hnsw.efSearch = before


def _encode(index: Any, centers: Centers | None, vectors: np.ndarray) -> np.ndarray:
    """Codes u8 [n, size] of vectors: the number of the list, if there are lists, and the vector."""
    if centers is None:
        return index.sa_encode(vectors)
    vectors = np.ascontiguousarray(vectors, np.float32)
    queries = Queries.of(transformed(index, vectors), centers.origin)
    lists = centers.nearest(queries, np.arange(len(vectors)))[:, 0]
    codes = np.empty((len(vectors), index.sa_code_size()), np.uint8)
    pointers = [faiss_library().swig_ptr(part) for part in (queries.vectors, lists, codes)]
    innermost(index).encode_vectors(len(vectors), *pointers, True)
    return codes


def add_to_index(index: Any, embeddings: Embeddings, first: int = 0) -> None:
    """Add all rows from `first` on, in order, in this process: a vector's id is its row."""
    everything = Shard(first, len(embeddings), Path())
    total = math.ceil((len(embeddings) - first) / _ADD_BATCH)
    for rows, vectors in track(_batches(embeddings, everything), "add to index", total):
        add_rows(index, vectors, rows)


def stored_bytes(index: Any, count: int) -> int:
    """Bytes of the codes and ids of `count` vectors in an index's file; 0 if unknown."""
    inner = innermost(index)
    if kind_of(index) in WITH_LISTS:
        return count * (int(inner.code_size) + 8)
    try:
        return count * int(inner.sa_code_size())
    except RuntimeError:  # not every index has codes of fixed size
        return 0


def merge_parts(empty: Path, parts: Sequence[Shard], path: Path, fingerprint: str) -> None:
    """Merge all parts into one index, in this process's memory.

    Args:
        empty: The trained index.
        parts: All parts, in order.
        path: The file to write.
        fingerprint: Fingerprint of what the index is made from.
    """
    index = load_index(empty)
    kind, before = kind_of(index), innermost(index)
    index = unpacked(index)
    with signed_write(path, fingerprint) as temporary:
        if kind is IndexKind.WHOLE:
            shutil.copyfile(parts[0].path, temporary)
            return
        if kind in WITH_LISTS:
            _reserve(innermost(index).invlists, parts)
        for part in track(parts, "merge index"):
            if kind in WITH_LISTS:
                inner, lists = innermost(index), read_lists(part.path, mapped=False)
                inner.invlists.merge_from(lists, 0)
                inner.ntotal = inner.invlists.compute_ntotal()
                free_lists(lists)
            else:
                source = load_index(part.path)  # keep it alive together with its innermost index
                innermost(index).merge_from(innermost(source))
        index = packed(index, before) if kind is IndexKind.PACKED else index
        set_total(index, innermost(index).ntotal)
        save_index(index, temporary)


def _reserve(merged: Any, parts: Sequence[Shard]) -> None:
    """Give empty lists the room that all parts take, so that they are not copied as they grow."""
    sizes = np.zeros(merged.nlist, np.int64)
    for part in parts:
        lists = read_lists(part.path, mapped=True)
        sizes += [lists.list_size(number) for number in range(lists.nlist)]
        free_lists(lists)
    for number, size in enumerate(sizes.tolist()):
        merged.resize(number, size)
        merged.resize(number, 0)


def merge_on_disk(empty: Path, parts: Sequence[Shard], path: Path, fingerprint: str) -> None:
    """Merge all parts into an on-disk index, whose lists are in a separate file and searched there.

    Both the parts and the result are memory-mapped, so they may exceed the memory. The index refers
    to its lists without a folder, so readers look in the folder of the index.

    Args:
        empty: The trained index, which has lists.
        parts: All parts, in order.
        path: The file to write; the lists go to `lists_path` of it.
        fingerprint: Fingerprint of what the index is made from.
    """
    faiss = faiss_library()
    index = load_index(empty)
    inner = innermost(index)
    sources = [read_lists(part.path, mapped=True) for part in parts]
    pointers = faiss.InvertedListsPtrVector()
    for lists in sources:
        pointers.push_back(lists)
    data = lists_path(path)
    with signed_write(data, fingerprint) as temporary:
        merged = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(temporary))
        merged.merge_from_multiple(pointers.data(), pointers.size(), False, False)
        for lists in sources:
            free_lists(lists)
    merged.filename = data.name
    replace_lists(index, merged)
    with signed_write(path, fingerprint) as temporary:
        save_index(index, temporary)
