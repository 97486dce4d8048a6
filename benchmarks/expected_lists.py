"""Lists that a search must visit: expected from a sample, and needed among all vectors.

    python -m benchmarks.expected_lists --normal 16                         # 100,000 normal vectors
    python -m benchmarks.expected_lists --normal 32 --vectors 1000000 --lists 4096
    python -m benchmarks.expected_lists --project-dir PROJECT --lists 8192  # after build_index

Needed is counted twice: with each vector in its nearest list, and in the one where Faiss's graph
over the centers places it. Of a project, samples are whole documents, and chunks of a query's own
document are no neighbors. See benchmarks/README.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retro_mcore.cli.command import run_command
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.index import Embeddings, search
from retro_mcore.retrieval.index.breadth import sample_breadth
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.index.recall import DECISIVE
from retro_mcore.retrieval.index.training import innermost, make_index, train
from retro_mcore.stages.build_index import stored_embeddings

_TRAINING_PER_LIST = 64
_CANDIDATES = 64


@dataclass
class Options:
    """Compare expected and needed lists."""

    project_dir: Path | None = None
    """Project with embeddings; None: normal vectors."""
    normal: int = 16
    """Dimension of normal vectors."""
    vectors: int = 100_000
    """Number of normal vectors."""
    lists: int = 1024
    """Lists of the large index."""
    samples: list[int] = field(default_factory=lambda: [50_000, 131_072])
    """Sizes of the samples; larger ones than the whole are left out."""
    recall: float = 0.95
    """Target recall@2."""
    queries: int = 4000
    """Queries: evenly spaced vectors, which do not find themselves."""


def read_vectors(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """All vectors, f32 [n, dimension], and the numbers of their documents in order, i64 [n]."""
    if options.project_dir is None:
        random = np.random.default_rng(0)
        vectors = random.standard_normal((options.vectors, options.normal), np.float32)
        return vectors, np.arange(len(vectors))
    paths = ProjectPaths(options.project_dir)
    embeddings = Embeddings(stored_embeddings(paths).shards)
    rows = np.arange(len(embeddings))
    owners = ChunkDatabase.open(paths.root, own=True).documents(rows)
    documents = np.cumsum((owners != np.roll(owners, 1, axis=0)).any(axis=1))
    return embeddings.range(0, len(embeddings)), documents


def sample_of(documents: np.ndarray, size: int) -> np.ndarray:
    """Rows of evenly spaced whole documents, about `size`."""
    last = int(documents[-1])
    chosen = np.linspace(0, last, max(1, round((last + 1) * size / len(documents))))
    return np.flatnonzero(np.isin(documents, chosen.astype(np.int64)))


def needed(vectors: np.ndarray, documents: np.ndarray, options: Options) -> dict[str, int]:
    """Lists needed with exact and with the graph's placement, and vectors that it misplaces."""
    index = make_index(f"IVF{options.lists}_HNSW32,Flat", vectors.shape[1])
    train(index, vectors[:: max(1, len(vectors) // (_TRAINING_PER_LIST * options.lists))])
    graph = faiss_library().downcast_index(innermost(index).quantizer)
    flat = faiss_library().IndexFlatL2(vectors.shape[1])
    flat.add(graph.reconstruct_n(0, options.lists))
    count = min(options.queries, len(vectors))
    rows = np.linspace(0, len(vectors) - 1, count).astype(np.int64)
    whole = faiss_library().IndexFlatL2(vectors.shape[1])
    whole.add(vectors)
    candidates = search(whole, vectors[rows], _CANDIDATES)[1]
    others = documents[candidates] != documents[rows][:, None]
    full = np.flatnonzero(others.sum(axis=1) >= DECISIVE)
    rows, candidates, others = rows[full], candidates[full], others[full]
    nearest = candidates[others & (others.cumsum(axis=1) <= DECISIVE)].reshape(-1, DECISIVE)
    in_turn = search(flat, vectors[rows], options.lists)[1]
    ranks = np.empty_like(in_turn)
    np.put_along_axis(ranks, in_turn, np.arange(options.lists)[None], axis=1)
    result, homes = {}, {}
    for name, quantizer in (("exact", flat), ("graph", graph)):
        homes[name] = search(quantizer, vectors[nearest.ravel()], 1)[1].reshape(nearest.shape)
        found = np.take_along_axis(ranks, homes[name], axis=1)
        result[name] = 1 + int(np.quantile(found, options.recall, method="inverted_cdf"))
    result["misplaced, %"] = round(100 * float((homes["exact"] != homes["graph"]).mean()))
    return result


def main_with(options: Options) -> dict[str, int]:
    """Print and return expected and needed lists."""
    vectors, documents = read_vectors(options)
    result = needed(vectors, documents, options)
    for size in options.samples:
        if size < len(vectors):
            rows = sample_of(documents, size)
            breadth = sample_breadth(vectors[rows], len(vectors), options.lists, documents[rows])
            result[f"expected from {size}"] = breadth.probes(options.recall)
    for name, value in result.items():
        print(f"{name}: {value}")
    return result


if __name__ == "__main__":
    sys.exit(run_command(Options, main_with))
