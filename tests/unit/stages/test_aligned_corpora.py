"""Aligned projects: padded documents, and the chunks that they are cut into."""

from __future__ import annotations

import numpy as np
import pytest

from retro_mcore.chunking import padding_mask
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.data.corpus.counts import read_counts
from retro_mcore.data.tokenizers.loading import build_tokenizer, load_project_tokenizer
from retro_mcore.data.tokens.indexed_dataset import write_indexed_dataset
from retro_mcore.data.tokens.splits import document_ranges
from retro_mcore.data.tokens.token_file import TokenFile, bin_path, idx_path, open_token_files
from retro_mcore.errors import ConfigurationError, ProjectError, TokenizerError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options, stage_report
from retro_mcore.retrieval.bert_tokens import BertTokenCounter, default_bert_vocab
from retro_mcore.retrieval.database import ChunkDatabase
from tests.unit.data.aligned import TEXTS, M, aligned_database, save_tokenizer
from tests.unit.data.projects import preprocess_options, write_corpus


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def project(request, tmp_path_factory):
    return aligned_database(tmp_path_factory.mktemp("aligned"), request.param)


def opened(project):
    config, paths = ProjectConfig.load(project), ProjectPaths(project)
    (file,) = open_token_files(config, paths)
    return load_project_tokenizer(config, paths), file


def test_padding_follows_the_first_end_of_each_chunk():
    tokens = np.array([[5, 6, 0, 0, 0, 0, 0, 0], [7, 8, 9, 0, 1, 2, 3, 4]])
    expected = [[0, 0, 0, 1, 0, 1, 1, 1], [0] * 8]
    assert padding_mask(tokens, 4, 0).tolist() == np.array(expected, bool).tolist()
    rng = np.random.default_rng(0)
    for length in (1, 2, 5):
        random = rng.integers(0, 3, (4, 6 * length))
        naive = [
            [0 in row[place - place % length : place] for place in range(len(row))]
            for row in random.tolist()
        ]
        assert padding_mask(random, length, 0).tolist() == naive


