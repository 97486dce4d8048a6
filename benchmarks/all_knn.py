"""Search of a large batch in list order beside Faiss's `index.search`, on one core.

    python -m benchmarks.all_knn                                    # 100,000 vectors, minutes
    python -m benchmarks.all_knn --vectors 1000000 --lists 4096 --queries 65536 --json all_knn.json
    python -m benchmarks.all_knn --codes PQ48x4fs --k 52 --nprobe 96

Both sides take turns. An index that is not searched in list order, such as one of fast-scan codes,
is searched by `index.search` on both sides, with few and with many queries per call. Ratios are of
processor seconds. See benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.cli.command import run_command
from retro_mcore.retrieval.index import load_index, save_index, search
from retro_mcore.retrieval.index.faiss_search import by_distance_then_id, search_once
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.list_order import ListOrderSearch, supports_list_order


@dataclass
class Options:
    """Measure search in list order beside `index.search`."""

    vectors: int = 100_000
    """Vectors of the index: unit vectors in overlapping clusters."""
    dimension: int = 384
    """Dimension of a vector."""
    lists: int = 512
    """Inverted lists."""
    nprobe: int = 32
    """Lists that each query visits."""
    k: int = 20
    """Neighbors of each query."""
    queries: int = 32_768
    """Queries of the second side; in list order all in one call. Rows of the index."""
    compared: int = 1024
    """Queries of `index.search`: the first ones."""
    per_call: int = 4096
    """Queries per call of `index.search` on the second side of an index that is not searched in
    list order."""
    codes: list[str] = field(default_factory=lambda: ["Flat", "SQ8", "PQ48"])
    """What the lists hold, as in Faiss's factory strings."""
    rounds: int = 3
    """Measurements of each side, in turns; their median counts."""
    folder: Path | None = None
    """Folder for the index that is read from the disk (default: a temporary one)."""
    json: Path | None = None
    """Write the results here."""


@dataclass
class Result:
    """Results of one index.

    Attributes:
        index: Faiss factory string.
        second: What the second side is: list order, or larger calls.
        plain: Queries per processor second of `index.search`.
        large: Queries per processor second of the second side.
        ratio: Their ratio.
        equal_ids: Share of ids that are the same, place by place.
        equal_distances: Share of distances that are the same to the bit.
        farthest: Largest difference of distances.
        read: Bytes read from the disk in list order ÷ bytes of the index; None: not counted.
    """

    index: str
    second: str
    plain: float
    large: float
    ratio: float
    equal_ids: float
    equal_distances: float
    farthest: float
    read: float | None


def make_vectors(count: int, dimension: int) -> np.ndarray:
    """Unit vectors f32 [count, dimension] of about 64 degrees of freedom, in clusters."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(max(8, count // 100), 64)).astype(np.float32)
    spread = random.normal(size=(64, dimension)).astype(np.float32)
    rows = np.empty((count, dimension), np.float32)
    for start in range(0, count, 65_536):
        size = min(65_536, count - start)
        inner = centers[random.integers(0, len(centers), size)]
        inner += 0.7 * random.normal(size=inner.shape).astype(np.float32)
        noise = random.normal(size=(size, dimension)).astype(np.float32)
        rows[start : start + size] = inner @ spread + noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_index(vectors: np.ndarray, options: Options, codes: str) -> Any:
    """Train on part of the vectors, with few iterations, and add all."""
    faiss = faiss_library()
    index = faiss.index_factory(options.dimension, f"IVF{options.lists},{codes}")
    index.cp.niter = 4
    if hasattr(index, "pq"):
        index.pq.cp.niter, index.pq.cp.max_points_per_centroid = 4, 40
    index.train(vectors[: 40 * options.lists])
    index.add(vectors)
    index.nprobe = options.nprobe
    return index


def measure(vectors: np.ndarray, options: Options, codes: str, folder: Path) -> Result:
    """Measure one kind of lists."""
    index = make_index(vectors, options, codes)
    random = np.random.default_rng(1)
    queries = vectors[random.choice(len(vectors), options.queries, options.queries > len(vectors))]
    few = queries[: options.compared]
    plain: list[float] = []
    large: list[float] = []
    in_order = supports_list_order(index)

    def together() -> tuple[np.ndarray, np.ndarray]:
        if in_order:
            return ListOrderSearch(index).search(queries, options.k)
        return _in_calls(index, queries, options)

    for _ in range(options.rounds):
        expected = _timed(lambda: search(index, few, options.k), len(few), plain)
        found = _timed(together, len(queries), large)
    return Result(
        f"IVF{options.lists},{codes}",
        "list order" if in_order else f"{min(options.per_call, len(queries))} per call",
        statistics.median(plain),
        statistics.median(large),
        statistics.median(fast / slow for fast, slow in zip(large, plain, strict=True)),
        float((found[1][: len(few)] == expected[1]).mean()),
        float((found[0][: len(few)] == expected[0]).mean()),
        float(np.abs(found[0][: len(few)] - expected[0]).max()),
        _bytes_read(index, queries, options, folder) if in_order else None,
    )


def _in_calls(index: Any, queries: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """`index.search` with `per_call` queries per call."""
    starts = range(0, len(queries), options.per_call)
    found = [search_once(index, queries[at : at + options.per_call], options.k) for at in starts]
    distances, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return by_distance_then_id(distances, ids)


def _timed(run: Callable[[], Any], count: int, rates: list[float]) -> Any:
    start = time.process_time()
    result = run()
    rates.append(count / (time.process_time() - start))
    return result


def _bytes_read(index: Any, queries: np.ndarray, options: Options, folder: Path) -> float | None:
    """Bytes read ÷ bytes of the index, of one search in lists that lie on the disk alone."""
    path = folder / "index.faissindex"
    save_index(index, path)
    mapped = load_index(path, options.nprobe, mapped=True)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = bytes_read_so_far()
    ListOrderSearch(mapped).search(queries, options.k)
    after, size = bytes_read_so_far(), path.stat().st_size
    path.unlink()
    return (after - before) / size if after > before else None


def bytes_read_so_far() -> int:
    """Bytes that this process has read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def processor() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def measure_all(options: Options) -> list[Result]:
    """Measure all kinds of lists and print a table."""
    faiss_library().omp_set_num_threads(1)
    vectors = make_vectors(options.vectors, options.dimension)
    print(f"{processor()}, one core, {options.vectors} x {options.dimension}, {options}")
    print("index | second side | search q/s | its q/s | ratio | ids = | distances = | apart | read")
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for codes in options.codes:
            result = measure(vectors, options, codes, Path(folder))
            results.append(result)
            values = [
                f"{value:.4g}" if isinstance(value, float) else str(value)
                for value in asdict(result).values()
            ]
            print(" | ".join(values), flush=True)
    if options.json is not None:
        rows = [asdict(result) for result in results]
        options.json.write_text(json.dumps({"processor": processor(), "results": rows}, indent=1))
    return results


if __name__ == "__main__":
    # Two threads of one core would take longer, each in processor time of its own.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sys.exit(run_command(Options, measure_all))
