"""Measure how often a split's samples repeat the same tokens.

If a split has too few tokens for the requested samples, Megatron adds further epochs of its
documents in new orders. A loss over such samples measures few texts many times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: A piece of a document: corpus, document, first token, token after the last.
Piece = tuple[int, int, int, int]


@dataclass(frozen=True)
class DistinctText:
    """Amount of distinct text in samples.

    Attributes:
        num_documents: Number of documents in the samples.
        num_tokens: Number of distinct predicted tokens.
    """

    num_documents: int
    num_tokens: int


def distinct_text(samples: Any, num_samples: int) -> DistinctText:
    """Measure the distinct text that the first samples of a split predict.

    Args:
        samples: A split's `GPTSamples`.
        num_samples: Number of samples.
    """
    pieces = [piece for index in range(num_samples) for piece in _predicted(samples, index)]
    return DistinctText(len({piece[:2] for piece in pieces}), _num_distinct(pieces))


def _predicted(samples: Any, index: int) -> Iterator[Piece]:
    """Pieces of documents whose prediction counts."""
    for corpus, document, begin, end in _pieces(samples.blended, index):
        if samples.padding is not None:
            tokens = samples.blended.datasets[corpus].dataset
            first, stop = samples.padding.predicted(tokens, document)
            begin, end = max(begin, first), min(end, stop)
        if begin < end:
            yield corpus, document, begin, end


def _pieces(blended: Any, index: int) -> Iterator[Piece]:
    """Pieces of documents that a sample predicts: all but its first token."""
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
    """Number of tokens in the union of the pieces."""
    count, reached, of = 0, 0, (-1, -1)
    for corpus, document, begin, end in sorted(pieces):
        if (corpus, document) != of:
            of, reached = (corpus, document), 0
        count += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return count
