"""Tokenizers that the database, the datasets and generation share, without megatron.

They describe themselves as Megatron's legacy tokenizers do (`unique_identifiers`), because the
names of the neighbor directories are a hash of that description.

Text never becomes a special token: one that a text mentions is written in ordinary tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from retro_mcore.data.tokenizers.special_tokens import (
    DeclaredTokens,
    SpecialTokenChoice,
    Vocabulary,
    adds_bos,
    choose_bos,
    choose_eod,
)
from retro_mcore.data.tokenizers.spelling import Speller
from retro_mcore.errors import TokenizerError
from retro_mcore.json_text import replace_surrogates


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: The value of `--tokenizer-type` and of `retro_gpt_tokenizer_type`.
        files: The files it was loaded from, in the order of Megatron's constructors.
        unique_identifiers: Class, paths and options as Megatron's legacy tokenizer records them.
        eod: Id of the token that ends a document.
        bos: Id of the token that begins a text; None if there is none.
        adds_bos: Whether documents and prompts begin with `bos`; see `with_bos`.
        pad: Id of the padding token; None if there is none.
    """

    name: ClassVar[str]
    _options: ClassVar[dict[str, str]] = {}
    eod: int
    bos: int | None = None
    adds_bos: bool = False
    pad: int | None = None
    _speller: Speller

    def __init__(self, *files: Path | str) -> None:
        self.files = [Path(file) for file in files]
        for file in self.files:
            if not file.exists():
                raise TokenizerError(file, "no such file", f"Name the file of a {self.name}")
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = f"_{self.name}"
        self.unique_identifiers["tokenizer_path"] = [str(file) for file in self.files]
        self.unique_identifiers.update(self._options)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    @abstractmethod
    def used_vocab_size(self) -> int:
        """Number of token ids without the special ones at the end that nothing here writes."""

    @abstractmethod
    def token_name(self, token: int) -> str:
        """How the vocabulary writes a token, special ones too."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, as the library makes them."""

    @abstractmethod
    def _decode(self, rows: list[list[int]]) -> list[str]:
        """Text of each sequence of ids, as the library makes it."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, none of them special.

        Lone surrogates that stand for bytes of UTF-8, as in the arguments of a process whose locale
        knows ASCII alone, become what the bytes mean; others U+FFFD.
        """
        texts = list(texts)
        try:
            rows = self._encode(texts)
        except (TypeError, RuntimeError, UnicodeError):
            whole = [_without_surrogates(text) for text in texts]
            if whole == texts:
                raise
            rows = self._encode(whole)
        return [self._speller.spell(row) for row in rows]

    def detokenize_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each sequence of ids. BOS at the beginning is no text.

        A token that is EOD as well is BOS only where documents begin with it; else it ends the
        document before, and is written as it is elsewhere in the sequence.
        """
        if not len(ids):
            return []
        rows = _plain(ids)
        if self.adds_bos or self.bos not in (None, self.eod):
            rows = [row[1:] if row and row[0] == self.bos else row for row in rows]
        return self._decode(rows)

    def count_losses(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> dict[str, int]:
        """What tokenizing has lost of some texts: characters that their tokens do not give back.

        `preprocess_corpus` adds the numbers up, and shows and records those that are not 0.

        Returns:
            Number by name: `texts_changed_by_tokenizer`, and characters in `removed_newlines`,
            `removed_spaces` (other white space), `changed_characters` and `added_characters` (as
            many as the text has become longer).
        """
        counts: Counter[str] = Counter()
        for text, back in zip(texts, self.detokenize_batch(ids), strict=True):
            if text != back:
                counts.update(_differences(text, back))
        return dict(counts)

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, none of them special."""
        return self.tokenize_batch([text])[0]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return self.detokenize_batch([ids])[0]

    @property
    def beginning(self) -> list[int]:
        """What documents and prompts begin with: BOS, or nothing."""
        return [self.bos] if self.adds_bos and self.bos is not None else []

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """`ids` as a document or prompt begins: behind one BOS, if documents have it here."""
        beginning = self.beginning
        return list(ids) if list(ids[: len(beginning)]) == beginning else [*beginning, *ids]

    def _choose(
        self,
        choice: SpecialTokenChoice | None,
        declared: DeclaredTokens,
        vocabulary: Vocabulary,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        """Set EOD and BOS.

        Args:
            choice: What is asked for.
            declared: What the directory says.
            vocabulary: The tokens.
            prefix: What the tokenizer itself puts before a text.
            suffix: And behind it.
        """
        choice = choice or SpecialTokenChoice()
        first = prefix[0] if len(prefix) == 1 else None
        self.eod = choose_eod(choice, declared, vocabulary)
        # [CLS] … [SEP] is no BOS and EOD.
        self.bos = choose_bos(choice, declared, vocabulary, None if len(suffix) else first)
        self.adds_bos = adds_bos(choice, declared, self.bos, first)

    def _refuse_unknown(self, file: Path, unknown: int | None) -> None:
        """Refuse an EOD or BOS that also stands for characters without a token.

        A tokenizer that can write any character never needs it for that.
        """
        if unknown in self._ends() and any(unknown in row for row in self._encode(_PROBES)):
            role, flag = ("EOD", "eod") if unknown == self.eod else ("BOS", "bos")
            raise TokenizerError(
                file,
                f"its {role}, {self.token_name(unknown)}, also stands for characters that have no "
                "token",
                f"Choose another with --{flag}-token",
            )

    def _ends(self) -> set[int]:
        """EOD and BOS, which no text becomes."""
        return {self.eod} if self.bos is None else {self.eod, self.bos}


#: Characters of every length in UTF-8, ordinary and rare.
_PROBES = ["".join(map(chr, range(0x20, 0x800))), "漢", "\ue000", "\U0001f389", "\U0010fffd"]


def _differences(text: str, back: str) -> dict[str, int]:
    """How a text differs from what its tokens give, by the numbers of its characters."""
    before, after = Counter(text), Counter(back)
    lost = before - after
    newlines = sum(lost[sign] for sign in "\n\r")
    spaces = sum(count for sign, count in lost.items() if sign.isspace()) - newlines
    return {
        "texts_changed_by_tokenizer": 1,
        "removed_newlines": newlines,
        "removed_spaces": spaces,
        "changed_characters": lost.total() - newlines - spaces,
        "added_characters": max(0, len(back) - len(text)),
    }


def _without_surrogates(text: str) -> str:
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        return replace_surrogates(text)[0]


def _plain(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of Python integers; the Rust and C++ libraries take no others."""
    return [
        row if type(row) is list and (not row or type(row[0]) is int) else list(map(int, row))
        for row in ids
    ]
