"""Choose an index that fits into memory and reaches the recall on a sample of the vectors."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from retro_mcore.errors import ConfigurationError, CorruptFileError, MissingDependencyError
from retro_mcore.host import total_memory
from retro_mcore.project.config import read_json_object
from retro_mcore.project.space import show_bytes
from retro_mcore.retrieval.index.breadth import FEWEST_LISTS, sample_breadth
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.index.faiss_search import search
from retro_mcore.retrieval.index.library import faiss_library, faiss_threads
from retro_mcore.retrieval.index.packing import faiss_version
from retro_mcore.retrieval.index.recall import (
    DECISIVE,
    NUM_RESCORED,
    recall_at,
    rounding_of,
    squared_distances,
    without,
)
from retro_mcore.retrieval.index.training import innermost, make_index

_LOG = logging.getLogger(__name__)

AUTO = "auto"
#: Up to this many vectors, an exact search is cheap enough to do without lists.
_LARGEST_WITHOUT_LISTS = 50_000
#: Exhaustive search of vectors uses matrix products and costs about an eighth per vector of
#: scanning lists. So lists pay off only if less than this fraction of them is scanned.
_WORTHWHILE_SHARE = 1 / 8
#: From this many lists on, a graph finds the nearest lists faster than comparing all.
_FEWEST_LISTS_FOR_GRAPH = 8192
#: Training vectors per list that Faiss needs for good centroids.
_VECTORS_PER_LIST = 39
_GRAPH_NEIGHBORS = 32
#: RaBitQ of 8 or 9 bits is larger than SQ8, for a recall of half a percent more, and takes longer
#: to scan and many times as long to add. It works by name.
_RABITQ_BITS = range(1, 8)
#: Bytes of the largest PQ codes that Faiss searches on a GPU.
_MOST_ON_GPU = 96
#: From this many vectors on, training a rotation for the codes pays off.
_FEWEST_ROTATED = 20_000_000
#: The largest codes that fit, and the largest of each kind, are compared in search of the most
#: exact. Recalls closer than this are equal within noise.
_CONSIDERED, _CLOSE = 4, 0.005
_SAMPLE, _SAMPLE_IN_LISTS = 32_768, 131_072
_SAMPLE_QUERIES = 2000
#: A smaller sample, for the trend, holds one vector in so many.
_PART = 4
#: Share of the memory that an index may take, if nothing else is said.
MEMORY_SHARE = 0.75
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class IndexChoice:
    """A Faiss factory string and why it was chosen.

    Attributes:
        string: Faiss factory string.
        reason: Why it was chosen, in words.
        num_bytes: Memory of its vectors, lists and centroids; None if unknown.
        on_disk: Whether its lists are in a separate file and are searched there.
    """

    string: str
    reason: str
    num_bytes: int | None = None
    on_disk: bool = False

    @classmethod
    def load(cls, path: Path) -> IndexChoice:
        """Read a choice.json.

        Raises:
            CorruptFileError: the file is malformed.
        """
        try:
            return cls(**read_json_object(path))
        except TypeError as error:
            hint = f"Remove {path.name} and run build_index again"
            raise CorruptFileError(path, "is not an index choice", hint) from error


@dataclass(frozen=True)
class _Code:
    """A way to store vectors.

    Attributes:
        string: Last part of the factory string.
        num_bytes: Bytes per vector.
        kind: Codes of one kind lose less the more bytes they have.
        rotation: First part of the factory string, if any.
        scan: Time to scan a vector, relative to an uncompressed one in a list.
    """

    string: str
    num_bytes: int
    kind: str
    rotation: str = ""
    scan: float = 1.0


def parse_bytes(flag: str, text: str) -> int:
    """Convert "24G" to bytes; K, M, G and T are powers of 1024.

    Raises:
        ConfigurationError: not a number with one of these units.
    """
    number, unit = text.strip().upper().removesuffix("B").removesuffix("I"), ""
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], number[-1]
    try:
        value = float(number) * _UNITS[unit]
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise ConfigurationError(flag, repr(text), "Give bytes such as 512M, 24G or 1.5T")
    return int(value)


def usable_memory() -> int:
    """Three quarters of the memory that this job may use, in bytes."""
    return int(total_memory() * MEMORY_SHARE)


def num_lists_for(num_vectors: int) -> int:
    """Number of lists: about 4·sqrt(n), a power of two, with enough training vectors for each.

    Faiss's guidelines for choosing an index; 0: no lists.
    """
    if num_vectors <= _LARGEST_WITHOUT_LISTS:
        return 0
    lists = 2 ** round(math.log2(4 * math.sqrt(num_vectors)))
    while lists * _VECTORS_PER_LIST > num_vectors:
        lists //= 2
    return lists


def automatic_string(code: str, lists: int, rotation: str = "") -> str:
    """Faiss factory string of the automatic index with such codes."""
    graph = f"_HNSW{_GRAPH_NEIGHBORS}" if lists >= _FEWEST_LISTS_FOR_GRAPH else ""
    parts = [rotation, f"IVF{lists}{graph}" if lists else "", code]
    return ",".join(part for part in parts if part)


def index_bytes(num_vectors: int, dimension: int, code_bytes: int) -> int:
    """Bytes of memory that the automatic index takes with these codes."""
    lists = num_lists_for(num_vectors)
    graph = lists * 8 * _GRAPH_NEIGHBORS if lists >= _FEWEST_LISTS_FOR_GRAPH else 0
    ids = 8 * num_vectors if lists else 0
    return num_vectors * code_bytes + ids + lists * 4 * dimension + graph


def largest_code(count: int, dimension: int, memory: float) -> tuple[str, int, str]:
    """The largest codes with which the automatic index fits into memory, or the smallest of all.

    `choose_index` also compares smaller ones, by their recall among the vectors.

    Returns:
        Last part of the factory string, bytes per vector, and first part of the string.
    """
    codes = _codes(count, dimension)
    fitting = (c for c in codes if index_bytes(count, dimension, c.num_bytes) <= memory)
    code = next(fitting, codes[-1])
    return code.string, code.num_bytes, code.rotation


def choose_index(
    embeddings: Embeddings,
    memory: int,
    recall: float,
    on_disk: bool = False,
    *,
    rescore: bool = False,
    split: bool = False,
    gpu: bool = False,
) -> IndexChoice:
    """Choose the most exact index that fits into memory, if it reaches the recall.

    Candidates that are sorted by the stored vectors are in exact order in any case. So with
    `rescore` it is the one that is scanned fastest among those that reach the recall, and the
    smallest of these.

    Lossy codes are tried on evenly spaced vectors with exhaustive search, so the measured loss is
    due to the codes alone. Losses due to lists can be avoided by searching more lists; lists are
    omitted if that would cost more than an exhaustive search. Recall falls as vectors get denser,
    so it is also measured at a quarter of the sample, and the decrease is extrapolated to all
    vectors.

    Args:
        embeddings: The database's vectors.
        memory: Bytes that the index may take.
        recall: Target recall@2, relative to exact search.
        on_disk: Whether its lists stay on disk, so vectors need no memory.
        rescore: Whether candidates are sorted by the stored vectors, so that the recall is that of
            NUM_RESCORED candidates.
        split: Whether the index stays in parts, which fast-scan codes cannot.
        gpu: Whether Faiss's GPU code must support the codes.

    Raises:
        ConfigurationError: no index that fits reaches the recall; names the best recall in this
            memory and the least memory needed. Or there is nothing to put on disk.
    """
    count, dimension = len(embeddings), embeddings.dimension
    codes = _codes(count, dimension, split, gpu)
    if on_disk and not num_lists_for(count):
        raise ConfigurationError(
            "--on-disk",
            f"{count} vectors need no lists",
            "Leave it out, or name an --index with lists, such as IVF64,Flat",
        )
    if on_disk:
        reason = "uncompressed, since its lists lie on the disk"
        return _choice(codes[0], count, dimension, reason, True)
    trial = _Trial(embeddings, rescore)
    fitting = [code for code in codes if index_bytes(count, dimension, code.num_bytes) <= memory]
    best = _best(trial, fitting, recall, rescore) if fitting else None
    if best is None or trial.expected_recall(best) < recall:
        raise _nothing_fits(trial, codes, best, memory, recall)
    if num_lists_for(count) and fitting[0] == codes[0] and best.scan > _WORTHWHILE_SHARE:
        of_lists = recall / trial.expected_recall(best)
        share = _share_to_scan(embeddings, of_lists)
        if share * best.scan > _WORTHWHILE_SHARE:
            size = 4 * dimension * count
            why = (
                f"recall@{DECISIVE} {recall} would take scanning {share:.0%} of "
                f"{num_lists_for(count)} lists, from a sample"
            )
            reason = f"{count} vectors searched one by one, {show_bytes(size)}: {why}"
            return IndexChoice("Flat", reason, size)
    return _choice(best, count, dimension, _reason(trial, best, rescore))


def _best(trial: _Trial, fitting: list[_Code], recall: float, rescore: bool) -> _Code:
    if fitting[0].string == "Flat" and not (rescore and num_lists_for(trial.count)):
        return fitting[0]  # without lists by matrix products, which no code is scanned as fast as
    return _fastest(trial, fitting, recall) if rescore else _most_exact(trial, fitting, recall)


def _reason(trial: _Trial, code: _Code, rescore: bool) -> str:
    if code.string == "Flat":
        why = "in exact order as it is" if rescore else "which fits the memory"
        return f"uncompressed, {why}"
    known = f"{trial.expected_recall(code):.3f}, from a sample"
    if not rescore:
        return f"the most exact that fits the memory; recall@{DECISIVE} of its codes {known}"
    return (
        "the fastest that reaches the recall and fits the memory; "
        f"recall@{DECISIVE} of its codes among {NUM_RESCORED} candidates {known}"
    )


def _share_to_scan(embeddings: Embeddings, recall: float) -> float:
    """Share of the lists that must be scanned for the recall, estimated from a sample."""
    count, lists = len(embeddings), num_lists_for(len(embeddings))
    wanted = max(_SAMPLE_IN_LISTS, math.ceil(FEWEST_LISTS * count / lists))
    rows = np.linspace(0, count - 1, min(wanted, count)).astype(np.int64)
    with faiss_threads(1):  # so that the choice does not depend on the machine
        return sample_breadth(embeddings.rows(rows), count, lists).probes(recall) / lists


def _choice(
    code: _Code, count: int, dimension: int, why: str, on_disk: bool = False
) -> IndexChoice:
    lists = num_lists_for(count)
    string = automatic_string(code.string, lists, code.rotation)
    size = index_bytes(count, dimension, code.num_bytes)
    where = f"{count} vectors" + (f" in {lists} lists" if lists else " searched one by one")
    return IndexChoice(string, f"{where}, {show_bytes(size)}: {why}", size, on_disk)


def _codes(count: int, dimension: int, split: bool = False, gpu: bool = False) -> list[_Code]:
    """The codes from the largest to the smallest, which is roughly from the most exact on.

    Times of scanning a vector are relative to an uncompressed one in a list
    (benchmarks/index_choice.py). They are constants, so that the choice does not depend on the
    machine's load.
    """
    lists = num_lists_for(count)
    flat = _Code("Flat", 4 * dimension, "Flat")
    codes = [
        _Code("SQfp16", 2 * dimension, "SQ", scan=0.65),
        _Code("SQ8", dimension, "SQ", scan=0.65),
        _Code("SQ6", -(-dimension * 6 // 8), "SQ", scan=1.0),
        _Code("SQ4", -(-dimension // 2), "SQ", scan=0.85),
    ]
    rotated = count >= _FEWEST_ROTATED
    for size in (128, 96, 64, 48, 32, 24, 16, 12, 8, 4):
        if dimension % size == 0 and size < dimension // 2 and not (gpu and size > _MOST_ON_GPU):
            # np: without the long training for Hamming distances, which is not used.
            rotation, scan = f"OPQ{size}" if rotated else "", 0.1 + 2.9 * size / dimension
            codes.append(_Code(f"PQ{size}np", size, "PQ", rotation, scan))
    if not gpu and _has_rabitq():
        codes += [_rabitq(bits, dimension) for bits in _RABITQ_BITS]
    if not (gpu or split) and lists:
        for size in (dimension // 2, dimension // 4, dimension // 8):
            if size > 1 and size % 2 == 0 and dimension % size == 0:
                rotation, scan = f"OPQ{size}" if rotated else "", 0.03 + 0.13 * size / dimension
                codes.append(_Code(f"PQ{size}x4fs", size // 2, "fs", rotation, scan))
    smaller = [code for code in codes if code.num_bytes < flat.num_bytes]
    return [flat, *sorted(smaller, key=lambda code: -code.num_bytes)]


def _has_rabitq() -> bool:
    """Whether Faiss has it; without Faiss, which only planning does without, it counts as old."""
    try:
        return faiss_version() >= (1, 15)
    except MissingDependencyError:
        return False


def _rabitq(bits: int, dimension: int) -> _Code:
    """RaBitQ with some bits per dimension, and its factors in single precision."""
    if bits == 1:
        return _Code("RaBitQ", -(-dimension // 8) + 8, "RaBitQ", scan=0.25)
    size = -(-dimension // 8) + -(-dimension * (bits - 1) // 8) + 20
    return _Code(f"RaBitQ{bits}", size, "RaBitQ", scan=0.4 if bits == 2 else 0.9)


def _largest_of_kinds(fitting: list[_Code]) -> dict[str, _Code]:
    return {code.kind: code for code in reversed(fitting)}


def _most_exact(trial: _Trial, fitting: list[_Code], recall: float) -> _Code:
    """The code with the highest recall; of those that are close and reach `recall`, the fastest."""
    considered = fitting[:_CONSIDERED]
    highest = max(trial.expected_recall(code) for code in considered)
    least = max(highest - _CLOSE, min(recall, highest))

    def is_close(code: _Code) -> bool:
        return trial.expected_recall(code) >= least

    best = min(filter(is_close, considered), key=lambda code: (code.scan, -code.num_bytes))
    for code in _largest_of_kinds(fitting).values():
        if code.scan < best.scan and is_close(code):
            best = code
    return best


def _fastest(trial: _Trial, fitting: list[_Code], recall: float) -> _Code:
    """The code that is scanned fastest of those that reach the recall, and the smallest of these.

    Half of what may be lost is left to the lists, which would otherwise have to be scanned nearly
    all. If no code loses as little, it is the most exact one.
    """
    wanted = (1 + recall) / 2 if num_lists_for(trial.count) else recall
    largest = _largest_of_kinds(fitting)
    for code in sorted(fitting, key=lambda code: (code.scan, code.num_bytes)):
        # If the largest of its kind does not reach it, the others need not be measured.
        if all(trial.expected_recall(each) >= wanted for each in (largest[code.kind], code)):
            return code
    return max(largest.values(), key=lambda code: (trial.expected_recall(code), -code.scan))


class _Trial:
    """Measures the recall of codes on a sample, each once.

    Args:
        embeddings: The database's vectors.
        rescore: Whether candidates are sorted by the stored vectors.
    """

    def __init__(self, embeddings: Embeddings, rescore: bool = False) -> None:
        self._candidates = NUM_RESCORED if rescore else DECISIVE
        self.count, self.dimension = len(embeddings), embeddings.dimension
        rows = np.linspace(0, self.count - 1, min(_SAMPLE, self.count)).astype(np.int64)
        self._vectors = embeddings.rows(rows)
        self._known: dict[_Code, float] = {}

    def expected_recall(self, code: _Code) -> float:
        """Expected recall@2 among all vectors."""
        if code not in self._known:
            recall = codes_recall(code.string, self._vectors, self.count, self._candidates)
            _LOG.info("choose index: %s, expected recall@%d %.3f", code.string, DECISIVE, recall)
            self._known[code] = recall
        return self._known[code]


def codes_recall(code: str, vectors: np.ndarray, count: int, candidates: int = DECISIVE) -> float:
    """Expected recall@2 of codes without lists among `count` vectors.

    Args:
        code: Their factory string.
        vectors: Evenly spaced ones of them, f32 [n, dimension].
        count: All of them.
        candidates: How many of the nearest codes are compared by their vectors.
    """
    if code == "Flat":
        return 1.0
    index = make_index(code, vectors.shape[1])
    if hasattr(inner := innermost(index), "pq"):
        inner.pq.cp.min_points_per_centroid = 1  # Faiss warns of few vectors, once per subspace
    some = vectors[::_PART]
    queries = np.linspace(0, len(some) - 1, min(_SAMPLE_QUERIES, len(some))).astype(np.int64)
    with faiss_threads(1):  # so that the choice does not depend on the machine
        index.train(vectors)
        recall = _recall_among(index, vectors, _PART * queries, candidates)
        if len(vectors) == count:
            return recall
        before = _recall_among(index, some, queries, candidates)
    fall = max(0.0, before - recall)
    return max(0.0, recall - fall * math.log(count / len(vectors), _PART))


def _recall_among(
    index: object, vectors: np.ndarray, queries: np.ndarray, candidates: int
) -> float:
    """Recall@2 of a trained index among `vectors`, by the best of some candidates.

    `queries` are rows of the vectors, which do not find themselves.
    """
    faiss = faiss_library()
    flat, coded = faiss.IndexFlatL2(vectors.shape[1]), faiss.clone_index(index)
    flat.add(vectors)
    coded.add(vectors)
    ids = [
        without(search(each, vectors[queries], min(k + 1, len(vectors)))[1], queries)
        for each, k in ((coded, candidates), (flat, DECISIVE))
    ]
    found, exact = (squared_distances(vectors[queries], vectors[each], each) for each in ids)
    found = np.sort(found, axis=1)
    nearest = vectors[ids[1][:, 0]] if len(vectors) > 1 else vectors[queries]
    return recall_at(DECISIVE, found, exact, rounding_of(vectors[queries], nearest))


def _nothing_fits(
    trial: _Trial, codes: list[_Code], best: _Code | None, memory: int, recall: float
) -> ConfigurationError:
    count, dimension = trial.count, trial.dimension

    def size(code: _Code) -> str:
        return show_bytes(index_bytes(count, dimension, code.num_bytes))

    larger = [code for code in codes if index_bytes(count, dimension, code.num_bytes) > memory]
    enough = list(takewhile(lambda code: trial.expected_recall(code) >= recall, larger))[-1]
    if best:
        reached = trial.expected_recall(best)
        found = f"{show_bytes(memory)} hold {best.string}, recall@{DECISIVE} {reached:.3f}"
        way = f"ask for --index-recall {math.floor(reached * 100) / 100:.2f}, or "
    else:
        found = f"{show_bytes(memory)} hold no index; the smallest takes {size(codes[-1])}"
        way = ""
    disk = ", or --on-disk" if num_lists_for(count) else ""
    return ConfigurationError(
        f"--index-memory with --index-recall {recall}",
        f"{found} of {count} vectors",
        f"The nearest possible: {way}give {size(enough)} ({enough.string}){disk}",
    )
