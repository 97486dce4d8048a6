"""Near-duplicates found by two ranks: the bytes of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from tests.processes import run_ranks
from tests.unit.data.aligned import save_tokenizer
from tests.unit.data.near_copies import planted
from tests.unit.data.projects import preprocess_options, write_corpus

pytestmark = pytest.mark.distributed


def preprocess(project: Path, corpus: Path) -> dict:
    tokenizer = str(save_tokenizer(corpus.parent, True))
    options = {"tokenizer_model": tokenizer, "samples": "aligned", "near_duplicates": "drop"}
    return preprocess_corpus(preprocess_options(project, corpus, **options)).report


def contents(project: Path) -> dict[str, bytes]:
    files = sorted(project.rglob("*"))
    return {str(path.relative_to(project)): path.read_bytes() for path in files if path.is_file()}


def test_two_ranks_drop_the_documents_that_one_drops(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", planted())
    report = preprocess(tmp_path / "project", corpus)
    serial = contents(tmp_path / "project")
    shutil.rmtree(tmp_path / "project")
    assert run_ranks(2, preprocess, tmp_path / "project", corpus) == [report, report]
    assert contents(tmp_path / "project") == serial
