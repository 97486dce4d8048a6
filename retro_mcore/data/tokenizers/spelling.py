"""Encode special-token names that occur in a text as ordinary tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

#: The space symbol in SentencePiece vocabularies.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class Speller:
    """Replaces special tokens in encoded text with ordinary tokens of the same text.

    Args:
        forbidden: Text of each token to replace, by id.
        id_of: Id of an ordinary token; None if there is no such token.
        byte_level: Whether tokens are spelled in GPT-2's byte-to-letter alphabet.
        unknown: Token for characters that have no token.
    """

    def __init__(
        self,
        forbidden: Mapping[int, str],
        id_of: Callable[[str], int | None],
        byte_level: bool = False,
        unknown: int | None = None,
    ) -> None:
        self._texts = dict(forbidden)
        self._ids = frozenset(self._texts)
        self._id_of, self._byte_level, self._unknown = id_of, byte_level, unknown
        self._spelled: dict[int, list[int]] = {}

    def spell(self, row: list[int]) -> list[int]:
        """`row` without the forbidden ids."""
        if self._ids.isdisjoint(row):
            return row
        return [each for token in row for each in self._of(token)]

    def _of(self, token: int) -> Sequence[int]:
        if token not in self._ids:
            return (token,)
        if token not in self._spelled:
            self._spelled[token] = self._write(self._texts[token])
        return self._spelled[token]

    def _write(self, text: str) -> list[int]:
        """Encode greedily with the longest ordinary tokens, then with byte tokens."""
        letters = _byte_letters(text) if self._byte_level else text.replace(" ", SPACE)
        ids: list[int] = []
        while letters:
            for length in range(len(letters), 0, -1):
                found = self._ordinary(letters[:length])
                if found is not None:
                    ids.append(found)
                    break
            else:
                length = 1
                ids += self._bytes(letters[0])
            letters = letters[length:]
        return ids

    def _bytes(self, letter: str) -> list[int]:
        ids = [self._ordinary(f"<0x{byte:02X}>") for byte in letter.encode()]
        if None not in ids:
            return [each for each in ids if each is not None]
        return [] if self._unknown is None else [self._unknown]

    def _ordinary(self, token: str) -> int | None:
        found = self._id_of(token)
        return None if found in self._ids else found


def _byte_letters(text: str) -> str:
    """The text's bytes in GPT-2's byte-to-letter alphabet."""
    return "".join(_BYTE_LETTERS[byte] for byte in text.encode())


def _letters_of_bytes() -> list[str]:
    """Printable bytes are their own letters; the others follow from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


_BYTE_LETTERS = _letters_of_bytes()
