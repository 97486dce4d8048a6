"""Rows of instruction tuning: a blend of datasets, one example in each row or several packed.

Shapes: S sequence, L chunks per row, K neighbors, R retrieved length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from retro_mcore.data.instruction.examples import InstructionExample
from retro_mcore.data.instruction.samples import (
    EncodedExample,
    InstructionFormat,
    answer_of,
    encode_example,
)
from retro_mcore.data.retrieved import missing_neighbors
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.errors import ConfigurationError, CorpusError


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
    ) -> None:
        for place, examples in enumerate(datasets):
            if not examples:
                raise CorpusError(f"dataset {place}", "has no examples", "Check the files")
            for example in examples:
                answer_of(example)
        self._datasets, self._format, self._tokenizer = datasets, format, tokenizer
        self._seed, self._num_samples, self._packed = seed, num_samples, pack
        # With an encoder, each example of a packed row must begin at a chunk boundary.
        self._step = format.chunk_length if format.num_encoder_passages else 1
        self._weights = weights
        self._blend = blended_order(weights, num_samples)
        self._rows = self._pack() if pack else np.arange(num_samples + 1)

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
        return _lay_out(
            self._encoded(index), self._format, self._tokenizer.eod, self._step, self._packed
        )

    def examples_read(self, dataset: int) -> Iterator[InstructionExample]:
        """Examples of a dataset that occur in any row, each once."""
        num_read = np.count_nonzero(self._blend[0][: self._rows[-1]] == dataset)
        for number in range(min(int(num_read), len(self._datasets[dataset]))):
            yield self._example(dataset, number)

    @property
    def format(self) -> InstructionFormat:
        """The format of the examples."""
        return self._format

    def _encoded(self, row: int) -> list[EncodedExample]:
        return [self._encode(place) for place in range(self._rows[row], self._rows[row + 1])]

    def _encode(self, place: int) -> EncodedExample:
        dataset, number = (int(order[place]) for order in self._blend)
        return encode_example(self._example(dataset, number), self._format, self._tokenizer)

    def _example(self, dataset: int, number: int) -> InstructionExample:
        examples = self._datasets[dataset]
        epoch, place = divmod(number, len(examples))
        return examples[int(_permutation(self._seed, dataset, epoch, len(examples))[place])]

    def _pack(self) -> np.ndarray:
        """Start of each row in the blend, i64 [rows + 1], by next-fit packing in blend order."""
        starts, used, place = [0], 0, 0
        while len(starts) <= self._num_samples:
            if place == len(self._blend[0]):
                self._blend = blended_order(self._weights, 2 * place)
            size = len(self._encode(place).tokens)
            if used + size > self._format.sequence_length + 1:
                starts.append(place)
                used = 0
            used += _in_steps(size, self._step)
            place += 1
        return np.array(starts)


def _in_steps(size: int, step: int) -> int:
    return -(-size // step) * step


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
        start += _in_steps(len(example.tokens), step)
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
