"""Recall of a project's index for other queries than those that its breadth was tuned with.

    python -m benchmarks.other_queries --project-dir PROJECT

Random rows of the database are searched for, and exact search is the reference. build_index tunes
with chunks of held-out documents. Printed with the bytes of a vector and the queries per processor
second of `index.search`. query_neighbors searches in list order, which is faster and visits the
nearest lists, also where a graph over them misses some.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.all_knn import processor
from retro_mcore.cli.command import run_command
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.index.build import read_recall
from retro_mcore.retrieval.index.embeddings import Embeddings, HeldOut
from retro_mcore.retrieval.index.files import load_index
from retro_mcore.retrieval.index.filling import stored_bytes
from retro_mcore.retrieval.index.list_order import ListOrderSearch, supports_list_order
from retro_mcore.retrieval.index.recall import RecallMeasure, exact_neighbors
from retro_mcore.stages.build_index import stored_embeddings


@dataclass
class Options:
    """Measure an index with random rows of its database."""

    project_dir: Path
    """A project after build_index, whose index is one file."""
    queries: int = 2000
    """Number of rows."""
    seed: int = 0
    """Seed of their choice."""


def run(options: Options) -> dict[str, Any]:
    """Measure and print."""
    paths = ProjectPaths(options.project_dir)
    settings = ProjectSettings.load(paths.root)
    embeddings = Embeddings(stored_embeddings(paths).shards)
    random = np.random.default_rng(options.seed)
    rows = np.sort(random.choice(len(embeddings), min(options.queries, len(embeddings)), False))
    queries = HeldOut(embeddings.rows(rows), rows)
    _, exact = exact_neighbors(embeddings, queries, Shard(0, len(embeddings), Path()))
    assert settings.index_string is not None
    index = load_index(paths.added_index(settings.index_string), mapped=True)
    measure = RecallMeasure(index, queries, exact, embeddings, settings.index_rescored)
    start = time.process_time()
    recall = measure(settings.nprobe, settings.ef_search)
    seconds = time.process_time() - start
    result = {
        "processor": processor(),
        "index": settings.index_string,
        "vectors": len(embeddings),
        "bytes per vector": stored_bytes(index, 1),
        "nprobe": settings.nprobe,
        "tuned": read_recall(paths, settings.index_string).at,
        "others": recall.at,
        "queries": recall.num_queries,
        "queries per CPU second": len(rows) / seconds,
    }
    if supports_list_order(index):  # as query_neighbors searches, with the breadth that is set now
        in_order = RecallMeasure(ListOrderSearch(index), queries, exact, embeddings)
        result["others, in list order"] = in_order(None, None).at
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    sys.exit(run_command(Options, run))