def test_documents_are_padded_to_whole_chunks(project):
    tokenizer, file = opened(project)
    padding = 0
    for number, text in enumerate(TEXTS):
        tokens = file.sequence(number).tolist()
        whole = [*tokenizer.beginning, *tokenizer.tokenize(text), tokenizer.eod]
        assert tokens[: len(whole)] == whole
        assert len(tokens) == -(-len(whole) // M) * M
        assert set(tokens[len(whole) :]) <= {tokenizer.eod}
        marked = padding_mask(np.array(tokens), M, tokenizer.eod)
        # A chunk that begins with padding holds one EOD more.
        assert marked.tolist() == [False] * len(whole) + [True] * (len(tokens) - len(whole))
        padding += len(tokens) - len(whole)
    report = stage_report(ProjectPaths(project), "preprocess_corpus")
    assert report["padding_tokens"] == padding
    assert report["datasets"]["corpus_text_document"]["padding_tokens"] == padding
    splits = {name: counts["padding_tokens"] for name, counts in report["splits"].items()}
    assert sum(splits.values()) == padding
    held_out = [file.sequence(i) for i in range(*document_ranges("60,20,20", len(TEXTS))["valid"])]
    marked = [padding_mask(tokens, M, tokenizer.eod).sum() for tokens in held_out]
    assert splits["valid"] == sum(marked)
    assert ProjectSettings.load(project).samples == "aligned"
    assert recorded_options(ProjectPaths(project), "preprocess_corpus")["--samples"] == "aligned"


def test_chunks_of_the_database_are_those_of_padded_documents(project):
    tokenizer, _ = opened(project)
    counter = BertTokenCounter(default_bert_vocab())
    expected = []
    for number, text in enumerate(TEXTS):
        begin = len(tokenizer.beginning)
        tokens = [*tokenizer.beginning, *tokenizer.tokenize(text)]
        for start in range(0, len(tokens), M):
            first, end = max(start, begin), min(start + M, len(tokens))
            count = counter.count([tokenizer.detokenize(tokens[first:end])])[0]
            if first < end and count:
                expected.append([0, number, first, end, count])
    train = int(0.6 * len(TEXTS))
    rows = {name: ChunkDatabase.open(project, name).chunks.tolist() for name in ("train", "valid")}
    assert rows["train"] == [row for row in expected if row[1] < train]
    assert rows["valid"] == [row for row in expected if row[1] >= train]
    # Some chunks have no words: there are gaps.
    with_gap = TEXTS.index("\t" * 2 * M + "0")
    assert [row[2] // M for row in rows["train"] if row[1] == with_gap] == [2]


def test_tokens_given_are_padded_like_text(project, tmp_path):
    tokenizer, file = opened(project)
    bos = tokenizer.adds_bos
    bare = [
        np.array([*tokenizer.beginning, *tokenizer.tokenize(text), tokenizer.eod]) for text in TEXTS
    ]
    made = {}
    for name, rows in (("bare", bare), ("padded", [file.sequence(i) for i in range(len(file))])):
        target = tmp_path / name
        write_indexed_dataset(bin_path(target), idx_path(target), rows, np.uint16)
        options = {"tokenizer_model": str(save_tokenizer(tmp_path, bos)), "samples": "aligned"}
        preprocess_corpus(preprocess_options(tmp_path / f"from_{name}", target, **options))
        made[name] = TokenFile(tmp_path / f"from_{name}" / "data" / name)
        assert made[name].tokens.tolist() == file.tokens.tolist()
        assert made[name].lengths.tolist() == file.lengths.tolist()
    counts = {name: read_counts(each.prefix) for name, each in made.items()}
    assert counts["bare"]["padding_tokens"] == counts["padded"]["padding_tokens"]
    assert "repeated_eods_dropped" not in counts["bare"]
    assert counts["padded"]["repeated_eods_dropped"] == counts["bare"]["padding_tokens"]


def test_a_packed_project_drops_the_padding_of_tokens_given(project, tmp_path):
    tokenizer, file = opened(project)
    rows = [*map(file.sequence, range(len(file))), np.full(M, tokenizer.eod)]
    bare = [[*row[row != tokenizer.eod].tolist(), tokenizer.eod] for row in rows]
    model = str(save_tokenizer(tmp_path, tokenizer.adds_bos))

    def given(name, documents, layout):
        target = tmp_path / name
        arrays = map(np.array, documents)
        write_indexed_dataset(bin_path(target), idx_path(target), arrays, np.uint16)
        options = {"tokenizer_model": model, "samples": layout}
        made = tmp_path / f"{name}_{layout}"
        preprocess_corpus(preprocess_options(made, target, **options))
        return TokenFile(made / "data" / name)

    taken = given("padded", rows, "packed")
    assert [taken.sequence(i).tolist() for i in range(len(taken))] == bare
    counts = read_counts(taken.prefix)
    assert counts == {
        "repeated_eods_dropped": sum(map(len, rows)) - sum(map(len, bare)),
        "documents_without_text": 1,
    }
    laid = given("padded", rows, "aligned")
    assert laid.sequence(len(rows) - 1).tolist() == [tokenizer.eod] * M
    assert read_counts(laid.prefix)["documents_without_text"] == 1
    # Documents of other lengths, or with EOD before the end, are none of an aligned project.
    begin = list(tokenizer.beginning)
    end = tokenizer.eod
    for name, more in (
        ("long", [*begin, 40, end]),
        ("inner", [*begin, *[40] * (M - len(begin) - 3), end, 41, end]),
    ):
        taken = given(name, [*rows, more], "packed")
        assert taken.tokens.tolist() == [token for row in [*rows, more] for token in row]
        assert not read_counts(taken.prefix)


def test_an_end_inside_a_text_is_refused(tmp_path):
    tokenizer_model = save_tokenizer(tmp_path, False)
    end = build_tokenizer("HuggingFaceTokenizer", tokenizer_model).eod
    target = tmp_path / "given"
    rows = [np.array(row) for row in ([40, 41, end], [40, end, 41, end], [50, end])]
    write_indexed_dataset(bin_path(target), idx_path(target), rows, np.uint16)
    changes: dict = {"tokenizer_model": str(tokenizer_model), "samples": "aligned"}
    options = preprocess_options(tmp_path / "project", target, **changes)
    with pytest.raises(TokenizerError, match=rf"document 1 holds .* token \({end}\) before"):
        preprocess_corpus(options)


def test_a_beginning_that_is_also_the_end_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    options = preprocess_options(
        tmp_path / "project",
        corpus,
        tokenizer_model=str(save_tokenizer(tmp_path, False)),
        samples="aligned",
        eod_token="<s>",
        bos_token="<s>",
        add_bos_token=True,
    )
    with pytest.raises(TokenizerError, match="documents begin with the token that ends them"):
        preprocess_corpus(options)


def test_layouts_do_not_mix(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    options = preprocess_options(tmp_path / "project", corpus)
    preprocess_corpus(options)
    record = recorded_options(ProjectPaths(tmp_path / "project"), "preprocess_corpus")
    assert "--samples" not in record
    options.samples = "aligned"
    with pytest.raises(ProjectError, match="--samples"):
        preprocess_corpus(options)
    options.samples = "alined"
    with pytest.raises(ConfigurationError, match="Choose aligned or packed"):
        preprocess_corpus(options)
    build_db(BuildDbOptions(str(tmp_path / "project")))
    assert "samples" not in recorded_options(ProjectPaths(tmp_path / "project"), "build_db")


def test_new_projects_are_aligned_and_others_stay_as_they_are(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    for name, first, expected in (
        ("new", None, "aligned"),
        ("aligned", "aligned", "aligned"),
        ("packed", "packed", "packed"),
    ):
        options = preprocess_options(tmp_path / name, corpus, samples=first)
        preprocess_corpus(options)
        assert ProjectSettings.load(tmp_path / name).samples == expected
        options.samples = None
        assert preprocess_corpus(options).reused
        assert ProjectSettings.load(tmp_path / name).samples == expected
