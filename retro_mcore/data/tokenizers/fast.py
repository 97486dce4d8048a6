"""Hugging Face's Rust tokenizers, loaded from a tokenizer.json or from GPT-2's two files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokenizers.special_tokens import (
    END_OF_TEXT,
    DeclaredTokens,
    SpecialTokenChoice,
    Vocabulary,
)
from retro_mcore.data.tokenizers.spelling import Speller
from retro_mcore.errors import TokenizerError
from retro_mcore.json_text import JsonError, parse_json

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MARK = "\N{REPLACEMENT CHARACTER}"
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")


class FastTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's library."""

    def _use(
        self, tokenizer: Any, file: Path, choice: SpecialTokenChoice | None, own_eod: int | None
    ) -> None:
        """Initialize from a loaded tokenizer.

        Args:
            tokenizer: The library's tokenizer.
            file: The file it was loaded from.
            choice: The requested special tokens, if any.
            own_eod: The end-of-document token that this kind of file implies.
        """
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # encode them as the text that they are
        self._vocabulary = tokenizer.get_vocab()
        # Ids may have gaps, so the number of tokens says too little.
        self._vocab_size = max(self._vocabulary.values()) + 1
        declared = DeclaredTokens.read(file.parent)
        special = self._special_tokens(declared)
        vocabulary = Vocabulary(file, self._vocabulary.get, self._vocab_size, special, own_eod)
        self._choose(choice, declared, vocabulary, *_ends_of(tokenizer))
        self.pad = self._pad(declared, special)
        unknown = _unknown(tokenizer)
        self._refuse_unknown(file, unknown)
        forbidden = {each: text for each, text in special.items() if each != unknown}
        forbidden |= {each: self.token_name(each) for each in self._ends()}
        self._used = 1 + max(set(self._vocabulary.values()) - forbidden.keys() | self._ends())
        decoder = _state(tokenizer.decoder)
        self._speller = Speller(forbidden, self._vocabulary.get, "ByteLevel" in decoder, unknown)
        self._special = tuple(special.values())
        self._with_special: Any = None
        self._bytes: dict[int, int] = {}
        if "ByteFallback" in decoder:
            self._bytes = _byte_tokens(self._vocabulary)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def used_vocab_size(self) -> int:
        return self._used

    def token_name(self, token: int) -> str:
        return str(self._tokenizer.id_to_token(token))

    @property
    def special_names(self) -> tuple[str, ...]:
        return self._special

    def tokenize_with_special(self, text: str) -> list[int]:
        if self._with_special is None:
            copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
            copy.encode_special_tokens = False
            self._with_special = copy
        return list(self._with_special.encode(text, add_special_tokens=False).ids)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # The "fast" methods omit text offsets, which are not needed here.
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        texts = self._tokenizer.decode_batch(rows, skip_special_tokens=False)
        if self._bytes:
            for place, text in enumerate(texts):
                if _MARK in text:
                    texts[place] = self._decode_bytes(rows[place])
        return texts

    def _decode_bytes(self, row: list[int]) -> str:
        """Decode a row whose bytes include incomplete characters.

        The library would replace the whole run of byte tokens, complete characters included."""
        tokens: list[str] = []
        waiting = bytearray()
        for each in row:
            if each in self._bytes:
                waiting.append(self._bytes[each])
                continue
            tokens += _whole_characters(waiting)
            waiting.clear()
            if (token := self._tokenizer.id_to_token(each)) is not None:
                tokens.append(token)
        return self._tokenizer.decoder.decode([*tokens, *_whole_characters(waiting)])

    def _special_tokens(self, declared: DeclaredTokens) -> dict[int, str]:
        """Map ids to the text of added tokens that are marked or declared special."""
        added = self._tokenizer.get_added_tokens_decoder()
        found = {each: token.content for each, token in added.items() if token.special}
        for text in declared.special:
            if (each := self._vocabulary.get(text)) is not None:
                found[each] = text
        return found

    def _pad(self, declared: DeclaredTokens, special: dict[int, str]) -> int | None:
        """The padding token, if it is not also EOD, as in many models.

        The declared one (by name, else by id), else the special token with a well-known name.
        """
        by_text = {text: each for each, text in special.items()}
        if "pad_token" in declared.tokens:
            _, named = declared.tokens["pad_token"]
            found = by_text.get(named or "")
        else:
            known = (by_text[name] for name in _PAD_NAMES if name in by_text)
            ids = (each for each in declared.pad_ids if each in special)
            found = next(ids, next(known, None))
        return None if found in self._ends() else found


