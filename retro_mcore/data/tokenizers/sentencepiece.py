"""SentencePiece models."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokenizers.special_tokens import (
    DeclaredTokens,
    SpecialTokenChoice,
    Vocabulary,
)
from retro_mcore.data.tokenizers.spelling import SPACE, Speller
from retro_mcore.errors import TokenizerError

#: User-defined symbols that look like markup (<sep>, <|user|>, [INST]). Others are ordinary text.
_MARKUP = re.compile(r"<[^<>\s]+>|\[/?[A-Z][A-Z0-9_]*\]")


class GPTSentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. </s> ends a document unless the model's directory declares another.

    Encoding is lossless for models without normalization and with byte fallback, such as those of
    `train_sentencepiece`. SentencePiece's space symbol in a text is then encoded as bytes.
    """

    name = "GPTSentencePieceTokenizer"
    _options: ClassVar[dict[str, str]] = {"vocab_extra_ids": "0"}

    def __init__(self, model: Path | str, choice: SpecialTokenChoice | None = None) -> None:
        super().__init__(model)
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(
                model, "not a SentencePiece model", "Name a .model file of SentencePiece"
            ) from error
        self.pad = _id_or_none(self._processor.pad_id())
        declared = DeclaredTokens.read(Path(model).parent)
        special = self._special_pieces(declared)
        vocabulary = Vocabulary(
            Path(model),
            self._id_of,
            self.vocab_size,
            {each: self.token_name(each) for each in sorted(special)},
            _id_or_none(self._processor.eos_id()),
            _id_or_none(self._processor.bos_id()),
        )
        # The model said which token it is in every version.
        choice = dataclasses.replace(choice or SpecialTokenChoice(), first_known_eod=False)
        self._choose(choice, declared, vocabulary)
        special |= self._ends()
        self._used = 1 + max(set(range(self.vocab_size)) - special | self._ends())
        self._speller = Speller(
            {each: self.token_name(each) for each in special},
            self._id_of,
            unknown=_id_or_none(self._processor.unk_id()),
        )
        self._space = self._bytes_of_space()
        self._refuse_unknown(Path(model), _id_or_none(self._processor.unk_id()))

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def used_vocab_size(self) -> int:
        return self._used

    def token_name(self, token: int) -> str:
        return str(self._processor.id_to_piece(token))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._space and any(SPACE in text for text in texts):
            return [self._encode_around_spaces(text) for text in texts]
        return self._processor.encode(texts, num_threads=1)

    def _encode_around_spaces(self, text: str) -> list[int]:
        first, *others = self._processor.encode(text.split(SPACE), num_threads=1)
        return [*first, *(each for part in others for each in (*self._space, *part))]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self._processor.decode(rows, num_threads=1)

    def _id_of(self, piece: str) -> int | None:
        """Id of a piece; None if absent, where SentencePiece returns the unknown piece."""
        found = int(self._processor.piece_to_id(piece))
        is_other = self._processor.is_unknown(found) or self._processor.is_unused(found)
        return None if is_other else found

    def _special_pieces(self, declared: DeclaredTokens) -> set[int]:
        """Control pieces, and user-defined pieces that are declared special or look like markup."""
        processor, found = self._processor, set()
        for each in range(self.vocab_size):
            if processor.is_control(each):
                found.add(each)
            elif processor.get_score(each) == 0:  # user-defined, or the first of a BPE model
                piece = processor.id_to_piece(each)
                is_markup = _MARKUP.fullmatch(piece) and not _BYTE.fullmatch(piece)
                if piece in declared.special or (is_markup and piece not in declared.not_special):
                    found.add(each)
        return found - {processor.unk_id()}

    def _bytes_of_space(self) -> list[int]:
        """Byte tokens of SentencePiece's space symbol, if a text can be split around it."""
        probe = "  a\n\tb\u2003 \ufb01 "
        ids = [self._id_of(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        pieces = self._processor.encode(["a", probe], num_threads=1)
        whole = self._processor.decode(pieces, num_threads=1) == ["a", probe]
        known = [each for each in ids if each is not None]
        prefixed = self._processor.id_to_piece(pieces[0][0]).startswith(SPACE)
        return known if whole and len(known) == len(ids) and not prefixed else []


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _id_or_none(token_id: int) -> int | None:
    return int(token_id) if token_id >= 0 else None
