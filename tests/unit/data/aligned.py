"""Aligned projects of documents of every length around M, with and without BOS."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.project.config import ProjectSettings
from retro_mcore.retrieval.database import ChunkDatabase
from tests.unit.data.projects import documents, preprocess_options, write_corpus
from tests.unit.data.tokenizer_shapes import begins_with, byte_level, save

M = 16
#: One token per digit and tab, so lengths in characters are lengths in tokens. Some chunks have no
#: words.
TEXTS = [
    *("7" * length for length in (1, M - 2, M - 1, M, M + 1, 2 * M - 1, 2 * M, 2 * M + 1)),
    "start" + "\t" * 3 * M + "end",
    "\t" * 2 * M + "0",
    *documents(10, 150),
    "漢字",
]


def save_tokenizer(folder: Path, bos: bool) -> Path:
    """A byte-level tokenizer, with or without BOS before every text."""
    tokenizer = byte_level(["<s>", "<|end|>"])
    config = {"eos_token": "<|end|>", "bos_token": "<s>"}
    shaped = begins_with(tokenizer, "<s>") if bos else tokenizer
    return save(folder / f"tokenizer_{bos}", shaped, tokenizer_config=config)


def aligned_database(folder: Path, bos: bool, *more: list[str], **changes: object) -> Path:
    """An aligned project of `TEXTS` and more corpora, after build_db; S 64, M 16."""
    folder.mkdir(exist_ok=True)
    named = zip(("corpus", *map(str, range(len(more)))), (TEXTS, *more), strict=True)
    corpora = [str(write_corpus(folder / f"{name}.jsonl", texts)) for name, texts in named]
    project = folder / "project"
    options: dict = {"tokenizer_model": str(save_tokenizer(folder, bos)), "samples": "aligned"}
    options["input"] = corpora
    preprocess_corpus(preprocess_options(project, Path(corpora[0]), **{**options, **changes}))
    build_db(BuildDbOptions(str(project), retro_doc_block_size=6))
    return project


def distances_between(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A made-up distance of every chunk to every other, without ties, f32 [rows, columns].

    Args:
        rows: Chunks of a merged database, [rows, 5].
        columns: Chunks of another.
    """
    vectors = [
        np.stack([np.random.default_rng(row[:3].astype(np.int64)).random(6) for row in chunks])
        for chunks in (rows, columns)
    ]
    return ((vectors[0][:, None] - vectors[1][None]) ** 2).sum(-1).astype(np.float32)


def save_tables(project: Path, num_saved: int = 20) -> Path:
    """Search the neighbors of all chunks exactly, by `distances_between`."""
    train = ChunkDatabase.open(project, own=True)
    named = {}
    for name in ("train", "valid"):
        database = ChunkDatabase.open(project, name, own=True)
        distances = distances_between(database.chunks, train.chunks)
        same = (database.chunks[:, None, :2] == train.chunks[None, :, :2]).all(-1)
        distances[same] = np.inf
        ids = np.argsort(distances, axis=1)[:, :num_saved]
        found = np.take_along_axis(distances, ids, 1)
        ids = np.where(np.isinf(found), NO_NEIGHBOR, ids)
        found[np.isinf(found)] = np.nan
        named[name] = f"chunks_{name}"
        for folder, dataset, values in (("", "neighbors", ids), ("distances", "distances", found)):
            directory = project / "query" / named[name] / folder
            directory.mkdir(parents=True)
            for start in range(0, len(ids), 7):
                end = min(start + 7, len(ids))
                with h5py.File(directory / f"{start:04d}-{end:04d}.hdf5", "w") as file:
                    file[dataset] = values[start:end]
    settings = ProjectSettings.load(project)
    settings.chunk_neighbor_dirs = named
    settings.save(project)
    return project
