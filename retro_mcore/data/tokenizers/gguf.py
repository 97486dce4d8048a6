"""The tokenizer in a GGUF file, as the files that our tokenizers read.

llama.cpp names how a byte-level BPE splits text before merging, but does not store the rule. Rules
are kept here for the Llama family's tokenizers, as their own tokenizer.json has them; others are
refused by name.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_mcore.data.tokenizers.fast import HuggingFaceTokenizer
from retro_mcore.data.tokenizers.sentencepiece import GPTSentencePieceTokenizer
from retro_mcore.errors import TokenizerError
from retro_mcore.gguf_file import read_gguf_header

_KEY = "tokenizer.ggml."
_DECLARING = "tokenizer_config.json"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Splitting:
    """Text handling of a byte-level BPE.

    Attributes:
        before: Pre-tokenizers before the one that maps bytes to letters.
        regex: Whether that one also splits with GPT-2's rule.
        whole_words: Whether a word in the vocabulary is a token even if merges do not lead to it.
        nfc: Whether text is normalized to NFC.
        adds_bos: Whether texts begin with BOS, where the file does not say.
    """

    before: tuple[Mapping[str, Any], ...] = ()
    regex: bool = True
    whole_words: bool = False
    nfc: bool = False
    adds_bos: bool = False


def _split(numbers: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS.format(numbers=numbers)}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


_LLAMA_3 = _Splitting((_split(r"\p{N}{1,3}"),), regex=False, whole_words=True, adds_bos=True)
_QWEN_2 = _Splitting((_split(r"\p{N}"),), regex=False, nfc=True)
_SPLITTING = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(({"type": "Digits", "individual_digits": True},)),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
}


@dataclass(frozen=True)
class GgufTokenizer:
    """Files of a tokenizer.

    Attributes:
        type: Value of `--tokenizer-type`.
        file: Name of the file to load.
        contents: All files by name.
    """

    type: str
    file: str
    contents: Mapping[str, bytes]


def read_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """Convert a GGUF file's tokenizer: byte-level BPE to tokenizer.json, SentencePiece to .model.

    A tokenizer_config.json declares BOS and EOS.

    Raises:
        TokenizerError: it has none, or one that these files cannot express.
        CheckpointError: the file is damaged.
    """
    metadata = read_gguf_header(path).metadata
    values = {k.removeprefix(_KEY): v for k, v in metadata.items() if k.startswith(_KEY)}
    kind, tokens, types = (values.get(name) for name in ("model", "tokens", "token_type"))
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError(path, "holds no tokenizer", "Name the tokenizer's own files")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise _refusal(path, f"{len(tokens)} tokens and no token_type for each")
    if len(set(tokens)) < len(tokens):
        raise _refusal(path, "two tokens of the same text")
    if kind == "gpt2":
        name, content, adds_bos = "tokenizer.json", *_byte_level(path, values)
        tokenizer_type = HuggingFaceTokenizer.name
    elif kind == "llama":
        name, content, adds_bos = "tokenizer.model", _sentencepiece(path, values), True
        tokenizer_type = GPTSentencePieceTokenizer.name
    else:
        raise _refusal(path, f"model {kind!r}, not 'gpt2' or 'llama'")
    declared = json.dumps(_declared(path, values, adds_bos), indent=2, ensure_ascii=False)
    files = {name: content, _DECLARING: declared.encode()}
    return GgufTokenizer(tokenizer_type, name, files)


def gguf_bos_habit(path: Path) -> bool:
    """Whether a GGUF file's tokenizer begins texts with BOS.

    Raises:
        RetroError: see `read_gguf_tokenizer`.
    """
    declared = json.loads(read_gguf_tokenizer(path).contents[_DECLARING])
    return bool(declared["add_bos_token"])


@contextmanager
def unpacked_tokenizer(path: Path) -> Iterator[Path]:
    """The tokenizer's main file, beside the others, in a directory that is removed afterwards.

    Raises:
        RetroError: see `read_gguf_tokenizer`.
    """
    tokenizer = read_gguf_tokenizer(path)
    with tempfile.TemporaryDirectory() as directory:
        for name, content in tokenizer.contents.items():
            Path(directory, name).write_bytes(content)
        yield Path(directory, tokenizer.file)


def _refusal(path: Path, found: str) -> TokenizerError:
    return TokenizerError(
        path, f"has a tokenizer with {found}", "Name the files of the model's own tokenizer"
    )


def _declared(path: Path, values: Mapping[str, Any], adds_bos: bool) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    tokens = values["tokens"]
    found: dict[str, Any] = {"add_bos_token": values.get("add_bos_token", adds_bos)}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = values.get(f"{key}_token_id")
        if token is None:
            continue
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            raise _refusal(path, f"{key}_token_id {token!r} and {len(tokens)} tokens")
        found[f"{role}_token"] = tokens[token]
    if found["add_bos_token"] and "bos_token" not in found:
        found["add_bos_token"] = False  # as llama.cpp: there is none to add
    return found


def _byte_level(path: Path, values: Mapping[str, Any]) -> tuple[bytes, bool]:
    """tokenizer.json, and whether texts begin with BOS by default."""
    name, merges = values.get("pre"), values.get("merges")
    splitting = _SPLITTING.get(name) if isinstance(name, str) else None
    if splitting is None:
        raise _refusal(path, f"pre-tokenizer {name!r}, not one of {', '.join(_SPLITTING)}")
    texts = merges if isinstance(merges, list) else []
    pairs = [str(merge).split(" ") for merge in texts]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise _refusal(path, "no list of merges of two tokens each")
    return _json(_tokenizer_json(values, splitting, pairs)), splitting.adds_bos


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _tokenizer_json(
    values: Mapping[str, Any], splitting: _Splitting, merges: list[list[str]]
) -> dict[str, Any]:
    numbered = list(enumerate(zip(values["tokens"], values["token_type"], strict=True)))
    added = [
        _added_token(number, token, kind in (_CONTROL, _UNKNOWN))
        for number, (token, kind) in numbered
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level = {**letters, "use_regex": splitting.regex}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if splitting.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splitting.before, byte_level]},
        "post_processor": None,
        "decoder": {**letters, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitting.whole_words,
            # Rows of the embedding without a token have names too, which no text has.
            "vocab": {token: number for number, (token, kind) in numbered if kind != _UNUSED},
            "merges": merges,
        },
    }


def _added_token(number: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": special}


def _sentencepiece(path: Path, values: Mapping[str, Any]) -> bytes:
    """A serialized `sentencepiece.ModelProto` of a BPE model without normalization."""
    scores, types = values.get("scores"), values["token_type"]
    if not isinstance(scores, list) or len(scores) != len(types):
        raise _refusal(path, "no score for each token")
    pieces = [
        _field(1, _text(1, token) + _float(2, score) + _varint_field(3, kind))
        for token, score, kind in zip(values["tokens"], scores, types, strict=True)
    ]
    trainer = _varint_field(3, 2) + _varint_field(4, len(types))  # BPE
    trainer += _varint_field(35, int(_BYTE in types))
    for place, (role, key) in enumerate((("unknown", 45), ("bos", 46), ("eos", 47))):
        token = values.get(f"{role}_token_id", place)
        if isinstance(token, int) and 0 <= token < len(types):
            trainer += _varint_field(40 + place, token) + _text(key, values["tokens"][token])
    prefix, trimmed = (
        int(bool(values.get(name, default)))
        for name, default in (("add_space_prefix", True), ("remove_extra_whitespaces", False))
    )
    normalizer = _text(1, "identity") + _varint_field(3, prefix)
    normalizer += _varint_field(4, trimmed) + _varint_field(5, 1)
    return b"".join([*pieces, _field(2, trainer), _field(3, normalizer)])


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)
