"""Tokenizers: lossless, described as Megatron describes them, typed errors."""

import json

import numpy as np
import pytest

from retro_mcore.data.tokenizers.loading import (
    build_tokenizer,
    load_project_tokenizer,
    train_sentencepiece,
)
from retro_mcore.data.tokenizers.training import first_characters
from retro_mcore.errors import TokenizerError
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.retrieval.bert_tokens import BertTokenCounter, default_bert_vocab
from retro_mcore.retrieval.chunk_text import chunk_texts
from tests.unit.data.projects import built_project, documents

TEXT = "def f(x):\n    return  x\t# ü 漢 🙂 <|endoftext|> </s>\n"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "trained.model"
    train_sentencepiece(documents(), 500, path)
    return path


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory):
    """A byte-level BPE of GPT-2's form: 256 bytes, one merge, the end of text."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("gpt2")
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {"re": 256, "<|endoftext|>": 257}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    return folder / "vocab.json", folder / "merges.txt"


def test_trained_sentencepiece_is_lossless_and_deterministic(sentencepiece_model, tmp_path):
    tokenizer = build_tokenizer("GPTSentencePieceTokenizer", sentencepiece_model)
    assert tokenizer.vocab_size == 500
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.eod not in tokenizer.tokenize(TEXT)
    train_sentencepiece(documents(), 500, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == sentencepiece_model.read_bytes()


@pytest.mark.parametrize(
    ("most", "kept"),
    [(9, ["abc", "def", "ghi"]), (8, ["abc", "def", "gh"]), (6, ["abc", "def", ""])],
)
def test_the_text_to_train_on_is_limited(caplog, most, kept):
    caplog.set_level("INFO", logger="retro_mcore")
    assert list(first_characters(["abc", "def", "ghi"], most)) == kept
    assert ("trained on" in caplog.text) == (most < 9)


def test_a_small_corpus_lowers_the_vocabulary(tmp_path):
    size = train_sentencepiece(["hello there"], 4096, tmp_path / "small.model")
    assert 259 < size < 300
    with pytest.raises(TokenizerError, match=r"--vocab-size: 200 .*Choose at least 266"):
        train_sentencepiece(["hello there"], 200, tmp_path / "none.model")


def test_gpt2_bpe_reads_no_end_of_text_from_text(gpt2_files):
    tokenizer = build_tokenizer("GPT2BPETokenizer", None, *gpt2_files)
    assert (tokenizer.eod, tokenizer.vocab_size, tokenizer.pad) == (257, 258, None)
    ids = tokenizer.tokenize(TEXT)
    assert 257 not in ids
    assert 256 in ids
    assert tokenizer.detokenize(ids) == TEXT


def test_hugging_face_tokenizer_json(gpt2_files, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer(*map(str, gpt2_files))
    bpe.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", path)
        assert tokenizer.eod == 257
        assert tokenizer.detokenize(tokenizer.tokenize("where\n there")) == "where\n there"


def test_identifiers_are_those_of_megatrons_legacy_tokenizers(sentencepiece_model, gpt2_files):
    piece = build_tokenizer("GPTSentencePieceTokenizer", sentencepiece_model)
    assert list(piece.unique_identifiers.items()) == [
        ("class", "_GPTSentencePieceTokenizer"),
        ("tokenizer_path", [str(sentencepiece_model)]),
        ("vocab_extra_ids", "0"),
    ]
    gpt2 = build_tokenizer("GPT2BPETokenizer", None, *gpt2_files)
    assert list(gpt2.unique_identifiers.items()) == [
        ("class", "_GPT2BPETokenizer"),
        ("tokenizer_path", [str(file) for file in gpt2_files]),
    ]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("WordTokenizer",), "--tokenizer-type: 'WordTokenizer'"),
        (("GPTSentencePieceTokenizer",), "--tokenizer-model: not given"),
        (("GPT2BPETokenizer", None, "vocab.json"), "--merge-file: not both given"),
        (("GPTSentencePieceTokenizer", "missing.model"), r"missing\.model: no such file"),
        (("GPTSentencePieceTokenizer", __file__), "not a SentencePiece model"),
        (("HuggingFaceTokenizer", __file__), r"not a tokenizer\.json"),
        (("GPT2BPETokenizer", None, __file__, __file__), "not GPT-2 vocab and merges"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_named(arguments, found):
    with pytest.raises(TokenizerError, match=found):
        build_tokenizer(*arguments)


def test_a_replaced_tokenizer_is_not_the_projects(tmp_path, sentencepiece_model):
    import shutil

    project = tmp_path / "project"
    shutil.copytree(built_project(), project)
    config, paths = ProjectConfig.load(project), ProjectPaths(project)
    assert load_project_tokenizer(config, paths).vocab_size == 500
    train_sentencepiece(["another text"], 280, paths.tokenizer / "sentencepiece.model")
    with pytest.raises(TokenizerError, match="not the tokenizer that the project was built with"):
        load_project_tokenizer(config, paths)


def test_bert_counts_have_no_special_tokens():
    counter = BertTokenCounter(default_bert_vocab())
    assert counter.count(["Hello, world!", " \n", "naïve", "a" * 600]).tolist() == [4, 0, 1, 1]
    assert counter.count([]).tolist() == []


def test_bert_counts_are_those_of_the_whole_text(monkeypatch):
    """Words are counted one by one; control characters, special tokens and all spaces included."""
    from tokenizers import BertWordPieceTokenizer

    from retro_mcore.retrieval import bert_tokens

    vocab = default_bert_vocab()
    whole = BertWordPieceTokenizer(str(vocab))
    pieces = [*map(chr, range(256)), *"\u00a0\u1680\u2003\u2028\u3000\ufeff\u0301漢字한ßİΣς🙂"]
    pieces += ["[SEP]", "[MASK]", "word", "Äpfel", "x" * 101, "foo_bar", "<|endoftext|>", *TEXT]
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(pieces, random.integers(0, 60))) for _ in range(3000)]
    texts = [
        text if i % 3 else text.replace("\0", "") for i, text in enumerate(texts)
    ] + documents()
    expected = [len(whole.encode(text, add_special_tokens=False).ids) for text in texts]
    monkeypatch.setattr(bert_tokens, "_MOST_WORDS", 5000)  # so that it forgets
    counter = BertTokenCounter(vocab)
    for step in (1, 7, 500, len(texts)):
        found = [counter.count(texts[i : i + step]) for i in range(0, len(texts), step)]
        assert np.concatenate(found).tolist() == expected
    without = [text.replace("\0", "") for text in texts]
    assert counter.count(without).tolist() == expected  # WordPiece drops it


def test_ends_of_documents_become_line_breaks(sentencepiece_model):
    tokenizer = build_tokenizer("GPTSentencePieceTokenizer", sentencepiece_model)
    chunk = np.array([*tokenizer.tokenize("one"), tokenizer.eod, *tokenizer.tokenize("two")])
    assert chunk_texts(tokenizer, [chunk, chunk[:0], chunk[-2:]])[:2] == ["one\ntwo", ""]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"type": "NullTokenizer"}, "retro_gpt_tokenizer_type is 'NullTokenizer'"),
        ({"type": "SentencePiece"}, "retro_gpt_tokenizer_type is 'SentencePiece'"),
        ({"model": None}, "retro_gpt_tokenizer_model missing or null"),
        ({"type": "GPT2BPETokenizer"}, "merge_file missing or null"),
    ],
    ids=str,
)
def test_a_projects_configuration_is_told_by_its_keys(changes, found):
    """Met by who edits config.json, or copies one of another writer: no flag would help."""
    config, paths = ProjectConfig.load(built_project()), ProjectPaths(built_project())
    for name, value in changes.items():
        key = "retro_gpt_tokenizer_type" if name == "type" else f"retro_gpt_tokenizer_{name}"
        setattr(config, key, value)
    with pytest.raises(TokenizerError) as caught:
        load_project_tokenizer(config, paths)
    assert caught.value.subject == str(paths.config)
    assert found in str(caught.value)
    assert "--" not in str(caught.value)
