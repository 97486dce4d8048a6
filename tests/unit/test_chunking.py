"""Chunk arithmetic against the paper's definition, position by position."""

from __future__ import annotations

import pytest

from retro_mcore.chunking import ChunkGrid, chunks_per_sample
from retro_mcore.errors import ConfigurationError


@pytest.mark.parametrize("chunk_length", [1, 3, 8])
@pytest.mark.parametrize("sequence_length", range(1, 26))
def test_left_aligned(sequence_length, chunk_length):
    grid = ChunkGrid(sequence_length, chunk_length)
    for position in range(sequence_length):
        complete = (position + 1) // chunk_length  # chunks whose last token has been read
        assert grid.attended_chunk(position) == (complete - 1 if complete else None)
    assert grid.num_chunks == sequence_length // chunk_length


@pytest.mark.parametrize("chunk_length", [1, 3, 8])
@pytest.mark.parametrize("sequence_length", range(1, 26))
def test_right_aligned_ends_with_a_whole_chunk(sequence_length, chunk_length):
    grid = ChunkGrid(sequence_length, chunk_length, "right")
    last = sequence_length - 1
    assert grid.attended_chunk(last) == grid.num_chunks - 1
    assert grid.first_chunk_length + (grid.num_chunks - 1) * chunk_length == sequence_length
    attended = [grid.attended_chunk(position) for position in range(sequence_length)]
    assert attended[: grid.first_attending] == [None] * grid.first_attending
    assert attended[grid.first_attending] == 0


def test_a_prefix_has_the_grid_of_the_whole():
    whole = ChunkGrid(24, 8)
    for length in range(1, 24):
        prefix = ChunkGrid(length, 8)
        for position in range(length):
            assert prefix.attended_chunk(position) == whole.attended_chunk(position)


def test_training_samples_hold_whole_chunks():
    assert chunks_per_sample(512, 64) == 8
    for sequence_length, chunk_length in [(510, 64), (0, 64), (64, 0), (-64, 64)]:
        with pytest.raises(ConfigurationError, match="seq-length"):
            chunks_per_sample(sequence_length, chunk_length)
