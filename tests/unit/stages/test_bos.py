"""BOS: documents begin with it where the tokenizer adds it, and everything downstream agrees."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.preprocess_corpus import PreprocessCorpusOptions, preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.data.tokenizers.loading import build_tokenizer, load_project_tokenizer
from retro_mcore.data.tokens.token_file import TokenFile, open_token_files
from retro_mcore.data.tokens.token_input import check_token_input
from retro_mcore.errors import ProjectError, TokenizerError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.chunk_text import chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from tests.unit.data.projects import documents, preprocess_options, write_corpus
from tests.unit.data.tokenizer_shapes import begins_with, byte_level, save

TEXTS = [*documents(10, 200), "a </s> b", "漢字"]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def llama(tmp_path):
    """Llama 3's shape: its tokenizer.json puts BOS before a text."""
    tokenizer = begins_with(byte_level(["<s>", "<|end|>"], texts=TEXTS), "<s>")
    config = {"eos_token": "<|end|>", "bos_token": "<s>"}
    return save(tmp_path / "llama", tokenizer, tokenizer_config=config)


def preprocess(tmp_path, corpus, name="project", **changes):
    project = tmp_path / name
    preprocess_corpus(preprocess_options(project, corpus, **changes))
    return project


def open_project(project):
    config, paths = ProjectConfig.load(project), ProjectPaths(project)
    return load_project_tokenizer(config, paths), open_token_files(config, paths)


def test_every_document_begins_with_it_as_the_tokenizer_does(tmp_path, corpus, llama, capsys):
    project = preprocess(tmp_path, corpus, tokenizer_model=str(llama))
    shown = capsys.readouterr().out
    tokenizer, (file,) = open_project(project)
    assert f"<s> (token {tokenizer.bos})" in shown
    assert f"<|end|> (token {tokenizer.eod})" in shown
    for number, text in enumerate(TEXTS):
        bos, *ids, eod = file.sequence(number).tolist()
        assert (bos, eod) == (tokenizer.bos, tokenizer.eod)
        assert ids == tokenizer.tokenize(text)
    assert ProjectSettings.load(project).add_bos
    # Everything that decides is in the project.
    shutil.rmtree(llama)
    again = build_tokenizer("HuggingFaceTokenizer", project / "tokenizer")
    assert (again.eod, again.bos, again.adds_bos) == (tokenizer.eod, tokenizer.bos, True)


def test_it_is_no_text_of_the_database(tmp_path, corpus, llama):
    project = preprocess(tmp_path, corpus, tokenizer_model=str(llama))
    build_db(BuildDbOptions(str(project)))
    tokenizer, (file,) = open_project(project)
    database = ChunkDatabase.open(project)
    first = database.chunks[database.chunks[:, 2] == 1]
    assert len(first) == len(np.unique(database.chunks[:, 1]))
    tokens, mask = database.retrieved_tokens(np.arange(len(database)), 2, 16, tokenizer.eod)
    assert tokenizer.bos not in tokens[~mask]
    for document in np.unique(database.chunks[:, 1]):
        mine = np.flatnonzero(database.chunks[:, 1] == document)
        assert "".join(database.texts(mine, tokenizer)) == TEXTS[document]
    # A chunk of samples, which are packed, holds the ends and beginnings of documents.
    chunk = np.concatenate([file.sequence(10), file.sequence(11)])
    assert chunk_texts(tokenizer, [chunk]) == ["a </s> b\n漢字"]
    assert chunk_texts(tokenizer, [chunk], "detokenized") == ["a </s> b<|end|>漢字<|end|>"]
    assert chunk_texts(tokenizer, [chunk[:0]]) == [""]


@pytest.mark.usefixtures("megatron")
def test_prompts_begin_with_one(tmp_path, corpus, llama):
    from retro_mcore.session import GenerationModel

    project = preprocess(tmp_path, corpus, tokenizer_model=str(llama))
    tokenizer, _ = open_project(project)
    for add_bos in (False, True):
        loaded = GenerationModel(None, None, tokenizer, None, add_bos=add_bos)
        (ids,) = loaded.tokenize(["<s>two"])
        assert ids == [tokenizer.bos, *tokenizer.tokenize("<s>two")]
        assert tokenizer.bos not in ids[1:]


def test_it_can_be_left_out_or_asked_for(tmp_path, corpus, llama, capsys):
    project = preprocess(tmp_path, corpus, tokenizer_model=str(llama), add_bos_token=False)
    tokenizer, (file,) = open_project(project)
    assert "no BOS" in capsys.readouterr().out
    assert file.sequence(0)[0] != tokenizer.bos
    assert not tokenizer.adds_bos
    trained = preprocess(tmp_path, corpus, "trained", vocab_size=400)
    assert not open_project(trained)[0].adds_bos
    trained = preprocess(tmp_path, corpus, "with", vocab_size=400, add_bos_token=True)
    tokenizer, (file,) = open_project(trained)
    assert file.sequence(0)[0] == tokenizer.bos == tokenizer.beginning[0]


