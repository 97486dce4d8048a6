"""How often a split's samples hold the same tokens.

Megatron fills a split of fewer tokens than samples were asked for with further epochs of its
documents, each in another order. A loss over such samples is a loss over few texts, read often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: A piece of a document: corpus, document, first token, token after the last.
Piece = tuple[int, int, int, int]


@dataclass(frozen=True)
class DistinctText:
    """The text that samples are made of.

    Attributes:
        num_documents: Documents that they are cut from.
        num_tokens: Tokens that are predicted, each counted once however often it is read.
    """

    num_documents: int
    num_tokens: int


def distinct_text(samples: Any, num_samples: int) -> DistinctText:
    """The text that the first samples of a split predict.

    Args:
        samples: A split's `GPTSamples`.
        num_samples: How many of them.
    """
    pieces = [piece for index in range(num_samples) for piece in _pieces(samples.blended, index)]
    return DistinctText(len({piece[:2] for piece in pieces}), _num_distinct(pieces))


def _pieces(blended: Any, index: int) -> Iterator[Piece]:
    """The pieces of documents that a sample predicts: all of it but its first token."""
    corpus = int(blended.dataset_index[index])
    dataset = blended.datasets[corpus]
    number = int(blended.dataset_sample_index[index])
    place = int(dataset.shuffle_index[number])
    (first, start), (last, stop) = dataset.sample_index[place], dataset.sample_index[place + 1]
    for entry in range(int(first), int(last) + 1):
        document = int(dataset.document_index[entry])
        length = int(dataset.dataset.sequence_lengths[document])
        begin = int(start) + 1 if entry == first else 0
        end = min(int(stop) + 1, length) if entry == last else length
        if begin < end:
            yield corpus, document, begin, end


def _num_distinct(pieces: Sequence[Piece]) -> int:
    """Tokens of the union of the pieces."""
    count, reached, of = 0, 0, (-1, -1)
    for corpus, document, begin, end in sorted(pieces):
        if (corpus, document) != of:
            of, reached = (corpus, document), 0
        count += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return count
