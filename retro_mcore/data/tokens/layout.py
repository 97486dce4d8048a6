"""Layout of documents in an indexed dataset: padded to whole chunks, or not.

A padded document is its text, EOD, and more EODs up to a multiple of M tokens. Its text holds no
EOD, so within a chunk everything after the first EOD is padding; see `chunking.padding_mask`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokens.token_file import TokenSource
from retro_mcore.errors import TokenizerError

#: Tokens read in one call.
_BATCH = 1 << 20


@dataclass(frozen=True)
class DocumentLayout:
    """How documents are laid out.

    Attributes:
        multiple: Documents are padded to a multiple of this number of tokens; 1: not padded.
        eod: Id of the end-of-document token, which is also the padding.
    """

    multiple: int
    eod: int

    def check_bos(self, tokenizer: Tokenizer) -> None:
        """Reject a BOS that cannot be told from EOD.

        Raises:
            TokenizerError: padded documents would begin with EOD.
        """
        if self.multiple > 1 and tokenizer.adds_bos and tokenizer.bos == self.eod:
            raise TokenizerError(
                "--samples aligned",
                f"documents begin with the token that ends them ({self.eod})",
                "Add --add-bos-token False, name another --eod-token, or use --samples packed",
            )

    def lay(
        self, documents: Iterable[np.ndarray], source: Path, counts: Counter[str]
    ) -> Iterator[np.ndarray]:
        """Pad documents that end with EOD.

        Args:
            documents: Tokens of each document.
            source: Where they are from, for error messages.
            counts: Gets the number of `padding_tokens`.

        Raises:
            TokenizerError: a text holds EOD.
        """
        if self.multiple == 1:
            yield from documents
            return
        for number, document in enumerate(documents):
            if (document[:-1] == self.eod).any():
                raise self._has_end(source, number)
            padding = -len(document) % self.multiple
            counts["padding_tokens"] += padding
            yield np.concatenate([document, np.full(padding, self.eod, document.dtype)])

    def cut(
        self, documents: Iterable[np.ndarray], source: Path, counts: Counter[str]
    ) -> Iterator[np.ndarray]:
        """Drop the EODs that follow the first of a document, such as padding.

        Args:
            documents: Tokens of each document, with EOD at the end.
            source: Where they are from, for error messages.
            counts: Gets the numbers of `repeated_eods_dropped` and `documents_without_text`.

        Raises:
            TokenizerError: a text holds EOD.
        """
        for number, document in enumerate(documents):
            length = int(np.argmax(document == self.eod)) + 1
            if (document[length:] != self.eod).any():
                raise self._has_end(source, number)
            counts["repeated_eods_dropped"] += len(document) - length
            counts["documents_without_text"] += length == 1
            yield document[:length]

    def _has_end(self, source: Path, number: int) -> TokenizerError:
        return TokenizerError(
            source,
            f"document {number} holds the end-of-document token ({self.eod}) before its end",
            "Name an --eod-token that no text holds, or use --samples packed",
        )


def is_padded(source: TokenSource, eod: int) -> bool:
    """Whether a dataset looks like an aligned project's: documents fill whole chunks with EODs.

    Args:
        source: A dataset of documents that end with EOD.
        eod: Id of the end-of-document token.
    """
    last = source.starts + source.lengths - 1
    repeated = (source.lengths > 1) & (source.tokens[np.maximum(last - 1, 0)] == eod)
    multiple = int(np.gcd.reduce(source.lengths))
    if multiple == 1 or not repeated.any():
        return False
    batches = range(0, len(source.tokens), _BATCH)
    all_ends = sum(np.count_nonzero(source.tokens[i : i + _BATCH] == eod) for i in batches)
    # Equal if no document holds EOD before its end.
    return bool(all_ends == ends_and_padding(source, 0, len(last), multiple, eod).sum())


def ends_and_padding(
    source: TokenSource, start: int, end: int, chunk_length: int, eod: int
) -> np.ndarray:
    """Number of EODs at the end of documents [start, end), padding included, i64 [documents].

    Args:
        source: A dataset of padded documents, or of documents that end with one EOD.
        start: First document.
        end: Document after the last.
        chunk_length: M, which padded documents are a multiple of.
        eod: Id of the end-of-document token.
    """
    step = max(1, _BATCH // chunk_length)
    blocks = range(start, end, step)
    found = [
        _trailing(source, first, min(first + step, end), chunk_length, eod) for first in blocks
    ]
    return np.concatenate([np.empty(0, np.int64), *found])


def _trailing(source: TokenSource, start: int, end: int, chunk_length: int, eod: int) -> np.ndarray:
    """As `ends_and_padding`, in one call: at most the last M tokens are EOD."""
    starts = source.starts[start:end]
    ends = starts + source.lengths[start:end]
    place = ends[:, None] - np.arange(1, chunk_length + 1)
    is_end = source.tokens[np.maximum(place, 0)] == eod
    is_other = ~is_end | (place < starts[:, None])
    return np.where(is_other.any(1), is_other.argmax(1), chunk_length)
