"""What preprocess_corpus compares with its last run, counts, and refuses before it begins."""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from retro_mcore.cli.preprocess_corpus import PreprocessCorpusOptions, preprocess_corpus
from retro_mcore.data.corpus import sources
from retro_mcore.data.tokenizers.loading import GPTSentencePieceTokenizer
from retro_mcore.data.tokens.document_ids import ids_path, pack_ids, write_ids
from retro_mcore.data.tokens.token_file import TokenFile, bin_path, idx_path
from retro_mcore.errors import CorpusError, ProjectError, RetroError
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.project.records import stage_report
from tests.unit.data.projects import documents, preprocess_options, write_corpus

TEXTS = documents(40)


@cache
def tokenized() -> ProjectPaths:
    """A project after this stage; do not change it."""
    folder = Path(tempfile.mkdtemp(prefix="retro_tokens_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    corpus = write_corpus(folder / "corpus.jsonl", documents())
    preprocess_corpus(preprocess_options(folder / "project", corpus))
    return ProjectPaths(folder / "project")


def options_for(folder: Path, inputs: list[Path], **changes: object) -> PreprocessCorpusOptions:
    """With a tokenizer that is there, which is faster than to train one."""
    model = str(tokenized().tokenizer / "sentencepiece.model")
    changes = {"tokenizer_model": model, "input": [str(path) for path in inputs], **changes}
    return preprocess_options(folder / "project", Path(), **changes)


@pytest.fixture
def inputs(tmp_path):
    """One of every kind, with names that meet."""
    folders = [tmp_path / name for name in ("en", "de", "folder/sub", "store")]
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        write_corpus(folder / "part.jsonl", TEXTS[10 * i : 10 * i + 10])
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "store")
    data = tokenized().data / "corpus_text_document"
    for path in (bin_path, idx_path, ids_path):
        shutil.copyfile(path(data), path(tmp_path / "tokens"))
    return [
        tmp_path / "en" / "part.jsonl",
        tmp_path / "de" / "part.jsonl",
        tmp_path / "folder",
        tmp_path / "tokens",
    ]


def change_text(path: Path) -> None:
    """By one letter, so that the size stays."""
    path.write_bytes(path.read_bytes().replace(b"e", b"x", 1))


def change_ids(prefix: Path) -> None:
    ids_path(prefix).unlink()
    ids, lengths = pack_ids([f"other-{i}" for i in range(20)])
    write_ids(ids_path(prefix), lengths, iter([ids]))


def change_token(prefix: Path) -> None:
    data = bytearray(bin_path(prefix).read_bytes())
    data[0] ^= 1
    bin_path(prefix).unlink()  # the project's own is a hard link of it
    bin_path(prefix).write_bytes(data)


def swap(path: Path) -> None:
    other = path.parent.parent / "en" / path.name
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


@pytest.mark.parametrize(
    ("name", "change", "at_fault"),
    [
        ("en/part.jsonl", change_text, "--input part.jsonl"),
        ("de/part.jsonl", change_text, r"--input part.jsonl \(2\)"),
        ("de/part.jsonl", swap, "--input part.jsonl"),
        ("folder/sub/part.jsonl", change_text, "--input folder"),
        ("store/part.jsonl", change_text, "--input folder"),
        ("folder/sub/part.jsonl", lambda path: path.rename(path.with_name("a.jsonl")), "folder"),
        ("folder/sub/part.jsonl", lambda path: shutil.copy(path, f"{path}.txt"), "folder"),
        ("tokens", change_token, "--input tokens"),
        ("tokens", change_ids, "--input tokens"),
    ],
)
def test_a_changed_input_is_named(tmp_path, inputs, name, change, at_fault):
    """en/part.jsonl and de/part.jsonl: another de/part.jsonl gave the old tokens, "reused"."""
    options = options_for(tmp_path, inputs)
    preprocess_corpus(options)
    built = {path: path.read_bytes() for path in (tmp_path / "project").rglob("*.*")}
    assert preprocess_corpus(options).reused
    change(tmp_path / name)
    with pytest.raises(ProjectError, match=f"{at_fault}: is not what preprocess_corpus"):
        preprocess_corpus(options)
    assert {path: path.read_bytes() for path in built} == built


def test_equal_names_in_another_order(tmp_path, inputs):
    options = options_for(tmp_path, inputs[:2])
    preprocess_corpus(options)
    with pytest.raises(ProjectError, match=r"--input part\.jsonl: is not what"):
        preprocess_corpus(replace(options, input=options.input[::-1]))


def test_tokens_that_were_taken_before_their_ids_were_compared(tmp_path, inputs, monkeypatch):
    options = options_for(tmp_path, inputs[3:])
    digest = sources.digest_of_source
    with monkeypatch.context() as before:
        before.setattr(sources, "digest_of_source", lambda source, *_, **__: digest(source, True))
        preprocess_corpus(options)
    assert preprocess_corpus(options).reused
    change_token(inputs[3])
    with pytest.raises(ProjectError, match="--input tokens"):
        preprocess_corpus(options)


def test_losses_are_shown_and_recorded(tmp_path, inputs, capsys, monkeypatch):
    """Empty documents, halves of characters, marks and files that nobody missed."""
    folder = inputs[2]
    (folder / "odd.jsonl").write_text('{"text": "a\\ud83d", "id": "same"}\n{"text": ""}\n' * 2)
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbftext")
    (folder / "table.csv").write_text("a,b")
    (folder / "gone.txt").symlink_to("nowhere")
    monkeypatch.setattr(
        GPTSentencePieceTokenizer,
        "count_losses",
        lambda self, texts, ids: {"removed_newlines": len(texts)},
    )
    options = options_for(tmp_path, [folder, inputs[0]])
    expected = {
        "files": 5,
        "documents": 33,
        "empty_documents": 2,
        "replaced_characters": 2,
        "byte_order_marks_removed": 1,
        "repeated_ids": 11,
        "files_left_out": 1,
        "broken_links": 1,
        "removed_newlines": 33,
    }
    for _ in range(2):  # the second run finds all there
        result = preprocess_corpus(options)
        report = stage_report(ProjectPaths(tmp_path / "project"), "preprocess_corpus")
        assert report == result.report
        assert {name: report.get(name) for name in expected} == expected
        assert report["tokens"] == result.num_tokens
        shown = capsys.readouterr().out
        for row in ("empty documents", "files left out", "table.csv", "gone.txt", "newlines"):
            assert row in shown
    assert "documents_without_id" not in report
    each = report["datasets"]
    assert each["folder_text_document"]["such_as"]["files_left_out"] == ["table.csv"]
    assert "empty_documents" not in each["part_text_document"]


@pytest.mark.parametrize(("words", "warns"), [(3, True), (400, False)])
def test_much_padding_is_told(tmp_path, capsys, words, warns):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents(9, words))
    preprocess_corpus(preprocess_options(tmp_path / "project", corpus, samples="aligned"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "% of the tokens)" in shown
    assert ("documents are short for chunks of" in shown) == warns


def test_of_a_large_corpus_a_share_is_compared_with_its_tokens(tmp_path, capsys, monkeypatch):
    """Turning all tokens back into text would cost a third of the time."""
    monkeypatch.setattr("retro_mcore.data.tokens.tokenizing._ALL_COMPARED", 10)
    monkeypatch.setattr("retro_mcore.data.tokens.tokenizing._COMPARED_EVERY", 8)
    monkeypatch.setattr("retro_mcore.data.tokens.tokenizing._BATCH", 7)
    monkeypatch.setattr(
        GPTSentencePieceTokenizer, "count_losses", lambda self, texts, ids: {"seen": len(texts)}
    )
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(f'{{"text": "document {number}"}}\n' for number in range(40)))
    report = preprocess_corpus(options_for(tmp_path, [path])).report
    assert (report["seen"], report["texts_not_compared_with_tokens"]) == (13, 27)  # 10; 16, 24, 32
    assert "texts not compared with tokens" in capsys.readouterr().out


def test_documents_without_ids_are_no_loss(tmp_path, capsys):
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS[:10]))
    result = preprocess_corpus(options_for(tmp_path, [path]))
    assert result.report["documents_without_id"] == 10
    assert "without id" not in capsys.readouterr().out


