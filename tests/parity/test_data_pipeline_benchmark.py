"""The data pipeline's benchmark runs on a small corpus, and both sides do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks.data_pipeline import Options, measure
from retro_mcore.errors import ConfigurationError
from tests.unit.data.projects import write_corpus

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Python's help topics, and a byte-level BPE without merges."""
    from pydoc_data.topics import topics

    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("corpus")
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    texts = [topics[name][:4000] for name in sorted(topics)]
    return {
        "documents": write_corpus(folder / "documents.jsonl", texts),
        "vocab_file": folder / "vocab.json",
        "merge_file": folder / "merges.txt",
    }


def test_both_sides_of_a_small_corpus(corpus: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "data.json"
    options = Options(
        tmp_path / "bench",
        chunks=[500],
        samples=8,
        parts=["build", "query", "dataset"],
        rounds=1,
        json=output,
        **corpus,
    )
    rows = measure(options)
    assert {row.part for row in rows} == {"build", "query", "dataset"}
    assert all(row.ours > 0 for row in rows)
    written = json.loads(output.read_text())
    assert len(written["rows"]) == len(rows)
    built = [m["chunks"] for m in written["measurements"] if m["stage"].startswith("build")]
    assert len(built) > 3
    assert len(set(built)) == 1
    # What was filtered and saved is the same on both sides.
    folder = options.folder
    saved = []
    for side in ("ours", "retired"):
        files = sorted((folder / f"{side}-500" / "query" / "train_filled").glob("*.hdf5"))
        arrays = []
        for path in files:
            with h5py.File(path) as file:
                arrays.append(file["neighbors"][:])
        saved.append(np.concatenate(arrays))
    np.testing.assert_array_equal(*saved)


def test_a_corpus_that_is_too_small_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--chunks: 1000000, but the corpus has about"):
        measure(Options(tmp_path / "bench", chunks=[1_000_000], parts=["build"], **corpus))
