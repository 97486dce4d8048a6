"""Special tokens: text never becomes one, and the directory says which end and begin documents."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_mcore.data.tokenizers.loading import (
    SpecialTokenChoice,
    bos_habit,
    build_tokenizer,
    train_sentencepiece,
)
from retro_mcore.errors import TokenizerError
from tests.unit.data.tokenizer_shapes import (
    SHAPES,
    TEXTS,
    begins_with,
    byte_fallback,
    byte_level,
    save,
    unigram,
)

HF = "HuggingFaceTokenizer"


def load(directory, **choice):
    return build_tokenizer(HF, directory, choice=SpecialTokenChoice(**choice))


def load_sentencepiece(model, **choice):
    choice = SpecialTokenChoice(**choice)
    return build_tokenizer("GPTSentencePieceTokenizer", model, choice=choice)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_directory_says_what_begins_and_ends_documents(tmp_path, shape):
    """Whoever brings a model's own tokenizer directory; the project's copy says the same."""
    make, files, eod, bos, adds_bos = SHAPES[shape]
    tokenizer = load(save(tmp_path, make(), **files))
    assert tokenizer.token_name(tokenizer.eod) == eod
    assert (None if tokenizer.bos is None else tokenizer.token_name(tokenizer.bos)) == bos
    assert tokenizer.adds_bos == bos_habit(tmp_path) == adds_bos
    assert tokenizer.with_bos([3]) == [*([tokenizer.bos] if adds_bos else []), 3]
    assert tokenizer.with_bos(tokenizer.with_bos([3])) == tokenizer.with_bos([3])


@pytest.mark.parametrize("shape", SHAPES)
def test_text_never_becomes_a_special_token(tmp_path, shape):
    """A corpus about language models, and a prompt that tries to end its document."""
    make, files, *_ = SHAPES[shape]
    tokenizer = load(save(tmp_path, make(), **files))
    added = tokenizer._tokenizer.get_added_tokens_decoder()
    special = {token for token, entry in added.items() if entry.special} | {tokenizer.eod}
    text = "".join(f"a {entry.content}b{entry.content}\n" for entry in added.values())
    ids = tokenizer.tokenize(text)
    assert not special & set(ids)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.detokenize(tokenizer.with_bos(ids)) == text


def test_a_model_whose_vocabulary_holds_its_special_tokens_spells_them(tmp_path):
    """Unigram models (T5, XLM-R) find them in their vocabulary, whatever is added to it."""
    tokenizer = load(save(tmp_path, unigram(["<s>", "</s>"])))
    ids = tokenizer.tokenize("a </s> b <s>")
    assert not {tokenizer.eod, tokenizer.bos} & set(ids)
    assert tokenizer.detokenize(ids) == "a </s> b <s>"


def test_a_token_that_is_only_declared_special_is_spelled(tmp_path):
    tokenizer = byte_level(["<|endoftext|>"], ["<image>", "<think>"])
    files = {"tokenizer_config": {"additional_special_tokens": ["<image>"]}}
    loaded = load(save(tmp_path, tokenizer, **files))
    ids = loaded.tokenize("<image><think>")
    assert tokenizer.token_to_id("<image>") not in ids
    assert tokenizer.token_to_id("<think>") in ids  # a word like others
    assert loaded.detokenize(ids) == "<image><think>"


@pytest.mark.parametrize(
    ("special", "ordinary", "files", "found"),
    [
        (["</s>", "<|endoftext|>"], [], {}, r"</s> \(\d+\)"),
        ([], ["</s>"], {}, "no special token that is known"),
        (["<|stop|>"], ["<eos>"], {}, r"--eod-token TOKEN.*<\|stop\|>"),
        (["</s>"], [], {"tokenizer_config": {"eos_token": "<other>"}}, "names '<other>'"),
        (["</s>"], [], {"tokenizer_config": {"eos_token": 3}}, "eos_token is 3"),
    ],
)
def test_what_the_files_do_not_decide_is_refused(tmp_path, special, ordinary, files, found):
    directory = save(tmp_path, byte_level(special, ordinary), **files)
    with pytest.raises(TokenizerError, match=found):
        load(directory)


def word_level():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def test_an_end_that_stands_for_unknown_characters_is_refused(tmp_path):
    """Each of them would end the document amid its text."""
    words = save(tmp_path / "words", word_level())
    with pytest.raises(TokenizerError, match=r"its EOD, <unk>, also stands .*--eod-token"):
        load(words, eod="<unk>")
    with pytest.raises(TokenizerError, match=r"its BOS, <unk>, also stands .*--bos-token"):
        load(words, eod="</s>", bos="<unk>")
    # Where bytes write everything, nothing is unknown.
    assert load(save(tmp_path / "bytes", byte_fallback(["<s>", "</s>"])), eod="<unk>").eod == 2
    _sentencepiece(tmp_path / "u.model", model_type="unigram", byte_fallback=False, vocab_size=90)
    with pytest.raises(TokenizerError, match=r"u\.model: its EOD, <unk>, also stands"):
        load_sentencepiece(tmp_path / "u.model", eod=0)


def test_tokens_drawn_at_random_are_refused(tmp_path):
    """With BPE dropout no run could be repeated, nor an interrupted one finished."""
    directory = save(tmp_path, byte_level(["</s>"]))
    values = json.loads((directory / "tokenizer.json").read_text())
    for dropout in (0.0, 0.1):
        values["model"]["dropout"] = dropout
        (directory / "tokenizer.json").write_text(json.dumps(values))
        if not dropout:
            load(directory)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: drops merges at random .*0\.1"):
        load(directory)


def test_a_declared_token_that_is_missing_is_not_replaced_by_a_guess(tmp_path):
    """Tokens that were added after training are no part of a SentencePiece model."""
    model = tmp_path / "tokenizer.model"
    _sentencepiece(model)
    declared = tmp_path / "tokenizer_config.json"
    declared.write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(TokenizerError, match=r"names '<\|im_end\|>' as eos_token, which"):
        load_sentencepiece(model)
    assert load_sentencepiece(model, eod="</s>").eod == 2
    assert load_sentencepiece(model, own_eod=True).eod == 2
    declared.write_text('{"bos_token": "<|start|>"}')
    assert load_sentencepiece(model).bos is None
    declared.write_text('{"bos_token": "<|start|>", "add_bos_token": true}')
    with pytest.raises(TokenizerError, match=r"says add_bos_token, .*--bos-token"):
        load_sentencepiece(model)
    tokenizer = load_sentencepiece(model, add_bos=False)
    assert (tokenizer.bos, tokenizer.adds_bos) == (None, False)


def test_the_tokens_can_be_chosen_by_text_or_id(tmp_path):
    directory = save(tmp_path, byte_level(["<a>", "<b>"]))
    tokenizer = load(directory, eod="<a>", bos="<b>", add_bos=True)
    assert (tokenizer.token_name(tokenizer.eod), tokenizer.beginning) == ("<a>", [tokenizer.bos])
    assert load(directory, eod=str(tokenizer.bos)).eod == tokenizer.bos
    assert load(directory, eod=tokenizer.eod).eod == tokenizer.eod
    with pytest.raises(TokenizerError, match="--eod-token <c>"):
        load(directory, eod="<c>")
    with pytest.raises(TokenizerError, match="--bos-token 99999"):
        load(directory, eod="<a>", bos="99999")
    with pytest.raises(TokenizerError, match="--add-bos-token: given"):
        load(directory, eod="<a>", add_bos=True)


def test_a_malformed_declaration_is_named(tmp_path):
    directory = save(tmp_path, byte_level(["</s>"]))
    twice = '{"eos_token": "</s>", "eos_token": "<s>"}'
    for text in ("{", "[]", '{"a": ' * 100_000, twice):
        (directory / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
            load(directory)
    (directory / "tokenizer_config.json").unlink()
    (directory / "generation_config.json").write_text('{"eos_token_id": 1, "eos_token_id": 2}')
    with pytest.raises(TokenizerError, match=r"generation_config\.json: has the key eos_token_id"):
        load(directory)


def test_projects_of_earlier_versions_keep_their_end_of_document(tmp_path):
    """They took the first well-known name, whatever it was."""
    make, files, *_ = SHAPES["gemma 3"]
    tokenizer = load(save(tmp_path, make(), **files), first_known_eod=True, add_bos=False)
    assert tokenizer.token_name(tokenizer.eod) == "</s>"
    assert not tokenizer.adds_bos


@pytest.mark.parametrize(("add_bos", "text"), [(False, "<|endoftext|>a"), (True, "a")])
def test_a_token_that_ends_documents_too_is_written_where_none_begins_with_it(
    tmp_path, add_bos, text
):
    """GPT-NeoX and Pythia declare one token for both: a chunk that begins with the end of a
    document is embedded with it, as one that holds it elsewhere."""
    name = "<|endoftext|>"
    files = {"tokenizer_config": {"bos_token": name, "eos_token": name}}
    tokenizer = load(save(tmp_path, byte_level([name]), **files), add_bos=add_bos)
    assert tokenizer.bos == tokenizer.eod
    letter = tokenizer.tokenize("a")
    assert tokenizer.detokenize([tokenizer.eod, *letter]) == text
    assert tokenizer.detokenize([*letter, tokenizer.eod, *letter]) == f"a{name}a"


def test_ids_that_nothing_writes_are_not_counted_as_used(tmp_path):
    """Gemma 3: one image token more than its checkpoint has rows."""
    tokenizer = load(save(tmp_path, byte_level(["<|endoftext|>", "<image>"])))
    assert tokenizer.used_vocab_size == tokenizer.vocab_size - 1
    tokenizer = load(save(tmp_path, byte_level(["<|endoftext|>"], ["<think>"])))
    assert tokenizer.used_vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("files", "pad"),
    [
        ({}, "<pad>"),
        ({"tokenizer_config": {"pad_token": "<fill>"}}, "<fill>"),
        ({"tokenizer_config": {"pad_token": None}}, None),
        ({"generation_config": {"pad_token_id": "<fill>"}}, "<fill>"),
        ({"config": {"pad_token_id": 3}}, "<pad>"),  # an ordinary token: a default
        ({"tokenizer_config": {"pad_token": "</s>"}}, None),  # it ends documents
    ],
)
def test_the_padding_token_is_the_declared_one(tmp_path, files, pad):
    tokenizer = load(save(tmp_path, byte_level(["</s>", "<pad>", "<fill>"]), **files))
    assert (None if tokenizer.pad is None else tokenizer.token_name(tokenizer.pad)) == pad


def test_what_a_token_strips_from_text_is_counted(tmp_path):
    """Phi-3 declares </s> an ordinary token that swallows the spaces after it."""
    from tokenizers import AddedToken

    made = byte_level(["<|endoftext|>"])
    made.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer = load(save(tmp_path, made))
    text = "a</s>  \n b"
    ids = tokenizer.tokenize(text)
    assert tokenizer.eod not in ids
    assert tokenizer.count_losses([text], [ids])["texts_changed_by_tokenizer"] == 1


def test_a_template_or_add_bos_token_is_a_habit(tmp_path):
    plain = byte_level(["<s>", "</s>"])
    assert bos_habit(save(tmp_path, plain)) is False
    assert bos_habit(save(tmp_path, plain, tokenizer_config={"add_bos_token": True})) is True
    bare = tmp_path / "bare"
    assert bos_habit(save(bare, begins_with(plain, "<s>"))) is True
    assert bos_habit(save(bare, plain, tokenizer_config={"add_bos_token": False})) is False
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    assert bos_habit(bare) is None


def _characters():
    signs = st.sampled_from(
        ["\u2581", "\n", "\r\n", " ", "\t", "\0", "漢", "🙂", "</s>", "a", "\ufffd"]
    )
    return st.lists(st.one_of(signs, st.characters(exclude_categories=["Cs"])), max_size=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "trained.model"
    train_sentencepiece([*TEXTS, "markup </s> and more of it"] * 3, 330, path)
    return build_tokenizer("GPTSentencePieceTokenizer", path)


@given(pieces=_characters())
@settings(deadline=None, derandomize=True, max_examples=80)
def test_a_trained_tokenizer_gives_any_text_back(trained, pieces):
    text = "".join(pieces)
    ids = trained.tokenize(text)
    assert trained.detokenize(ids) == text
    assert not {trained.eod, trained.bos} & set(ids)
    assert trained.count_losses([text], [ids]) == {}


def _sentencepiece(path, **options):
    import io

    import sentencepiece

    model = io.BytesIO()
    given = {"model_type": "bpe", "vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_writer=model,
        **{**given, "byte_fallback": True, "character_coverage": 1.0, **options},
    )
    path.write_bytes(model.getvalue())
    return build_tokenizer("GPTSentencePieceTokenizer", path)


def test_markup_among_user_defined_symbols_is_not_read_from_text(tmp_path):
    """SentencePiece itself would read every user-defined symbol."""
    symbols = ["<sep>", "<|im_start|>", "[INST]", "  ", "range"]
    tokenizer = _sentencepiece(
        tmp_path / "a.model", user_defined_symbols=symbols, control_symbols=["<ctl>"]
    )
    text = "x <sep>y<|im_start|> [INST] <ctl> </s> range"
    ids = tokenizer.tokenize(text)
    names = {tokenizer.token_name(token) for token in ids}
    assert not names & {"<sep>", "<|im_start|>", "[INST]", "<ctl>", "</s>"}
    assert "range" in names
    assert tokenizer.detokenize(ids) == text


def test_a_declaration_tells_markup_that_is_text(tmp_path):
    """Gemma's model holds HTML tags, which its directory declares to be no special tokens."""
    added = {"1": {"content": "<b>", "special": False}, "2": {"content": "<s1>", "special": True}}
    config = {"added_tokens_decoder": added, "eos_token": "<s1>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = _sentencepiece(tmp_path / "a.model", user_defined_symbols=["<b>", "<s1>"])
    names = [tokenizer.token_name(token) for token in tokenizer.tokenize("<b><s1>")]
    assert "<b>" in names
    assert "<s1>" not in names
    assert tokenizer.token_name(tokenizer.eod) == "<s1>"
    # Projects of the retired release have Megatron's choice: the model's own.
    megatrons = build_tokenizer(
        "GPTSentencePieceTokenizer", tmp_path / "a.model", choice=SpecialTokenChoice(own_eod=True)
    )
    assert megatrons.token_name(megatrons.eod) == "</s>"


def test_what_a_tokenizer_loses_is_counted(tmp_path):
    """SentencePiece's usual normalization turns line breaks into spaces, and widths."""
    tokenizer = _sentencepiece(tmp_path / "a.model")
    texts = ["a\nb\nc", "plain", "x\u2581y", "p  q", "\uff21"]
    assert tokenizer.count_losses(texts, tokenizer.tokenize_batch(texts)) == {
        "texts_changed_by_tokenizer": 4,
        "removed_newlines": 2,
        "removed_spaces": 1,
        "changed_characters": 2,
        "added_characters": 0,
    }


def test_bytes_of_no_whole_character_do_not_mark_their_neighbors(tmp_path):
    """A chunk of Chinese in a byte-fallback model often begins inside a character."""
    tokenizer = load(save(tmp_path, byte_fallback(["<s>", "</s>"])))
    ids = tokenizer.tokenize("a漢字漢字a")
    bytes_of = ids[-13:-1]
    for cut in range(13):
        expected = "漢字漢字".encode()[cut:].decode(errors="replace")
        assert tokenizer.detokenize(bytes_of[cut:]) == expected
        expected = "漢字漢字".encode()[:cut].decode(errors="replace")
        assert tokenizer.detokenize(bytes_of[:cut]) == expected