def test_a_changed_declaration_is_named(tmp_path, corpus, llama, capsys):
    project = preprocess(tmp_path, corpus, tokenizer_model=str(llama))
    preprocess(tmp_path, corpus, tokenizer_model=str(llama))
    assert "reused" in capsys.readouterr().out
    config = {"eos_token": "<s>", "bos_token": "<s>"}
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    before = open_project(project)[0].eod
    with pytest.raises(ProjectError, match="special tokens of the tokenizer's directory"):
        preprocess(tmp_path, corpus, tokenizer_model=str(llama))
    with pytest.raises(ProjectError, match="--eod-token"):
        preprocess(tmp_path, corpus, tokenizer_model=str(llama), eod_token="<s>")
    assert open_project(project)[0].eod == before


def test_projects_of_before_have_none(tmp_path, corpus, llama, capsys):
    """They recorded neither EOD nor BOS, and no digest of what the directory declares."""
    (llama / "tokenizer_config.json").unlink()
    tokenizer = begins_with(byte_level(["<s>"], ["</s>"], texts=TEXTS), "<s>")
    tokenizer.save(str(llama / "tokenizer.json"))
    arguments = {"tokenizer_model": str(llama)}
    with pytest.raises(TokenizerError, match="--eod-token"):
        preprocess(tmp_path, corpus, **arguments)
    made = preprocess(tmp_path, corpus, eod_token="</s>", add_bos_token=False, **arguments)
    settings = json.loads((made / "retro_mcore.json").read_text())
    for key in ("eod_id", "bos_id", "add_bos"):
        del settings[key]
    (made / "retro_mcore.json").write_text(json.dumps(settings))
    loaded, _ = open_project(made)
    assert loaded.token_name(loaded.eod) == "</s>"
    assert not loaded.adds_bos
    record = made / "stages" / "preprocess_corpus.json"
    values = json.loads(record.read_text())
    del values["options"]["--eod-token"], values["options"]["--add-bos-token"]
    record.write_text(json.dumps(values))
    preprocess(tmp_path, corpus, **arguments)
    assert ProjectSettings.load(made).eod_id is None


def test_tokens_that_are_given_stay_as_they_are(tmp_path, corpus, llama):
    """Megatron's own preprocessing knows no BOS; others' may."""
    given = {}
    for add_bos in (True, False):
        made = preprocess(
            tmp_path, corpus, f"{add_bos}", tokenizer_model=str(llama), add_bos_token=add_bos
        )
        given[add_bos] = made / "data" / "corpus_text_document"
        taken = preprocess(tmp_path, given[add_bos], f"t{add_bos}", tokenizer_model=str(llama))
        tokenizer, (file,) = open_project(taken)
        assert tokenizer.adds_bos == add_bos
        assert (file.tokens == TokenFile(given[add_bos]).tokens).all()
        if not add_bos:  # as update_db --append takes them
            with pytest.raises(TokenizerError, match=r"12 of 12 .* those of the project do not"):
                check_token_input(given[True], tokenizer)
    with pytest.raises(TokenizerError, match=r"do not begin with BOS"):
        preprocess(tmp_path, given[False], "x", tokenizer_model=str(llama), add_bos_token=True)
    with pytest.raises(
        TokenizerError, match=r"begin with BOS \(\d+\), but --add-bos-token is False"
    ):
        preprocess(tmp_path, given[True], "z", tokenizer_model=str(llama), add_bos_token=False)
    options = preprocess_options(tmp_path / "y", given[True], tokenizer_model=str(llama))
    options.input.append(str(given[False]))
    with pytest.raises(TokenizerError, match=r"12 of 12 documents do not begin with BOS"):
        preprocess_corpus(options)


@pytest.mark.parametrize("add_bos", [True, False])
def test_another_database_begins_its_documents_alike(tmp_path, corpus, llama, add_bos):
    """Its neighbors would begin otherwise than those that the model was trained with."""
    projects = {}
    for each in (True, False):
        made = preprocess(
            tmp_path, corpus, f"{each}", tokenizer_model=str(llama), add_bos_token=each
        )
        build_db(BuildDbOptions(str(made)))
        build_index(BuildIndexOptions(str(made), embedder="lexical"))
        projects[each] = made
    project, other = projects[add_bos], projects[not add_bos]
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=2))
    found = "no document begins" if add_bos else r"documents begin with BOS \(\d+\)"
    with pytest.raises(ProjectError, match=f"{found}.*--add-bos-token {add_bos}"):
        update_db(UpdateDbOptions(str(project), exchange=str(other)))
    assert ProjectConfig.load(project).retro_database is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--add-bos-token"], True),
        (["--add-bos-token", "false"], False),
        (["--no-add-bos-token"], False),
        (["--add_bos_token", "--seed", "3"], True),
    ],
)
def test_the_switch_has_three_states(tmp_path, flags, expected):
    arguments = ["--project-dir", "p", "--input", "c.jsonl", *flags]
    assert parse_options(PreprocessCorpusOptions, arguments).add_bos_token is expected
    if expected is not None:
        file = tmp_path / "flags.yaml"
        file.write_text(f"add_bos_token: {expected}\n")
        arguments = ["--config", str(file), *arguments[:4]]
        assert parse_options(PreprocessCorpusOptions, arguments).add_bos_token is expected