def test_a_split_that_its_samples_repeat(tmp_path, inputs, capsys):
    """Two held-out documents and S 256: each stood 14 times in one sample, without a word."""
    path = write_corpus(tmp_path / "short.jsonl", [text[:40] for text in TEXTS[:20]])
    result = preprocess_corpus(
        options_for(tmp_path, [path], split="90,10,0", seq_length=256, eval_iters=2)
    )
    splits = result.report["splits"]
    assert splits["test"]["samples"] == 0
    for name, samples in (("train", 8), ("valid", 4)):
        of = splits[name]
        assert of["samples"] == samples
        assert of["passes"] == pytest.approx(samples * 256 / of["tokens"], abs=1e-6)
        assert of["repeats_in_a_sample"] == pytest.approx(256 / of["tokens"], abs=1e-6)
    assert splits["valid"]["documents"] == 2
    assert splits["valid"]["repeats_in_a_sample"] > 4
    shown = capsys.readouterr().out
    assert "warning, valid" in shown
    assert "test 0 (no documents)" in shown


def test_the_smallest_dataset_of_a_blend_decides(tmp_path, inputs):
    """However large the others are."""
    small = write_corpus(tmp_path / "small.jsonl", [text[:20] for text in TEXTS[:10]])
    result = preprocess_corpus(
        options_for(tmp_path, [inputs[0], small], input_weights=[1.0, 3.0], eval_iters=4)
    )
    valid = result.report["splits"]["valid"]
    assert valid["passes_per_evaluation"] > valid["passes"] > 0


