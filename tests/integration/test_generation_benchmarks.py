"""The benchmarks of generation, of the server and of transformers run, at a tiny size."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_both_benchmarks_run(tmp_path, capsys):
    from benchmarks import generation, server

    small = {"hidden_size": 64, "num_layers": 3, "work_dir": str(tmp_path)}
    figures = generation.run(
        generation.Options(
            windows=[128, 192], retrieval_tokens=70, lead=8, vocab_size=1024, **small
        )
    )
    assert set(figures.recomputed) == set(figures.cached) == {128, 192}
    assert len(figures.growth) == 2
    assert set(figures.share) == {"without prefetch", "with prefetch"}
    loads, statuses = server.run(
        server.Options(clients=[1, 3], requests_per_client=1, new_tokens=4, malformed=60, **small)
    )
    assert [(load.clients, load.errors, len(load.latencies)) for load in loads] == [
        (1, 0, 1),
        (3, 0, 3),
    ]
    assert sum(statuses.values()) == 60
    assert all(200 <= status < 500 for status in statuses)  # none fails the server
    assert "a good one then: 200" in capsys.readouterr().out


def test_the_benchmark_of_transformers_runs(tmp_path):
    from benchmarks import huggingface

    options = huggingface.Options(
        hidden_size=64, num_layers=3, vocab_size=1024, new_tokens=8, rounds=1, size="tiny",
        work_dir=str(tmp_path),
    )  # fmt: skip
    figures = huggingface.run(options)
    assert min(figures["ours"], figures["theirs"]) > 0
    targets = [each["target"] for each in figures["conversions"]]
    assert targets == ["retro-mcore", "huggingface"]
