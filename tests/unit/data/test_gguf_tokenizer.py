"""Tokenizers in GGUF files, against the libraries that they were made with."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gguf", reason="gguf, an optional package, is not installed")

from retro_mcore.data.tokenizers.gguf import (
    gguf_bos_habit,
    read_gguf_tokenizer,
    unpacked_tokenizer,
)
from retro_mcore.data.tokenizers.loading import build_tokenizer
from retro_mcore.errors import TokenizerError
from tests.gguf_files import write_gguf

TEXTS = [
    "The quick brown fox, 1234567 times; it's theirs.",
    "for i in range(3):\n\n    print(i)\r\n\t\tx²³ ½ Ⅳ",
    "Ünïcode, too: 漢字 ١٢٣  \u2003 e\u0301\n \n  end   ",
    "<|endoftext|> is text here, and so is </s>",
    " leading and  double  spaces",
]
END = "<|endoftext|>"
NORMAL, CONTROL, UNUSED = 1, 3, 5


def byte_level(tmp_path, pre="gpt-2", **changes):
    """A file with a small byte-level BPE, and the library's tokenizer."""
    import tokenizers

    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(TEXTS * 3, 330, special_tokens=[END, "<|im_end|>"])
    state = json.loads(theirs._tokenizer.to_str())
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "[PAD]"],
        "token_type": [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2) + [UNUSED],
        "merges": merges,
        "eos_token_id": 1,
        "bos_token_id": 0,
        **changes,
    }
    return save(tmp_path, values), theirs._tokenizer


def save(tmp_path, values):
    keys = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return write_gguf(tmp_path / "m.gguf", {}, {}, tokenizer=keys)


def load(file):
    with unpacked_tokenizer(file) as unpacked:
        return build_tokenizer(read_gguf_tokenizer(file).type, unpacked)


def test_gpt_2(tmp_path):
    file, theirs = byte_level(tmp_path)
    ours = load(file)
    theirs.encode_special_tokens = True
    for text in TEXTS[:3]:
        assert ours.tokenize(text) == theirs.encode(text, add_special_tokens=False).ids
    for text in TEXTS:
        assert ours.detokenize(ours.tokenize(text)) == text
        assert not {0, 1} & set(ours.tokenize(text))
    assert (ours.eod, ours.bos, ours.adds_bos) == (1, 0, False)
    assert ours.vocab_size == len(read_gguf_tokenizer_tokens(file)) - 1  # without [PAD]


def read_gguf_tokenizer_tokens(file):
    from retro_mcore.gguf_file import read_gguf_header

    return read_gguf_header(file).metadata["tokenizer.ggml.tokens"]


#: llama.cpp's rules: each splits the parts that the one before it left.
GPT_2_RULE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3_RULE = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    "gpt-2": [GPT_2_RULE],
    "smollm": [r"\p{N}", GPT_2_RULE],
    "llama-bpe": [LLAMA_3_RULE],
    "qwen2": [LLAMA_3_RULE.replace("{1,3}", "")],
}


def split(text: str, rules: list[str]) -> list[str]:
    regex = pytest.importorskip("regex", reason="regex, an optional package, is not installed")
    parts = [text]
    for rule in rules:
        cut = []
        for part in parts:
            end = 0
            for match in regex.finditer(rule, part):
                cut += [part[end : match.start()], match[0]]
                end = match.end()
            cut.append(part[end:])
        parts = [part for part in cut if part]
    return parts


@pytest.mark.parametrize("pre", RULES)
def test_texts_are_split_as_llama_cpp_does(tmp_path, pre):
    import tokenizers

    file, _ = byte_level(tmp_path, pre)
    text_of = tokenizers.Tokenizer.from_str(
        read_gguf_tokenizer(file).contents["tokenizer.json"].decode()
    )
    for text in [*TEXTS, "I'LL we'Ll don't", "a" * 3 + " \t \n\n b", "12 345 6789"]:
        places = [place for _, place in text_of.pre_tokenizer.pre_tokenize_str(text)]
        assert [text[start:end] for start, end in places] == split(text, RULES[pre])


def test_llama_3_begins_with_bos_and_takes_whole_words(tmp_path):
    file, _ = byte_level(tmp_path, "llama-bpe")
    assert load(file).adds_bos
    assert gguf_bos_habit(file)
    state = json.loads(read_gguf_tokenizer(file).contents["tokenizer.json"])
    assert state["model"]["ignore_merges"]
    file, _ = byte_level(tmp_path, "llama-bpe", add_bos_token=False)
    assert not load(file).adds_bos
    assert not gguf_bos_habit(file)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    import sentencepiece

    from retro_mcore.data.tokenizers.training import train_sentencepiece

    train_sentencepiece(TEXTS * 3, 320, tmp_path / "m.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ids = range(theirs.vocab_size())
    kinds = [
        2 if theirs.is_unknown(each) else 3 if theirs.is_control(each)
        else 6 if theirs.is_byte(each) else 1 for each in ids
    ]  # fmt: skip
    values = {
        "model": "llama",
        "tokens": [theirs.id_to_piece(each) for each in ids],
        "scores": [float(theirs.get_score(each)) for each in ids],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": prefix,
    }
    ours = load(save(tmp_path, values))
    assert (ours.eod, ours.bos, ours.adds_bos) == (2, 1, True)
    for text in TEXTS:
        wanted = theirs.encode(f" {text}" if prefix else text)
        assert ours.tokenize(text) == wanted
        assert ours.detokenize(wanted) == text


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"pre": "default"}, "pre-tokenizer 'default', not one of gpt-2, smollm"),
        ({"pre": None}, "pre-tokenizer None"),
        ({"model": "t5"}, "model 't5', not 'gpt2' or 'llama'"),
        ({"model": "llama"}, "no score for each token"),
        ({"tokens": None}, "holds no tokenizer"),
        ({"token_type": [1, 1]}, "no token_type for each"),
        ({"merges": ["a b c"]}, "no list of merges of two tokens each"),
        ({"eos_token_id": 1000}, "eos_token_id 1000"),
    ],
)
def test_what_the_files_cannot_express_is_refused(tmp_path, changes, found):
    file, _ = byte_level(tmp_path, **{"pre": "gpt-2", **changes})
    with pytest.raises(TokenizerError, match=found):
        load(file)


def test_merges_of_unknown_tokens_are_refused(tmp_path):
    file, _ = byte_level(tmp_path, merges=["\u0100 \u0101"])
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        load(file)