def test_a_dataset_of_hardly_any_weight(tmp_path, inputs, capsys):
    """Its documents are tokenized and never read."""
    result = preprocess_corpus(options_for(tmp_path, inputs[:2], input_weights=[1.0, 1e-9]))
    of = result.report["splits"]["train"]["passes_by_dataset"]
    assert of["part_text_document"] > 0 == of["part_text_document_2"]
    assert "no sample is cut from part_text_document_2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        *(({"input_weights": [1.0, weight]}, "--input-weights") for weight in (math.nan, -1, 0)),
        *(({"input_weights": [weight] * 2}, "--input-weights") for weight in (math.inf, 1e308)),
        ({"input_weights": [1.0]}, "--input-weights"),
        *(
            ({"train_samples": None, "train_epochs": epochs}, "--train-epochs")
            for epochs in (math.nan, math.inf, 0, -1)
        ),
        ({"train_samples": 3, "train_epochs": 1.0}, "--train-samples and --train-epochs: both"),
        ({"vocab_size": 400}, "--vocab-size: given with a tokenizer"),
        ({"tokenizer_training_documents": 9}, "--tokenizer-training-documents: given with"),
        (
            {"tokenizer_type": "GPTSentencePieceTokenizer", "vocab_file": "a", "merge_file": "b"},
            "--vocab-file and --merge-file: given with --tokenizer-type GPTSentence",
        ),
        ({"tokenizer_type": "GPT2BPETokenizer"}, "--tokenizer-model: given with --tokenizer-type"),
        *(({"split": f"{part},5,5"}, "--split") for part in ("nan", "inf", "-90", "", "89", "x")),
        ({"split": "90,nan,5"}, "--split"),
        ({"split": "100,-5,5"}, "--split"),
        ({"split": "100"}, "--split"),
        ({"seed": -1}, "--seed"),
        ({"seed": 1 << 32}, "--seed"),
        ({"input": []}, "--input"),
    ],
)
def test_numbers_that_cannot_work_are_refused_first(tmp_path, inputs, changes, flag):
    with pytest.raises(RetroError, match=flag):
        preprocess_corpus(options_for(tmp_path, inputs[:2], **changes))
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"train_epochs": 1e300, "train_samples": None}, "--train-epochs"),
        ({"train_samples": 1 << 63}, "--train-samples"),
        ({"eval_iters": 1 << 62}, "--train-samples and --eval-iters"),
    ],
)
def test_more_samples_than_can_be_numbered(tmp_path, inputs, changes, flag):
    with pytest.raises(RetroError, match=f"{flag}: more"):
        preprocess_corpus(options_for(tmp_path, inputs[:1], **changes))
    assert not (tmp_path / "project" / "config.json").exists()


def test_all_problems_are_told_at_once(tmp_path, inputs):
    changes = {"split": "nan,5,5", "input_weights": [math.nan], "train_epochs": -1.0}
    with pytest.raises(RetroError) as told:
        preprocess_corpus(options_for(tmp_path, inputs[:2], **changes))
    assert all(flag in str(told.value) for flag in ("--split", "--input-w", "--train-e"))


def test_a_file_name_that_is_no_text(tmp_path):
    """Linux takes any bytes; config.json, which the later stages read, holds text."""
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    write_corpus(source, documents())
    options = options_for(tmp_path, [source])
    preprocess_corpus(options)
    (prefix,) = ProjectConfig.load(options.project_dir).blend[1]
    assert prefix == "caf\ufffd_text_document"
    assert TokenFile(ProjectPaths(options.project_dir).data / prefix).num_documents == len(
        documents()
    )


def test_bad_input_loses_nothing(tmp_path, inputs):
    """An input that is damaged by now leaves the project as it was."""
    options = options_for(tmp_path, inputs[:2])
    preprocess_corpus(options)
    before = {p: p.read_bytes() for p in (tmp_path / "project").rglob("*") if p.is_file()}
    inputs[0].write_bytes(b"\0" * 100)
    with pytest.raises((CorpusError, ProjectError)):
        preprocess_corpus(options)
    after = {p: p.read_bytes() for p in (tmp_path / "project").rglob("*") if p.is_file()}
    assert after == before
