"""Tokenizers shared by the database, the datasets and generation; independent of megatron.

Their `unique_identifiers` match those of Megatron's legacy tokenizers, because the names of the
neighbor directories are a hash of them.

Text never becomes a special token: a special token's name in a text is encoded as ordinary tokens.
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
    """Converts text to token ids and back.

    Attributes:
        name: The value of `--tokenizer-type` and of `retro_gpt_tokenizer_type`.
        files: Files it was loaded from, in the order of Megatron's constructor arguments.
        unique_identifiers: Class, paths and options, as Megatron's legacy tokenizer records them.
        eod: Id of the end-of-document token.
        bos: Id of the beginning-of-sequence token; None if there is none.
        adds_bos: Whether documents and prompts begin with `bos`; see `with_bos`.
        pad: Id of the padding token; None if there is none.
        end_tokens: Tokens that end a generated text besides `eod`, as the loaded model's checkpoint
            records them.
    """

    name: ClassVar[str]
    _options: ClassVar[dict[str, str]] = {}
    eod: int
    bos: int | None = None
    adds_bos: bool = False
    pad: int | None = None
    end_tokens: tuple[int, ...] = ()
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
        """Number of token ids, without unused special tokens at the end."""

    @abstractmethod
    def token_name(self, token: int) -> str:
        """The token as spelled in the vocabulary, also for special tokens."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, as returned by the underlying library."""

    @abstractmethod
    def _decode(self, rows: list[list[int]]) -> list[str]:
        """Text of each sequence of ids, as returned by the underlying library."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens.

        Lone surrogates that stand for UTF-8 bytes are decoded; they occur in the arguments of a
        process with an ASCII locale. Other lone surrogates become U+FFFD.
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
        """Text of each sequence of ids, without a leading BOS.

        If BOS and EOD are one token, it counts as BOS only where documents begin with BOS.
        Otherwise it ends the previous document, and is decoded as it is elsewhere in the sequence.
        """
        if not len(ids):
            return []
        rows = _plain(ids)
        if self.adds_bos or self.bos not in (None, self.eod):
            rows = [row[1:] if row and row[0] == self.bos else row for row in rows]
        return self._decode(rows)

    def count_losses(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> dict[str, int]:
        """Count characters that tokenization loses, by comparing each text with its decoded tokens.

        `preprocess_corpus` sums the counts, and reports and records those that are not 0.

        Returns:
            Counts by name: `texts_changed_by_tokenizer`, and numbers of characters in
            `removed_newlines`, `removed_spaces` (other white space), `changed_characters` and
            `added_characters` (by how much the text became longer).
        """
        counts: Counter[str] = Counter()
        for text, back in zip(texts, self.detokenize_batch(ids), strict=True):
            if text != back:
                counts.update(_differences(text, back))
        return dict(counts)

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self.tokenize_batch([text])[0]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return self.detokenize_batch([ids])[0]

    @property
    def special_names(self) -> tuple[str, ...]:
        """Names of the special tokens that `tokenize_with_special` finds in a text."""
        return ()

    def tokenize_with_special(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens stand for these tokens.

        For prompts that a chat template writes. Other texts are never read this way.
        """
        return self.tokenize(text)

    @property
    def beginning(self) -> list[int]:
        """Tokens that every document and prompt begins with: BOS, or none."""
        return [self.bos] if self.adds_bos and self.bos is not None else []

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """`ids` with exactly one leading BOS, if documents begin with BOS; else unchanged."""
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
            choice: The requested special tokens.
            declared: The special tokens declared by the files of the directory.
            vocabulary: The tokenizer's tokens.
            prefix: Tokens that the tokenizer itself adds before a text.
            suffix: Tokens that the tokenizer itself adds after a text.
        """
        choice = choice or SpecialTokenChoice()
        first = prefix[0] if len(prefix) == 1 else None
        self.eod = choose_eod(choice, declared, vocabulary)
        # [CLS] … [SEP] are not BOS and EOD.
        self.bos = choose_bos(choice, declared, vocabulary, None if len(suffix) else first)
        self.adds_bos = adds_bos(choice, declared, self.bos, first)

    def _refuse_unknown(self, file: Path, unknown: int | None) -> None:
        """Reject an EOD or BOS that is also the unknown token.

        A tokenizer that can encode every character never produces the unknown token.
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
        """EOD and BOS, which text is never encoded as."""
        return {self.eod} if self.bos is None else {self.eod, self.bos}


#: Common and rare characters of every length in UTF-8.
_PROBES = ["".join(map(chr, range(0x20, 0x800))), "漢", "\ue000", "\U0001f389", "\U0010fffd"]


def _differences(text: str, back: str) -> dict[str, int]:
    """Count the characters in which a text differs from its decoded tokens."""
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
    """Convert rows to Python integers, the only kind that the Rust and C++ libraries accept."""
    return [
        row if type(row) is list and (not row or type(row[0]) is int) else list(map(int, row))
        for row in ids
    ]
