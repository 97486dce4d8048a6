"""Aligned projects of documents of every length around M, with and without BOS."""

from __future__ import annotations

from pathlib import Path

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
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


def aligned_database(folder: Path, bos: bool, texts: list[str] = TEXTS, **changes: object) -> Path:
    """An aligned project after build_db; S 64, M 16."""
    folder.mkdir(exist_ok=True)
    corpus = write_corpus(folder / "corpus.jsonl", texts)
    project = folder / "project"
    options: dict = {"tokenizer_model": str(save_tokenizer(folder, bos)), "samples": "aligned"}
    preprocess_corpus(preprocess_options(project, corpus, **options, **changes))
    build_db(BuildDbOptions(str(project), retro_doc_block_size=6))
    return project
