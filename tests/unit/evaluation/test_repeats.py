"""A split of fewer tokens than its samples hold is read again and again, which must be said.

Who tries the product on a handful of documents would meet it.
"""

from __future__ import annotations

import numpy as np
import pytest

from retro_mcore.evaluation.repeats import distinct_text


class Blended:
    """Samples of S tokens cut from epochs of documents, as Megatron's datasets hold them."""

    def __init__(self, lengths, num_epochs, sequence_length, seed=0):
        self.generator = np.random.default_rng(seed)
        self.dataset, self.datasets = self, [self]
        self.sequence_lengths = np.array(lengths)
        orders = [self.generator.permutation(len(lengths)) for _ in range(num_epochs)]
        self.document_index = np.concatenate(orders)
        ends = np.cumsum(self.sequence_lengths[self.document_index])
        num_samples = (int(ends[-1]) - 1) // sequence_length
        starts = np.arange(num_samples + 1) * sequence_length
        entries = np.searchsorted(ends, starts, side="right")
        offsets = starts - (ends - self.sequence_lengths[self.document_index])[entries]
        self.sample_index = np.stack([entries, offsets], 1)
        self.shuffle_index = self.generator.permutation(num_samples)
        self.dataset_index = np.zeros(num_samples, np.int16)
        self.dataset_sample_index = self.generator.permutation(num_samples)
        self.blended = self
        self.padding = None
        self.sequence_length = sequence_length

    def __len__(self):
        return len(self.shuffle_index)

    def __getitem__(self, index):
        return {"dataset_id": 0}

    def predicted(self, index):
        """(document, position) of each label, one by one."""
        place = self.shuffle_index[self.dataset_sample_index[index]]
        entry, offset = (int(value) for value in self.sample_index[place])
        found = []
        for _ in range(self.sequence_length):
            offset += 1
            if offset == self.sequence_lengths[self.document_index[entry]]:
                entry, offset = entry + 1, 0
            found.append((int(self.document_index[entry]), offset))
        return found


@pytest.mark.parametrize(
    ("lengths", "num_epochs", "sequence_length"),
    [([9, 8], 30, 64), ([1000], 1, 64), ([1000, 500], 3, 64), ([5, 3, 70, 1, 1], 9, 32)],
)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_distinct_tokens_are_those_that_are_predicted_at_all(
    lengths, num_epochs, sequence_length, share
):
    samples = Blended(lengths, num_epochs, sequence_length)
    num_samples = max(1, int(share * len(samples)))
    predicted = {found for i in range(num_samples) for found in samples.predicted(i)}
    text = distinct_text(samples, num_samples)
    assert text.num_tokens == len(predicted)
    assert text.num_documents == len({document for document, _ in predicted})
    assert text.num_tokens <= sum(lengths)