class GPT2BPETokenizer(FastTokenizer):
    """GPT-2's byte-level BPE. <|endoftext|> ends a document and is never produced from text."""

    name = "GPT2BPETokenizer"

    def __init__(
        self,
        vocab_file: Path | str,
        merge_file: Path | str,
        choice: SpecialTokenChoice | None = None,
    ) -> None:
        super().__init__(vocab_file, merge_file)
        from tokenizers import ByteLevelBPETokenizer

        try:
            # Without the class around it, which lacks encode_batch_fast.
            tokenizer = ByteLevelBPETokenizer(str(vocab_file), str(merge_file))._tokenizer
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise TokenizerError(
                vocab_file, f"not GPT-2 vocab and merges ({error})", "Name vocab.json, merges.txt"
            ) from error
        self._use(tokenizer, Path(vocab_file), choice, tokenizer.token_to_id(END_OF_TEXT))


class HuggingFaceTokenizer(FastTokenizer):
    """A tokenizer.json, or a directory that contains one."""

    name = "HuggingFaceTokenizer"

    def __init__(self, path: Path | str, choice: SpecialTokenChoice | None = None) -> None:
        super().__init__(path)
        file = tokenizer_json(Path(path))
        self._use(load_tokenizer_json(file), file, choice, None)


def load_tokenizer_json(file: Path) -> Any:
    """Load a tokenizer with truncation and padding switched off.

    Raises:
        TokenizerError: the file is not a usable tokenizer.json.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise _not_a_tokenizer(file, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if not tokenizer.get_vocab():
        raise TokenizerError(file, "holds no tokens", "Name a trained tokenizer")
    # Kinds of models differ in their attributes.
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise TokenizerError(
            file,
            f"drops merges at random (dropout {dropout:g}), so tokens differ from run to run",
            "Set dropout to null in the file",
        )
    return tokenizer


def _not_a_tokenizer(file: Path, error: Exception) -> TokenizerError:
    """The reason why the library could not load a file, in clearer words where possible."""
    beside = file.with_name("tokenizer.json")
    hint = "Name a tokenizer.json or its directory"
    if file.name != beside.name and beside.is_file():
        hint = f"Name {beside}"
    try:
        values = parse_json(file.read_bytes(), allow_nan=True)
        holds = values.get("model") if isinstance(values, dict) else None
        found = str(error) if isinstance(holds, dict) else "no vocabulary under the key model"
    except JsonError as reason:
        found = str(reason)
    except OSError as reason:
        found = reason.strerror or str(reason)
    return TokenizerError(file, f"not a tokenizer.json ({' '.join(found.split())})", hint)


def tokenizer_json(path: Path) -> Path:
    """The path itself, or the tokenizer.json in a model directory.

    Raises:
        TokenizerError: the directory has no tokenizer.json; names the tokenizer type it holds.
    """
    file = path / "tokenizer.json"
    if not path.is_dir() or file.is_file():
        return file if path.is_dir() else path
    hint = "Save the model's fast tokenizer there: save_pretrained makes a tokenizer.json"
    if (path / "tokenizer.model").is_file():
        hint = f"Use GPTSentencePieceTokenizer --tokenizer-model {path / 'tokenizer.model'}"
    elif (path / "vocab.json").is_file():
        files = f"--vocab-file {path / 'vocab.json'} --merge-file {path / 'merges.txt'}"
        hint = f"Use GPT2BPETokenizer {files}"
    raise TokenizerError(path, "has no tokenizer.json", hint)


def bos_habit(directory: Path | str) -> bool | None:
    """Whether the tokenizer in a model directory begins texts with BOS.

    Read from `add_bos_token` in its configuration, else from its tokenizer.json; None if neither
    says.

    Raises:
        TokenizerError: a file is malformed.
    """
    directory = Path(directory)
    declared = DeclaredTokens.read(directory)
    if declared.add_bos is not None or not (directory / "tokenizer.json").is_file():
        return declared.add_bos
    file = directory / "tokenizer.json"
    try:
        return HuggingFaceTokenizer(file).adds_bos
    except TokenizerError:  # without an EOD; of a malformed file this says so again
        prefix, suffix = _ends_of(load_tokenizer_json(file))
        return len(prefix) == 1 and not suffix


def _ends_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer's post-processor adds before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _unknown(tokenizer: Any) -> int | None:
    """Id of the unknown token."""
    token = getattr(tokenizer.model, "unk_token", None)
    if token:
        return tokenizer.token_to_id(token)
    if type(tokenizer.model).__name__ != "Unigram":
        return None
    # Only the serialized state shows it.
    return json.loads(tokenizer.model.__getstate__()).get("unk_id")


def _state(part: Any) -> str:
    """A tokenizer component as JSON."""
    return part.__getstate__().decode() if part is not None else ""


def _byte_tokens(vocabulary: dict[str, int]) -> dict[int, int]:
    """Map ids to bytes."""
    found = ((each, _BYTE.fullmatch(token)) for token, each in vocabulary.items())
    return {each: int(match[1], 16) for each, match in found if match}


def _whole_characters(data: bytes | bytearray) -> list[str]:
    """Convert bytes back to byte tokens, with U+FFFD in place of invalid bytes."""
    tokens: list[str] = []
    for letter in data.decode(errors="replace"):
        tokens += [_MARK] if letter == _MARK else [f"<0x{byte:02X}>" for byte in letter.encode()]
    return tokens
