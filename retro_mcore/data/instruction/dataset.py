"""Rows of instruction tuning: a blend of datasets, one example in each row or several packed.

Shapes: S sequence, L chunks per row, K neighbors, R retrieved length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, count
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from retro_mcore.data.instruction.examples import InstructionExample
from retro_mcore.data.instruction.packing import in_steps, pack
from retro_mcore.data.instruction.samples import (
    EncodedExample,
    InstructionFormat,
    answer_of,
    encode_example,
)
from retro_mcore.data.retrieved import missing_neighbors
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.errors import ConfigurationError, CorpusError

#: Counts of packed rows: of rows, of their examples, and of the tokens with and without text. A row
#: has S + 1 tokens, of which the last one is only a label.
PACKED = ("packed_samples", "packed_examples", "packed_tokens", "padding_tokens")


class InstructionDataset(Dataset):
    """A blend of datasets, with one example per row, or several packed into a row.

    The content of row i depends only on the arguments, so a position in the data is one number for
    any number of workers and ranks. Each dataset is shuffled anew in every epoch. Datasets are
    interleaved by weight, as in Megatron's blended datasets.

    Args:
        datasets: Examples of each dataset.
        weights: Sampling weight of each dataset, relative to the others.
        num_samples: Number of rows.
        format: Prompt wording, lengths and passages.
        tokenizer: The model's tokenizer.
        seed: Seed of the shuffling.
        pack: Pack as many examples into a row as fit; they do not attend to each other.
        num_open: Number of rows that packing fills at the same time (`packing.pack`).

    Raises:
        CorpusError: a dataset is empty, or an example has no answer.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[InstructionExample]],
        weights: Sequence[float],
        num_samples: int,
        format: InstructionFormat,
        tokenizer: Tokenizer,
        seed: int = 1234,
        pack: bool = False,
        num_open: int = 1,
    ) -> None:
        for place, examples in enumerate(datasets):
            if not examples:
                raise CorpusError(f"dataset {place}", "has no examples", "Check the files")
            for example in examples:
                answer_of(example)
        self._datasets, self._format, self._tokenizer = datasets, format, tokenizer
        self._seed, self._num_samples = seed, num_samples
        # With an encoder, each example of a packed row must begin at a chunk boundary.
        self._step = format.chunk_length if format.num_encoder_passages else 1
        self._weights = weights
        self._blend = blended_order(weights, num_samples)
        self._packed: list[list[int]] | None = None
        #: Counts of `PACKED`, if rows are packed.
        self.packing: dict[str, int] | None = None
        if pack:
            self._pack(num_open)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one row.

        Returns:
            text: i64 [S+1]; the end of document fills the rest.
            loss_mask: f32 [S], 1 where the label is learned.
            segments: i64 [S], the example that each token belongs to; only for packed rows.
            neighbor_tokens: i64 [L, K, R] and neighbor_mask: bool [L, K, R]; only with encoder
                passages. Every chunk of an example has the example's passages.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        places = [index] if self._packed is None else self._packed[index]
        return _lay_out(
            [self._encode(place) for place in places],
            self._format,
            self._tokenizer.eod,
            self._step,
            self._packed is not None,
        )

    def examples_read(self, dataset: int) -> Iterator[InstructionExample]:
        """Examples of a dataset that occur in any row, each once."""
        packed = self._packed
        places = range(self._num_samples) if packed is None else [*chain.from_iterable(packed)]
        datasets, numbers = (order[places] for order in self._blend)
        size = len(self._datasets[dataset])
        epochs, offsets = np.divmod(numbers[datasets == dataset], size)
        read: set[int] = set()
        for epoch in np.unique(epochs):
            if len(read) == size:
                break
            order = _permutation(self._seed, dataset, int(epoch), size)
            read.update(order[offsets[epochs == epoch]].tolist())
        for index in sorted(read):
            yield self._datasets[dataset][index]

    @property
    def format(self) -> InstructionFormat:
        """The format of the examples."""
        return self._format

    def _encode(self, place: int) -> EncodedExample:
        dataset, number = (int(order[place]) for order in self._blend)
        return encode_example(self._example(dataset, number), self._format, self._tokenizer)

    def _example(self, dataset: int, number: int) -> InstructionExample:
        return self._datasets[dataset][self._index(dataset, number)]

    def _index(self, dataset: int, number: int) -> int:
        """Index of the example that is read as a dataset's `number`-th one."""
        size = len(self._datasets[dataset])
        epoch, place = divmod(number, size)
        return int(_permutation(self._seed, dataset, epoch, size)[place])

    def _pack(self, num_open: int) -> None:
        sizes: list[int] = []
        room = self._format.sequence_length + 1
        rows = pack(self._sizes(sizes), self._num_samples, room, self._step, num_open)
        places = [*chain.from_iterable(rows)]
        tokens = sum(sizes[place] for place in places)
        counts = (len(rows), len(places), tokens, len(rows) * room - tokens)
        self._packed, self.packing = rows, dict(zip(PACKED, counts, strict=True))

    def _sizes(self, read: list[int]) -> Iterator[int]:
        """Number of tokens of each example in blend order, without end; also kept in `read`."""
        known: dict[tuple[int, int], int] = {}
        for place in count():
            if place == len(self._blend[0]):
                self._blend = blended_order(self._weights, max(1, 2 * place))
            dataset, number = (int(order[place]) for order in self._blend)
            example = dataset, self._index(dataset, number)
            if example not in known:
                known[example] = len(self._encode(place).tokens)
            read.append(known[example])
            yield known[example]


