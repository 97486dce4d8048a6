"""The command `evaluate_perplexity` on a small trained model and its project."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from retro_mcore.cli.evaluate_perplexity import (
    EvaluatePerplexityOptions,
    evaluate_perplexity,
    main,
)
from retro_mcore.errors import ConfigurationError
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project


@pytest.fixture
def options(tmp_path):
    def make(**changes):
        values = {
            "project_dir": str(built_project()),
            "load": small_checkpoint(),
            "output": str(tmp_path / "perplexity.json"),
            "device": "cpu",
        }
        return EvaluatePerplexityOptions(**{**values, **changes})

    return make


KINDS = ["real", "shuffled", "random", "none"]


@pytest.fixture(scope="module")
def documents_result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    result = evaluate_perplexity(
        EvaluatePerplexityOptions(
            project_dir=str(built_project()),
            load=small_checkpoint(),
            output=str(folder / "perplexity.json"),
            device="cpu",
            split="both",
            protocol="both",
            retro_eval_neighbors=KINDS,
            leakage=True,
            bootstrap=50,
            attribute=True,
        )
    )
    # Other tests search the documents with other options.
    shutil.copytree(built_project() / "query" / "valid_documents", folder / "valid_documents")
    return folder, result


def test_both_protocols_measure_every_kind_of_neighbors_on_the_same_text(documents_result):
    folder, result = documents_result
    for rows, name in (
        (result.perplexities, "perplexity"),
        (result.bits_per_byte, "bits_per_byte"),
    ):
        assert [(r.split, r.neighbors) for r in rows] == [
            (split, kind) for split in ("valid", "test") for kind in KINDS
        ]
        for split in ("valid", "test"):
            mine = [row for row in rows if row.split == split]
            assert len({row.num_tokens for row in mine}) == 1
            assert len({row.loss for row in mine}) == 4
        assert len(json.loads((folder / f"{name}.json").read_text())) == 8


def test_bits_per_byte_is_the_loss_over_the_documents_text(documents_result):
    from retro_mcore.data.tokenizers.loading import load_project_tokenizer
    from retro_mcore.evaluation.documents import HeldOutDocuments
    from retro_mcore.project import ProjectConfig, ProjectPaths

    project = built_project()
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), ProjectPaths(project))
    documents = HeldOutDocuments.open(project, "valid", tokenizer.eod)
    texts = [documents.tokens(i).tolist() for i in range(len(documents))]
    num_bytes = sum(
        len(tokenizer.detokenize(text).encode()) - len(tokenizer.detokenize(text[:1]).encode())
        for text in texts
    )
    row = documents_result[1].bits_per_byte[0]
    assert row.num_bytes == num_bytes
    assert row.num_documents == len(texts) == 4
    assert row.num_tokens == sum(len(text) - 1 for text in texts)
    expected = row.loss * row.num_tokens / math.log(2) / num_bytes
    assert row.bits_per_byte == pytest.approx(expected, rel=1e-12)


def test_the_credit_of_all_neighbors_is_what_real_ones_gain(documents_result):
    folder, result = documents_result
    ranks = [(gain.split, gain.protocol, gain.rank) for gain in result.gains]
    assert ranks == [
        (split, protocol, rank)
        for protocol in ("samples", "documents")
        for split in ("valid", "test")
        for rank in (1, 2, None)
    ]
    for gain in result.gains:
        measured = result.perplexities if gain.protocol == "samples" else result.bits_per_byte
        rows = {row.neighbors: row for row in measured if row.split == gain.split}
        real, none = rows["real"], rows["none"]
        assert 0 < gain.num_tokens < real.num_tokens
        assert gain.helped + gain.hurt <= 1
        if gain.rank is None:  # every chunk has both neighbors
            expected = (none.loss - real.loss) * real.num_tokens
            assert gain.gain * gain.num_tokens == pytest.approx(expected, rel=1e-3, abs=1e-3)
    written = json.loads((folder / "attribution.json").read_text())
    assert [row["gain"] for row in written] == [gain.gain for gain in result.gains]


def test_the_leakage_curve_ends_at_the_whole_text(documents_result):
    folder, result = documents_result
    for split in ("valid", "test"):
        points = result.leakage[split]
        bits = {r.neighbors: r.bits_per_byte for r in result.bits_per_byte if r.split == split}
        assert [point.alpha for point in points] == [i / 8 for i in range(1, 9)]
        assert points[-1].bits_per_byte == pytest.approx(bits)
        chunks = [point.num_chunks for point in points]
        assert chunks == sorted(chunks)
        # The later half of the corpus repeats the earlier: most chunks are in the database.
        assert chunks[-1] > 2 * chunks[3]
    written = json.loads((folder / "leakage.json").read_text())
    assert written["valid"][-1]["num_chunks"] == result.leakage["valid"][-1].num_chunks
    assert (folder / "leakage.png").stat().st_size > 10_000


def test_intervals_surround_the_numbers_and_are_written(documents_result):
    folder, result = documents_result
    for row in result.bits_per_byte:
        low, high = row.interval
        assert low < row.bits_per_byte < high
        assert set(row.differences) == set(KINDS) - {row.neighbors}
    written = json.loads((folder / "bits_per_byte.json").read_text())
    assert written[0]["interval"] == list(result.bits_per_byte[0].interval)
    assert written[0]["differences"]["none"].keys() == {"mean", "low", "high"}


def test_no_neighbor_comes_from_the_chunks_own_document(documents_result):
    from retro_mcore.evaluation.documents import HeldOutDocuments
    from retro_mcore.retrieval.database import ChunkDatabase
    from retro_mcore.retrieval.neighbor_tables import SavedNeighbors

    documents = HeldOutDocuments.open(built_project(), "valid", 1)
    saved = SavedNeighbors(documents_result[0] / "valid_documents")
    assert (len(saved), saved.num_saved) == (documents.num_chunks, 10)
    found = ChunkDatabase.open(built_project()).documents(saved.rows(0, len(saved)))[..., 1]
    assert not set(found.ravel().tolist()) & set(documents.number.tolist())


def test_fewer_documents_are_searched_and_measured(options):
    result = evaluate_perplexity(
        options(protocol="documents", eval_documents=2, retro_eval_neighbors=["real"])
    )
    assert result.perplexities == []
    assert result.bits_per_byte[0].num_documents == 2
    assert not result.output.exists()
    written = json.loads(result.output.with_name("bits_per_byte.json").read_text())
    assert "interval" not in written[0]  # not requested


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leakage": True}, "--leakage: given with --protocol samples"),
        ({"overlapping_eval": 16}, "--overlapping-eval: given with --protocol samples"),
        ({"bootstrap": 10}, "--bootstrap: given with --protocol samples"),
        ({"protocol": "documents", "bootstrap": -1}, "--bootstrap: -1"),
        ({"leakage_alphas": [0.5]}, "--leakage-alphas: given without --leakage"),
        ({"leakage_neighbors": 5}, "--leakage-neighbors: given without --leakage"),
        ({"leakage_alphas": [1.5]}, "--leakage-alphas: 1.5"),
        ({"protocol": "documents", "eval_iters": 1}, "--eval-iters: given with"),
        ({"protocol": "documents", "overlapping_eval": 10}, "--overlapping-eval: windows of 64"),
        ({"micro_batch_size": 0}, "--micro-batch-size: 0"),
    ],
)
def test_impossible_options_are_refused_by_name(options, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        evaluate_perplexity(options(**changes))


@pytest.mark.parametrize("protocol", ["samples", "documents"])
@pytest.mark.parametrize("split", ["test", "both"])
def test_a_split_without_documents_is_refused_by_name(options, tmp_path, protocol, split):
    config = json.loads((built_project() / "config.json").read_text())
    config["retro_gpt_split"] = "90,10,0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=f"--split {split}: .* gives test no documents"):
        evaluate_perplexity(options(project_dir=str(tmp_path), split=split, protocol=protocol))


def test_how_often_text_is_read_is_counted_and_said(documents_result, capsys):
    """Who tries a handful of documents reads each of them many times."""
    from dataclasses import replace

    from retro_mcore.cli.tables.perplexity import print_tables

    folder, result = documents_result
    written = json.loads((folder / "perplexity.json").read_text())
    for row in written:
        assert 1 <= row["num_documents"] <= 4
        assert row["num_distinct_tokens"] <= row["num_tokens"]
        assert row["repeats"] == row["num_tokens"] / row["num_distinct_tokens"]
    measured = result.perplexities[0]
    print_tables([replace(measured, num_tokens=2800, num_distinct_tokens=200)] * 2, [], {})
    output = capsys.readouterr().out
    assert output.count("each token read 14.0 times on average") == 1
    print_tables([replace(measured, num_tokens=200, num_distinct_tokens=200)], [], {})
    assert "warning" not in capsys.readouterr().out


def test_what_is_left_out_of_documents_is_counted(documents_result):
    for row in documents_result[1].bits_per_byte:
        assert row.num_tokens_not_predicted == row.num_documents
        assert row.num_documents_too_short == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, 800.0])
def test_a_loss_that_is_no_number_is_null_in_the_results(tmp_path, loss):
    """A diverged model ends neither in a traceback nor in JSON that nobody can read."""
    from retro_mcore.evaluation.results import perplexity_of, write_results

    value = {"loss": loss, "rows": [(perplexity_of(loss), 1)]}
    write_results(tmp_path / "results.json", value)
    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert read == {"loss": 800.0 if loss == 800.0 else None, "rows": [[None, 1]]}


@pytest.mark.parametrize("place", ["file/results.json", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(options, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match="--output"):
        evaluate_perplexity(options(output=str(tmp_path / place)))
    assert (tmp_path / "file").read_text() == "mine"


def test_the_tables_show_what_was_measured(options, tmp_path, capsys):
    flags = ["--project-dir", str(built_project()), "--load", small_checkpoint()]
    flags += ["--protocol", "documents", "--leakage", "--leakage-alphas", "0.5", "1"]
    flags += ["--device", "cpu", "--output", str(tmp_path / "p.json")]
    flags += ["--retro-eval-neighbors", "real", "none"]
    assert main(flags) == 0
    output = capsys.readouterr().out
    assert "documents: windows of 64 tokens, 32 apart" in output
    assert "100.0%" in output
    measured = json.loads((tmp_path / "p.bits_per_byte.json").read_text())
    for row in measured:
        assert f"{row['bits_per_byte']:.4f}" in output


BESIDE = ("bits_per_byte.json", "leakage.json", "leakage.png")


def test_two_outputs_in_one_folder_share_no_file(options, tmp_path):
    """Who compares two models in one folder would read one's bits per byte as the other's."""
    from retro_mcore.evaluation.perplexity_run import file_beside

    given = ("perplexity.json", "a.json", "b.json", "a.b.json", "c", "a", "a.b", "perplexity")
    outputs = [tmp_path / name for name in given]
    names = [file_beside(output, name).name for output in outputs for name in BESIDE]
    assert names[:3] == list(BESIDE)
    assert len({*names, *(output.name for output in outputs)}) == len(names) + len(outputs)
    for name in ("perplexity.json", *BESIDE):
        (tmp_path / name).write_text("another model's")
    given = {"protocol": "both", "eval_documents": 2, "eval_iters": 1, "leakage": True}
    evaluate_perplexity(options(output=str(outputs[1]), retro_eval_neighbors=["real"], **given))
    for name in ("perplexity.json", *BESIDE):
        assert (tmp_path / name).read_text() == "another model's"
        assert name == "perplexity.json" or file_beside(outputs[1], name).stat().st_size
    (tmp_path / "b.leakage.png").mkdir()
    with pytest.raises(ConfigurationError, match=r"--output .*b\.leakage\.png: a directory"):
        evaluate_perplexity(options(output=str(outputs[2]), **given))
    for name in (*BESIDE, "a.leakage.json", "a_leakage.json"):
        with pytest.raises(ConfigurationError, match=r"written beside the measurements"):
            evaluate_perplexity(options(output=str(tmp_path / name)))


def test_more_than_a_split_holds_is_told(options, capsys):
    """Who asks for 1,000 documents to be sure would report a number over three."""
    asked = {"eval_iters": 999, "eval_documents": 999, "protocol": "both"}
    result = evaluate_perplexity(options(**asked, retro_eval_neighbors=["none"]))
    said = capsys.readouterr().err
    assert "--eval-iters 999 asks for" in said
    assert f"--eval-documents 999 of each corpus, but valid has {_documents(result)}" in said
    evaluate_perplexity(options(eval_iters=1, retro_eval_neighbors=["none"]))
    assert "asks for" not in capsys.readouterr().err


def _documents(result):
    (row,) = result.bits_per_byte
    return row.num_documents + row.num_documents_too_short


@pytest.mark.parametrize(("recorded", "searched"), [(None, "all"), (3, 5), (7, 7), (10**6, "all")])
def test_documents_are_searched_as_broadly_as_the_project_s_samples(
    monkeypatch, recorded, searched
):
    """Who searched 20,000 candidates for a reranker would get neighbors of another search."""
    from dataclasses import replace

    from retro_mcore.data.tokenizers.loading import load_project_tokenizer
    from retro_mcore.evaluation import documents
    from retro_mcore.project import ProjectConfig, ProjectPaths, ProjectSettings
    from retro_mcore.retrieval.database import ChunkDatabase

    project = built_project()
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), ProjectPaths(project))
    settings = replace(ProjectSettings.load(project), num_neighbors_query=recorded)
    monkeypatch.setattr(ProjectSettings, "load", lambda folder: settings)

    def search(database, num_query, num_save, rerank):
        raise InterruptedError(num_query)

    monkeypatch.setattr(documents, "NeighborSearch", search)
    held_out = documents.HeldOutDocuments.open(project, "valid", tokenizer.eod)
    with pytest.raises(InterruptedError) as caught:
        documents.search_document_neighbors(project, held_out, tokenizer, 5, "cpu")
    expected = len(ChunkDatabase.open(project)) if searched == "all" else searched
    assert caught.value.args == (expected,)


def test_samples_longer_than_those_of_the_training_are_told(options, monkeypatch, capsys):
    """Rotary positions have no end, but a model knows those alone that it was trained on."""
    from dataclasses import replace

    from retro_mcore import session

    load = session.load_model

    def trained_on_half(*args, **options):
        loaded = load(*args, **options)
        shorter = {"seq_length": 32, "position_embedding_type": "rope"}
        return replace(loaded, arguments=replace(loaded.arguments, **shorter))

    evaluate_perplexity(options(eval_iters=1, retro_eval_neighbors=["none"]))
    assert "trained on" not in capsys.readouterr().err
    monkeypatch.setattr(session, "load_model", trained_on_half)
    evaluate_perplexity(options(eval_iters=1, retro_eval_neighbors=["none"]))
    assert "Samples have 64 tokens, but the checkpoint was trained on 32" in capsys.readouterr().err
