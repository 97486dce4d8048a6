"""Any number of ranks, any restart: the same bytes."""

import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.errors import CorpusError, ProjectError
from retro_mcore.project import ProjectPaths
from retro_mcore.project.lock import stage_lock
from tests.processes import START_METHOD, run_ranks
from tests.unit.data.projects import build_all, documents, preprocess_options, write_corpus

pytestmark = pytest.mark.distributed


def contents(project: Path) -> dict[str, bytes]:
    """Every file of a project but Megatron's own cache."""
    return {
        str(path.relative_to(project)): path.read_bytes()
        for path in sorted(project.rglob("*"))
        if path.is_file() and "cache" not in path.parts
    }


def preprocess_and_cut(project: Path, corpus: Path) -> None:
    preprocess_corpus(preprocess_options(project, corpus))
    build_db(BuildDbOptions(str(project), retro_doc_block_size=1))


def refuse_a_second_run(project: Path, corpus: Path) -> tuple[str, bool]:
    """What this rank is told while rank 0 of another run holds the project, and what follows."""
    paths = ProjectPaths(project)
    with stage_lock(paths, "build_index"):
        with pytest.raises(ProjectError) as caught:
            preprocess_corpus(preprocess_options(project, corpus))
        held = paths.lock.is_file()
    torch.distributed.barrier()
    return str(caught.value), held and not paths.lock.exists()


def fail_on_one_rank(project: Path, corpus: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        preprocess_corpus(preprocess_options(project, corpus))
    return str(caught.value)


def test_all_ranks_are_refused_a_project_that_another_run_holds(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents(10, 200))
    (tmp_path / "project").mkdir()
    told = run_ranks(2, refuse_a_second_run, tmp_path / "project", corpus)
    assert told[0][0] == told[1][0]
    assert "another run works on it: build_index, process" in told[0][0]
    assert told[0][1]


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_and_mend_what_was_damaged(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents(10, 200))
    project = tmp_path / "project"
    build_all(project, corpus, "minilm")
    serial = contents(project)
    shutil.rmtree(project)
    run_ranks(2, build_all, project, corpus, "minilm")
    assert contents(project) == serial

    # Unfinished and damaged files of each stage, then another world size.
    hdf5 = [name for name in serial if name.endswith(".hdf5")]
    (project / hdf5[0]).unlink()
    (project / hdf5[1]).write_bytes(serial[hdf5[1]][:-1])
    for name in ("embeddings", "exact", "query", "merged"):
        found = next(path for path in hdf5 if name in path)
        (project / found).write_bytes(b"\0" * len(serial[found]))
    (project / "index/faiss-par-add/Flat/added_1.000_1.000.faissindex").write_bytes(b"IxF2")
    (project / "data/corpus_text_document.bin").unlink()
    build_all(project, corpus, "minilm")
    assert contents(project) == serial


def test_a_killed_stage_goes_on_where_it_stopped(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents(40))
    project = tmp_path / "project"
    preprocess_and_cut(project, corpus)
    undisturbed = contents(project)
    shutil.rmtree(project)

    process = multiprocessing.get_context(START_METHOD).Process(
        target=preprocess_and_cut, args=(project, corpus)
    )
    process.start()
    deadline = time.monotonic() + 120
    while not list(project.glob("db/individual/*/*.done")):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (project / "stages" / "build_db.json").exists()

    run_ranks(2, preprocess_and_cut, project, corpus)
    left = contents(project)
    assert {name for name in left if not name.endswith(".tmp")} == set(undisturbed)
    assert {name: left[name] for name in undisturbed} == undisturbed


def test_every_rank_raises_the_error_of_one(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "fine"}\n{"text": 3}\n')
    messages = run_ranks(2, fail_on_one_rank, tmp_path / "project", corpus)
    assert messages[0] == messages[1]
    assert "corpus.jsonl:2" in messages[0]