@lru_cache(maxsize=64)
def _permutation(seed: int, dataset: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, dataset, epoch)).permutation(size)


def blended_order(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Dataset i16 [n] and sample of that dataset i64 [n] at each position of a blend.

    Raises:
        ConfigurationError: a weight is not positive.
    """
    if not weights or min(weights) <= 0:
        raise ConfigurationError("--data-path", f"weights {list(weights)}", "Give positive weights")
    from megatron.core.datasets import helpers

    shares = np.array(weights, np.float64) / sum(weights)
    datasets = np.zeros(num_samples, np.int16)
    samples = np.zeros(num_samples, np.int64)
    helpers.build_blending_indices(datasets, samples, shares, len(weights), num_samples, False)
    return datasets, samples


def _lay_out(
    encoded: Sequence[EncodedExample],
    format: InstructionFormat,
    eod: int,
    step: int = 1,
    packed: bool = False,
) -> dict[str, Any]:
    """Place examples side by side in a row, each starting at a multiple of `step` tokens."""
    length = format.sequence_length
    text = np.full(length + 1, eod, np.int64)
    trained = np.zeros(length + 1, bool)
    segments = np.full(length, -1, np.int64)
    start = 0
    for number, example in enumerate(encoded):
        end = start + len(example.tokens)
        text[start:end], trained[start:end] = example.tokens, example.trained
        trained[start] = False  # the previous example must not predict it
        segments[start:end] = number
        start += in_steps(len(example.tokens), step)
    row: dict[str, Any] = {"text": text, "loss_mask": trained[1:].astype(np.float32)}
    if packed:
        row["segments"] = segments
    if format.num_encoder_passages:
        row |= _passages_by_chunk(encoded, segments, format, eod)
    return row


def _passages_by_chunk(
    encoded: Sequence[EncodedExample], segments: np.ndarray, format: InstructionFormat, eod: int
) -> dict[str, np.ndarray]:
    shape_LKR = (
        format.sequence_length // format.chunk_length,
        format.num_encoder_passages,
        format.retrieved_length,
    )
    tokens_LKR, mask_LKR = missing_neighbors(shape_LKR, eod)
    for chunk in range(shape_LKR[0]):
        # A chunk's neighbors are attended from its last token to the next chunk's last but one.
        readers = segments[(chunk + 1) * format.chunk_length - 1 :][: format.chunk_length]
        owner = segments[chunk * format.chunk_length]
        if owner >= 0 and set(readers) <= {owner, -1}:
            tokens_LKR[chunk] = encoded[owner].passages
            mask_LKR[chunk] = encoded[owner].passage_mask
    return {"neighbor_tokens": tokens_LKR, "neighbor_mask": mask_LKR}
