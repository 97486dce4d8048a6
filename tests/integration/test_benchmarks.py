"""Benchmarks that measure a project (mypy checks what all of them import)."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_indexes_are_compared_on_vectors_of_a_project(tmp_path, capsys):
    from benchmarks.index_choice import Options, measure
    from tests.unit.data.projects import built_project

    options = Options(
        project_dir=built_project(),
        vectors=60,
        queries=8,
        lists=2,
        nprobe=2,
        candidates=10,
        index=["IVF{L},Flat", "IVF{L},SQ8"],
    )
    rows = measure(options)
    assert [row.index for row in rows] == ["IVF2,Flat", "IVF2,SQ8"]
    assert rows[0].recall == 1.0  # both lists are scanned


@pytest.mark.parametrize(
    ("together", "tokens", "computed"),
    # One batch of 16 chunks; 9 tokens, and 1 twice; sorted apart, 9 tokens, 1 and 1.
    [(3, 0, 27), (3, 8, 9 + 2), (2, 8, 9 + 1 + 1)],
)
def test_padding_is_counted_as_embedders_batch(together, tokens, computed):
    from benchmarks.embedding import share_of_padding

    assert share_of_padding([1, 9, 1], together, tokens) == pytest.approx(1 - 11 / computed)


@pytest.mark.slow
def test_a_large_batch_is_searched_in_list_order_or_in_larger_calls(tmp_path):
    from benchmarks.all_knn import Options, measure_all

    sizes = {"vectors": 3000, "dimension": 32, "lists": 8, "nprobe": 4, "k": 5, "queries": 600}
    codes = ["Flat", "SQ8", "PQ8x4fs"]
    options = Options(**sizes, compared=200, per_call=300, rounds=1, codes=codes, folder=tmp_path)
    found = measure_all(options)
    assert [row.second for row in found] == ["list order", "list order", "300 per call"]
    assert found[0].equal_ids == 1.0
    assert all(row.equal_ids > 0.99 for row in found)  # sums of codes are rounded differently
    assert all(min(row.plain, row.large, row.ratio) > 0 for row in found)


@pytest.mark.slow
def test_embedders_are_compared_and_those_that_lack_are_named():
    from benchmarks.embedding import chunks, measure

    results = measure(["lexical", "minilm:fp16"], chunks(60), rounds=1)
    assert results["lexical"].overlap == results["lexical"].ratio == 1.0
    assert results["lexical"].rate > 0
    assert results["minilm:fp16"].refused  # fp16 is for GPUs


@pytest.mark.slow
def test_a_large_corpus_is_recombined_and_a_stage_that_takes_too_long_is_killed(tmp_path):
    from benchmarks.large_corpus import start, write_corpus

    corpus = tmp_path / "corpus.jsonl"
    write_corpus(corpus, 180)
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    assert len(set(texts)) == 10
    for code, limit, ends in (("", None, True), ("import time; time.sleep(600)", 0.2, False)):
        assert start([sys.executable, "-c", code], tmp_path / "log.txt", limit)[0] == ends
    with pytest.raises(SystemExit):
        start([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log.txt", None)


@pytest.mark.slow
def test_what_a_layout_costs_is_read_from_its_project():
    from benchmarks.aligned_against_packed import counted_share, padding_share, query_cost
    from tests.unit.data.projects import built_project

    project = built_project()
    assert 0 < counted_share(project, 4) <= 1
    assert 0 <= padding_share(project) < 1
    cost = query_cost(project)
    assert 0 <= cost["embedded"] <= cost["searched"] > 0


@pytest.mark.slow
def test_recall_is_measured_with_other_queries():
    from benchmarks.other_queries import Options, run
    from tests.unit.data.projects import built_project

    found = run(Options(built_project(), queries=20))
    assert found["queries"] == 20
    assert found["others"][1] == 1.0  # its index is exhaustive
    assert found["bytes per vector"] > 0


@pytest.mark.slow
def test_other_samplings_cost_nothing_if_samples_are_aligned(tmp_path):
    command = [sys.executable, "-m", "benchmarks.samplings", "--documents", "30", "--seeds", "1"]
    subprocess.run([*command, "--json", str(tmp_path / "cost")], capture_output=True, check=True)
    cost = json.loads((tmp_path / "cost").read_text(encoding="utf-8"))
    assert cost["samplings"] == 2
    # Of each packed sampling some samples at the end are left over.
    assert 1.5 < cost["searched, packed ÷ aligned"] <= 2.1
    assert 1.5 < cost["embedded, packed ÷ aligned"] <= 3.1


@pytest.mark.slow
@pytest.mark.distributed
def test_a_layout_is_compared_with_one_process():
    command = [sys.executable, "-m", "benchmarks.parallel_cost", "--smoke", "--only", "CP2"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sent, memory = re.search(r"^CP2 .* ([\d.]+) MiB sent, memory ([\d.]+) x", output).groups()
    assert float(sent) > 0
    assert float(memory) < 1


@pytest.mark.slow
def test_options_of_retrieval_are_compared_by_training_each(tmp_path):
    changes = ["encoder of width 64", "cross-attention starts at 0"]
    command = [sys.executable, "-m", "benchmarks.retrieval_options", "--smoke"]
    command += ["--folder", str(tmp_path), "--only", *changes, "--json", str(tmp_path / "rows")]
    subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "rows").read_text(encoding="utf-8"))
    assert [row["change"] for row in rows] == ["quickstart", *changes]
    assert len({row["real"] for row in rows}) == len(rows)  # each change has an effect
    assert rows[1]["parameters"] != rows[0]["parameters"] == rows[2]["parameters"]


def test_expected_lists_are_compared_with_needed_ones():
    from benchmarks.expected_lists import Options, main_with

    found = main_with(Options(normal=8, vectors=8000, lists=64, samples=[2000, 8000], queries=500))
    assert set(found) == {"exact", "graph", "misplaced, %", "expected from 2000"}
    assert all(0 < found[name] <= 64 for name in found if name != "misplaced, %")


@pytest.mark.slow
def test_a_search_with_memory_for_a_quarter_of_the_index_reads_it_once(tmp_path):
    """And finds the same; needs the right to make control groups."""
    from benchmarks.capped_search import Options, measure

    sizes = {"vectors": 40_000, "dimension": 384, "lists": 128, "queries": 2048}
    try:
        result = measure(Options(folder=tmp_path, **sizes))
    except SystemExit as error:
        pytest.skip(str(error))
    assert result["equal"]
    assert result["capped"]["read"] <= 1.1
