"""Search in list order with memory for a quarter of the index: bytes read from the disk.

    python -m benchmarks.capped_search --vectors 1000000 --lists 4096 --folder /data
    python -m benchmarks.capped_search --vectors 100000 --lists 1024 --queries 6250 --batches 0

A process of its own builds the index. This one then opens it on the disk, loads the queries, and
enters a control group (cgroup) of Linux whose limit is what the search of so many queries takes,
plus a share of the index. That needs the right to make control groups, which root has in most
containers with cgroups of version 1. See benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.all_knn import Options as KnnOptions
from benchmarks.all_knn import bytes_read_so_far, make_index, make_vectors, processor
from retro_mcore import host
from retro_mcore.cli.command import run_command
from retro_mcore.retrieval.index import load_index, save_index
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.list_order import ListOrderSearch

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    """Search an index that does not fit into memory."""

    vectors: int = 1_000_000
    """Vectors of the index."""
    dimension: int = 384
    """Dimension of a vector."""
    lists: int = 4096
    """Inverted lists."""
    nprobe: int = 32
    """Lists that each query visits."""
    k: int = 20
    """Neighbors of each query."""
    queries: int = 32_768
    """Queries of a batch, searched in one call."""
    batches: int = 1
    """Batches, one after the other; 0: so many that each vector of the index is a query once."""
    codes: str = "Flat"
    """What the lists hold, as in Faiss's factory strings."""
    share: float = 0.25
    """Memory for the index ÷ its size."""
    folder: Path | None = None
    """Folder for the index (default: a temporary one)."""
    build: bool = False
    """Only write index and queries (this process's own call)."""


def build(options: Options, folder: Path) -> None:
    """Write the index and the queries."""
    faiss_library().omp_set_num_threads(1)
    vectors = make_vectors(options.vectors, options.dimension)
    sizes = {name: getattr(options, name) for name in ("vectors", "dimension", "lists", "nprobe")}
    save_index(make_index(vectors, KnnOptions(**sizes), options.codes), folder / "index")
    wanted = options.batches * options.queries or len(vectors)
    rows = np.random.default_rng(1).permutation(len(vectors))
    np.save(folder / "queries.npy", vectors[np.resize(rows, wanted)])


@contextmanager
def limited_to(more: int) -> Iterator[None]:
    """This process in a control group that lets it use so many bytes more.

    Raises:
        SystemExit: no control group can be made here.
    """
    old = Path("/sys/fs/cgroup/memory")
    parent, limit = (old, "memory.limit_in_bytes") if old.is_dir() else (old.parent, "memory.max")
    group, mine = parent / f"capped_search_{os.getpid()}", str(os.getpid())
    try:
        group.mkdir()
        (group / limit).write_text(str(more))  # what is used already stays with the old group
        (group / "cgroup.procs").write_text(mine)
    except OSError as error:
        raise SystemExit(f"cannot limit this process's memory: {error}") from error
    try:
        yield
    finally:
        (parent / "cgroup.procs").write_text(mine)
        group.rmdir()


def measure(options: Options) -> dict[str, Any]:
    """Search with and without the limit; print and return bytes read ÷ bytes of the index."""
    if options.build:
        assert options.folder is not None
        build(options, options.folder)
        return {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        flags = ["--build", "--folder", str(folder), "--codes", options.codes]
        for field in ("vectors", "dimension", "lists", "nprobe", "queries", "batches"):
            flags += [f"--{field}", str(getattr(options, field))]
        command = [sys.executable, "-m", "benchmarks.capped_search", *flags]
        subprocess.run(command, check=True, cwd=REPOSITORY)
        queries, size = np.load(folder / "queries.npy"), (folder / "index").stat().st_size
        result: dict[str, Any] = {"processor": processor(), "index_bytes": size}
        found = {}
        for kind in ("free", "capped"):
            with (folder / "index").open("rb+") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            searched = ListOrderSearch(load_index(folder / "index", options.nprobe, mapped=True))
            step = min(options.queries, len(queries))
            needs = step * searched.bytes_per_query(options.k) + (64 << 20)
            limit = limited_to(needs + int(options.share * size))
            parts, read, start = [], [], time.process_time()
            with limit if kind == "capped" else nullcontext():
                print(f"{kind}: {host.total_memory() / 2**20:.0f} MiB", flush=True)
                for first in range(0, len(queries), step):
                    before = bytes_read_so_far()
                    parts.append(searched.search(queries[first : first + step], options.k))
                    read.append((bytes_read_so_far() - before) / size)
            del searched  # mapped pages stay in memory
            found[kind] = tuple(map(np.concatenate, zip(*parts, strict=True)))
            result[kind] = {
                "read": sum(read),
                "read_by_batch": read,
                "queries_per_cpu_second": len(queries) / (time.process_time() - start),
            }
        result["equal"] = all(map(np.array_equal, found["free"], found["capped"]))
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count() or 1)  # one thread
    sys.exit(run_command(Options, measure))
