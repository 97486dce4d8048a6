"""What a user sees after a mistake: one line that names it, exit code 2, nothing lost."""

import json
import shutil
from dataclasses import replace

import pytest

from retro_mcore.cli import build_db, build_index, preprocess_corpus, query_neighbors
from retro_mcore.cli.preprocess_corpus import PreprocessCorpusOptions
from retro_mcore.data.tokenizers.loading import train_sentencepiece
from tests.unit.data.projects import (
    built_project,
    documents,
    preprocess_options,
    write_corpus,
)


def flags(options: PreprocessCorpusOptions) -> list[str]:
    """Options as a user types them."""
    arguments = []
    for name, value in vars(options).items():
        if value is None or value is False or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return arguments


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl", documents())


@pytest.fixture
def project(tmp_path):
    """A copy of the finished project, and the corpus that it is made of."""
    shutil.copytree(built_project(), tmp_path / "project")
    return tmp_path / "project"


def fails(capsys, command, arguments: list[str]) -> str:
    """Run a command that must stop with exit code 2; its one line of error."""
    assert command.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "corpus.jsonl: holds no text"),
        ('{"text": " "}\n', "corpus.jsonl: holds no text"),
        ('{"text": "a"}\n{"text"\n', "corpus.jsonl:2: invalid JSON"),
        ('{"title": "a"}\n', "corpus.jsonl:1: no key 'text' among ['title']"),
        ('{"text": null}\n', "corpus.jsonl:1: 'text' is NoneType, not a string"),
    ],
)
def test_a_bad_corpus(capsys, tmp_path, text, found):
    path = tmp_path / "corpus.jsonl"
    path.write_text(text)
    arguments = flags(preprocess_options(tmp_path / "project", path))
    assert found in fails(capsys, preprocess_corpus, arguments)
    assert not (tmp_path / "project" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"input": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file or folder"),
        ({"seq_length": 60}, "--seq-length: 60 is not a positive multiple of the chunk length 16"),
        ({"split": "98,1,1"}, "--split: '98,1,1' leaves no valid documents of the 20"),
        ({"split": "1,49,50"}, "--split: '1,49,50' leaves no train documents of the 20"),
        ({"vocab_size": 100}, "--vocab-size: 100 pieces are fewer than"),
        ({"tokenizer_type": "Words"}, "--tokenizer-type: 'Words'"),
        ({"tokenizer_model": "none.model"}, "none.model: no such file"),
        ({"input_weights": [0.5, 0.5]}, "--input-weights: [0.5, 0.5] for 1 inputs"),
        ({"global_batch_size": 0}, "--global-batch-size: 0"),
    ],
)
def test_bad_options(capsys, tmp_path, corpus, changes, found):
    arguments = flags(preprocess_options(tmp_path / "project", corpus, **changes))
    assert found in fails(capsys, preprocess_corpus, arguments)


def test_a_mended_split_goes_on_with_the_tokens(capsys, tmp_path, corpus):
    options = preprocess_options(tmp_path / "project", corpus, split="98,1,1")
    fails(capsys, preprocess_corpus, flags(options))
    tokens = tmp_path / "project" / "data" / "corpus_text_document.bin"
    written = tokens.stat().st_mtime_ns
    assert preprocess_corpus.main(flags(replace(options, split="60,20,20"))) == 0
    assert tokens.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"seq_length": 128}, "--seq-length: {} was built by preprocess_corpus with 64, asked"),
        ({"retro_chunk_length": 32}, "--retro-chunk-length: {} was built by"),
        ({"split": "90,5,5"}, "--split: {} was built by preprocess_corpus with '60,20,20'"),
        ({"seed": 7}, "--seed: {} was built by preprocess_corpus with 1234, asked for 7"),
        ({"vocab_size": 400}, "--vocab-size: {} was built by"),
    ],
)
def test_a_project_of_another_configuration(capsys, project, changes, found):
    corpus = write_corpus(project.parent / "corpus.jsonl", documents())
    before = sorted(path for path in project.rglob("*"))
    line = fails(capsys, preprocess_corpus, flags(preprocess_options(project, corpus, **changes)))
    assert found.format(project) in line
    assert "another --project-dir" in line
    assert sorted(path for path in project.rglob("*")) == before
    assert preprocess_corpus.main(flags(preprocess_options(project, corpus))) == 0
    assert "reused" in capsys.readouterr().out


def test_a_project_of_another_corpus_or_tokenizer(capsys, project):
    corpus = write_corpus(project.parent / "corpus.jsonl", documents()[1:])
    line = fails(capsys, preprocess_corpus, flags(preprocess_options(project, corpus)))
    assert "--input corpus.jsonl: is not what preprocess_corpus" in line
    corpus = write_corpus(project.parent / "corpus.jsonl", documents())
    model = project.parent / "other.model"
    train_sentencepiece(documents(), 400, model)
    options = preprocess_options(project, corpus, tokenizer_model=str(model))
    assert "--tokenizer" in fails(capsys, preprocess_corpus, flags(options))
    shutil.copy(model, project / "tokenizer" / "sentencepiece.model")
    for command in (build_db, build_index, query_neighbors):
        same = ["--embedder", "static"] if command is build_index else []
        line = fails(capsys, command, ["--project-dir", str(project), *same])
        assert "sentencepiece.model: not the tokenizer that the project was built with" in line


def test_a_stage_before_its_time_names_the_command(capsys, tmp_path, project):
    where = ["--project-dir", str(tmp_path / "empty")]
    for command in (build_db, build_index, query_neighbors):
        assert "Run preprocess_corpus" in fails(capsys, command, where)
    where = ["--project-dir", str(project)]
    (project / "retro_mcore.json").write_text("{}")
    assert "Run build_index" in fails(capsys, query_neighbors, where)
    shutil.rmtree(project / "db")
    for command in (build_index, query_neighbors):
        assert "Run build_db" in fails(capsys, command, where)


def test_other_options_of_later_stages(capsys, project):
    where = ["--project-dir", str(project)]
    line = fails(capsys, build_db, [*where, "--retro-doc-block-size", "5"])
    assert "--retro-doc-block-size" in line
    assert "with 6, asked for 5" in line
    line = fails(capsys, build_index, [*where, "--embedder", "static", "--nprobe", "3"])
    assert "--nprobe" in line
    line = fails(capsys, query_neighbors, [*where, "--num-neighbors-save", "6"])
    assert "--num-neighbors-save" in line
    assert "with 5, asked for 6" in line


def test_finished_stages_say_that_they_are_reused(capsys, project):
    where = ["--project-dir", str(project)]
    config = json.loads((project / "config.json").read_text())
    assert build_db.main([*where, "--retro-doc-block-size", "6"]) == 0
    assert build_index.main([*where, "--embedder", "static"]) == 0
    assert query_neighbors.main([*where, "--num-neighbors-save", "5"]) == 0
    output = capsys.readouterr().out
    assert output.count("(reused)") >= 6
    assert json.loads((project / "config.json").read_text()) == config
