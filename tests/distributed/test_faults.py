"""A rank that dies, stops, hangs or fails, in training and in each stage of the data pipeline.

The job of four ranks ends with an exit code that is not 0, and with the rank's name; the others end
in time (`start` asserts it). The next start continues, and its result is that of a run without
faults.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.distributed.faulty_run import RANKS, SAVE_INTERVAL, Fault, start
from tests.unit.data.projects import build_all, documents, preprocess_options, write_corpus
from tests.unit.training.small import BATCH, TRAIN_SAMPLES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ITERATIONS = TRAIN_SAMPLES // BATCH


def losses(folder: Path) -> list[float]:
    return json.loads((folder / f"rank_{RANKS - 1}.json").read_text(encoding="utf-8"))


def train(
    folder: Path, kind: str = "none", *flags: object, restarts: int = 0
) -> tuple[int, list[str]]:
    """Train; rank 1 fails after an iteration that follows a checkpoint."""
    fault = Fault(kind, rank=1, place=f"training {SAVE_INTERVAL + 1} of")
    return start(folder / kind, fault, "train", "--directory", folder, *flags, restarts=restarts)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run without faults; rank 2 reads slowly."""
    folder = tmp_path_factory.mktemp("whole")
    code, outputs = train(folder, "none", "--log-straggler", "--slow-rank", 2)
    assert code == 0, outputs
    assert "this rank ends too" not in "".join(outputs)
    return folder


def test_a_slow_rank_is_named(whole_run):
    metrics = (whole_run / "checkpoints" / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in metrics.splitlines()]
    slow = [record for record in records if record["kind"] == "straggler"]
    reading = [record for record in slow if record["work"] == "reading samples"]
    # It sleeps for a second in each iteration. Others may be slow too: machines are shared.
    assert {record["iteration"] for record in reading if record["rank"] == 2} == {
        *range(1, ITERATIONS + 1)
    }
    (output,) = (whole_run / "none" / "logs").glob("*/*/0/stdout.log")
    assert re.search(r"slow rank 2 \(\S+\) \| reading samples \d", output.read_text())


NAMED = r"rank 1 \(\S+, pid \d+\) "
#: How the launcher names it, if its process has ended.
ROOT_CAUSE = r"Root Cause(?s:.*?)\n *rank +: 1 (?s:.*?)\n *exitcode +: {} "
EXIT_CODES = {"raise": 1, "kill": -9}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("kill", "has ended; last seen in train_and_report"),
        ("stop", r"has not answered for \d+ s; last seen in train_and_report"),
        (
            "hang",
            r"keeps the others waiting: for \d+ s it has been in train_and_report: training 3 of 6",
        ),
        (
            "raise",
            "failed in train_and_report: training 3 of 6 at training/.*: ValueError: something",
        ),
    ],
)
def test_training_loses_no_more_than_the_save_interval(tmp_path, whole_run, kind, told):
    code, outputs = train(tmp_path, kind)
    assert code != 0
    for rank in {*range(RANKS)} - {1}:
        assert re.search(NAMED + told, outputs[rank]), outputs[rank]
        assert "this rank ends too. Its threads:" in outputs[rank]
    if kind == "hang":
        assert "in _fail\n" in outputs[1]
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(SAVE_INTERVAL)
    code, outputs = train(tmp_path)
    assert code == 0, outputs
    assert len(losses(tmp_path)) == ITERATIONS - SAVE_INTERVAL
    assert losses(tmp_path) == losses(whole_run)[SAVE_INTERVAL:]


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_ranks_that_the_launcher_starts_again_go_on(tmp_path, whole_run, kind):
    """As torchrun --max-restarts 1 does. The store is the same; the watch takes no rank of before
    for one that is gone."""
    code, outputs = train(tmp_path, kind, restarts=1)
    assert code == 0, outputs
    assert losses(tmp_path) == losses(whole_run)[SAVE_INTERVAL:]
    assert len([*(tmp_path / kind / "logs").glob("*/attempt_1/1")]) == 1


def contents(project: Path) -> dict[str, bytes]:
    """Every file of a project but logs and Megatron's own cache."""
    return {
        str(path.relative_to(project)): path.read_bytes()
        for path in sorted(project.rglob("*"))
        if path.is_file() and not {"cache", "logs"} & {*path.relative_to(project).parts}
    }


def test_stages_end_and_go_on(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents(40, 200))
    project = tmp_path / "project"
    build_all(project, corpus, "lexical")
    expected = contents(project)
    shutil.rmtree(project)
    text = vars(preprocess_options(project, corpus)).items()
    given = {"input", "vocab_size", "samples", "seq_length", "retro_chunk_length", "split"}
    given |= {"train_samples", "global_batch_size", "eval_iters", "retro_block_size"}
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in text if name in given]
    preprocess = [str(v[0] if isinstance(v, list) else v) for flag in flags for v in flag]
    for stage, kind, told, own in (
        ("preprocess_corpus", "hang", NAMED + "keeps the others waiting: .*tokenize", preprocess),
        # All raise its error.
        ("build_db", "raise", "rank 1 failed: ValueError: some", ["--retro-doc-block-size", 6]),
        ("build_index", "kill", NAMED + "has ended; last seen in", ["--embedder", "lexical"]),
        ("query_neighbors", "stop", NAMED + "has not answered", ["--num-neighbors-save", 5]),
    ):
        flags = ["--project-dir", project, *own]
        code, outputs = start(tmp_path / stage, Fault(kind), stage, *flags)
        assert code != 0
        if kind in EXIT_CODES:
            # The launcher may end the others before they wait for the rank, and so before they
            # notice. It names it then.
            told += "|" + ROOT_CAUSE.format(EXIT_CODES[kind])
        assert re.search(told, "".join(outputs)), (stage, outputs)
        code, outputs = start(tmp_path / f"{stage}_again", Fault("none"), stage, *flags)
        assert code == 0, (stage, outputs)
    assert contents(project) == expected
