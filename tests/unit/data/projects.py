"""A small project on real text, built once and copied by the tests that change it."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import h5py
import numpy as np

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import PreprocessCorpusOptions, preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.project.shards import Shard, cut, run_shards


def documents(count: int = 20, length: int = 350) -> list[str]:
    """Beginnings of Python's help topics, the second half repeated from the first (neighbors)."""
    from pydoc_data.topics import topics

    texts = [topics[name].strip()[:length] for name in sorted(topics)[: count // 2]]
    return texts + [f"Again: {text}" for text in texts[: count - len(texts)]]


def write_corpus(path: Path, texts: list[str], key: str = "text") -> Path:
    """JSON lines with ids: topic-0, topic-1 …"""
    lines = [json.dumps({"id": f"topic-{i}", key: text}) for i, text in enumerate(texts)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def preprocess_options(project: Path, corpus: Path, **changes: object) -> PreprocessCorpusOptions:
    """S 64, M 16, 8 training samples, packed."""
    values: dict = {
        "project_dir": str(project),
        "input": [str(corpus)],
        **({} if changes.get("tokenizer_model") else {"vocab_size": 500}),
        "samples": "packed",
        "seq_length": 64,
        "retro_chunk_length": 16,
        "split": "60,20,20",
        "train_samples": 8,
        "global_batch_size": 2,
        "eval_iters": 1,
        "retro_block_size": 20,
    }
    return PreprocessCorpusOptions(**{**values, **changes})


def build_all(project: Path, corpus: Path, embedder: str = "static") -> None:
    """All four stages. The default embedder would take ten times as long as static vectors."""
    preprocess_corpus(preprocess_options(project, corpus))
    build_db(BuildDbOptions(str(project), retro_doc_block_size=6))
    build_index(BuildIndexOptions(str(project), embedder=embedder))
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))


def write_rows(rows: np.ndarray, directory: Path, length: int) -> list[Shard]:
    """Rows as embeddings, `length` to a file."""
    shards = cut(directory, len(rows), length)

    def build(shard: Shard, path: Path) -> None:
        with h5py.File(path, "w") as file:
            file["data"] = rows[shard.start : shard.end]

    run_shards(shards, build, "rows", "rows")
    return shards


def built_project() -> Path:
    """A finished project, searched by static vectors; do not change it."""
    return project_of("static")


@cache
def project_of(embedder: str) -> Path:
    """A finished project of an embedder; do not change it."""
    folder = Path(tempfile.mkdtemp(prefix="retro_project_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build_all(folder / "project", write_corpus(folder / "corpus.jsonl", documents()), embedder)
    return folder / "project"


def forget_neighbors(project: Path) -> Path:
    """The project as before query_neighbors."""
    shutil.rmtree(project / "query")
    (project / "stages" / "query_neighbors.json").unlink()
    return project


@cache
def blended_project() -> Path:
    """A finished project of two datasets of one size, found by words alone; do not change it."""
    folder = Path(tempfile.mkdtemp(prefix="retro_blended_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    texts = documents(24, 300)
    corpora = [write_corpus(folder / f"{n}.jsonl", texts[i::2]) for i, n in enumerate("ab")]
    project = folder / "project"
    options = preprocess_options(
        project,
        corpora[0],
        input=[str(corpus) for corpus in corpora],
        input_weights=[0.5, 0.5],
        train_samples=16,
    )
    preprocess_corpus(options)
    build_db(BuildDbOptions(str(project)))
    build_index(BuildIndexOptions(str(project), embedder="lexical"))
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    return project
