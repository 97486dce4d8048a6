"""Near-duplicates in preprocess_corpus: counted or dropped, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from retro_mcore.cli.preprocess_corpus import PreprocessCorpusOptions, preprocess_corpus
from retro_mcore.data.near_duplicates.dropping import Copy
from retro_mcore.data.near_duplicates.files import groups_path
from retro_mcore.data.near_duplicates.search import NearDuplicateSearch
from retro_mcore.data.tokens.document_ids import DocumentIds
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.errors import ConfigurationError, MissingDependencyError, ProjectError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import stage_report
from tests.unit.data.aligned import save_tokenizer
from tests.unit.data.near_copies import planted, text
from tests.unit.data.projects import preprocess_options, write_corpus

PREFIX = "corpus_text_document"


def options_of(folder: Path, mode: str, **changes: object) -> PreprocessCorpusOptions:
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, planted())
    tokenizer = save_tokenizer(folder, True)
    given = {"tokenizer_model": str(tokenizer), "samples": "aligned", "near_duplicates": mode}
    return preprocess_options(folder / "project", corpus, **{**given, **changes})


def kept(folder: Path) -> list[int]:
    """Numbers of the documents in a project."""
    ids = DocumentIds(folder / "project" / "data" / PREFIX)
    return [int(ids[number].removeprefix("topic-")) for number in range(len(ids))]


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "project").rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


def test_near_duplicates_are_counted(tmp_path, capsys):
    report = preprocess_corpus(options_of(tmp_path, "count")).report
    assert len(kept(tmp_path)) == 20
    assert (report["near_duplicates"], report["held_out_near_duplicates_of_training"]) == (9, 2)
    found = {
        name: {key: value for key, value in split.items() if key.startswith("near")}
        for name, split in report["splits"].items()
    }
    held_out = {"near_duplicates_of_training": 1}
    assert found == {"train": {"near_duplicates": 3}, "valid": held_out, "test": held_out}
    assert report == stage_report(ProjectPaths(tmp_path / "project"), "preprocess_corpus")
    assert (
        "count; Jaccard similarity 0.8 or more of sequences of 5 words" in capsys.readouterr().out
    )
    tokens = TokenFile(tmp_path / "project" / "data" / PREFIX).tokens.copy()
    shutil.rmtree(tmp_path / "project")
    assert "near_duplicates" not in preprocess_corpus(options_of(tmp_path, "keep")).report
    assert (TokenFile(tmp_path / "project" / "data" / PREFIX).tokens == tokens).all()


@pytest.mark.parametrize(
    ("mode", "samples", "dropped"),
    [
        ("drop", "aligned", {3, 5, 7, 8}),
        ("drop", "packed", {3, 5, 7, 8}),
        ("decontaminate", "aligned", {7, 8}),
    ],
)
def test_near_duplicates_are_dropped(tmp_path, mode, samples, dropped):
    report = preprocess_corpus(options_of(tmp_path, mode, samples=samples)).report
    assert kept(tmp_path) == [number for number in range(20) if number not in dropped]
    assert report["near_duplicates_of_held_out_dropped"] == 2
    assert report.get("near_duplicates_dropped", 0) == len(dropped) - 2
    assert report["splits"]["train"]["near_duplicates_of_held_out_dropped"] == 2
    assert report["datasets"][PREFIX]["documents"] == 20 - len(dropped)
    named = report["datasets"][PREFIX]["such_as"]["near_duplicates_of_held_out_dropped"]
    assert named == ["topic-7", "topic-8"]
    assert report["held_out_near_duplicates_of_training"] == 0
    assert report["splits"]["train"]["near_duplicates"] == (0 if mode == "drop" else 3)
    data = tmp_path / "project" / "data"
    assert not (data / "whole").exists()
    # The tokens are those of a corpus that never held the dropped documents.
    texts = [each for number, each in enumerate(planted()) if number not in dropped]
    clean = tmp_path / "clean"
    clean.mkdir()
    write_corpus(clean / "corpus.jsonl", texts)
    fresh = preprocess_corpus(options_of(clean, "keep", samples=samples)).report
    pair = [TokenFile(folder / "project" / "data" / PREFIX) for folder in (tmp_path, clean)]
    assert (pair[0].tokens == pair[1].tokens).all()
    assert (pair[0].lengths == pair[1].lengths).all()
    assert report.get("padding_tokens") == fresh.get("padding_tokens")


def test_an_interrupted_run_resumes_and_a_finished_one_is_reused(tmp_path, monkeypatch):
    other = tmp_path / "other.jsonl"
    write_corpus(other, [planted()[2], *(" ".join(text(100 + n)) for n in range(10))])
    options = options_of(tmp_path, "drop", input=[str(tmp_path / "corpus.jsonl"), str(other)])
    preprocess_corpus(options)
    undisturbed = contents(tmp_path)
    report = preprocess_corpus(options)
    assert report.reused
    assert contents(tmp_path) == undisturbed

    shutil.rmtree(tmp_path / "project")
    write = Copy.write
    with monkeypatch.context() as patch:
        patch.setattr(Copy, "write", _interrupt_second(write))
        with pytest.raises(KeyboardInterrupt):
            preprocess_corpus(options)
    assert (tmp_path / "project" / "data" / "whole").is_dir()
    # What was found is used again.
    monkeypatch.setattr(NearDuplicateSearch, "_write_keys", _fail)
    preprocess_corpus(options)
    assert contents(tmp_path) == undisturbed
    monkeypatch.undo()
    groups_path(tmp_path / "project" / "data").unlink()  # as a kill before it is written
    preprocess_corpus(options)
    assert contents(tmp_path) == undisturbed


def _interrupt_second(write):
    left = iter(range(1))

    def interrupted(*given, **named):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*given, **named)

    return interrupted


def _fail(*given: object) -> None:
    raise AssertionError("computed again")


def test_options_that_cannot_work_are_refused(tmp_path, monkeypatch):
    for changes, flag in (
        ({"near_duplicates": "remove"}, "--near-duplicates"),
        ({"near_duplicate_threshold": 0.05}, "--near-duplicate-threshold"),
        ({"near_duplicate_threshold": 1.5}, "--near-duplicate-threshold"),
        ({"near_duplicate_words": 0}, "--near-duplicate-words"),
        ({"near_duplicates": "keep", "near_duplicate_words": 5}, "--near-duplicate-words"),
    ):
        with pytest.raises(ConfigurationError, match=flag):
            preprocess_corpus(options_of(tmp_path, **{"mode": "count", **changes}))
    preprocess_corpus(options_of(tmp_path, "count"))
    settings = ProjectSettings.load(tmp_path / "project")
    assert (settings.near_duplicates, settings.near_duplicate_threshold) == ("count", 0.8)
    for mode, changes in (("drop", {}), ("keep", {}), ("count", {"near_duplicate_words": 4})):
        with pytest.raises(ProjectError, match="--near-duplicate"):
            preprocess_corpus(options_of(tmp_path, mode, **changes))
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(MissingDependencyError, match=r"retro-mcore\[dedup\]"):
        preprocess_corpus(options_of(tmp_path, "count"))


def test_a_corpus_of_leaks_alone_is_refused(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", [planted()[0]] * 10)
    with pytest.raises(ConfigurationError, match="without near-duplicates"):
        preprocess_corpus(options_of(tmp_path, "drop"))
