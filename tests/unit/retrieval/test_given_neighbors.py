"""Neighbors that the caller gives."""

import numpy as np
import pytest

from retro_mcore.errors import ShapeError
from retro_mcore.retrieval.neighbors import CompletedChunk, GivenNeighbors, RetrievedNeighbors


def retrieved(num_chunks: int, num_neighbors: int = 2, length: int = 4) -> RetrievedNeighbors:
    shape = (num_chunks, num_neighbors, length)
    return RetrievedNeighbors(np.arange(np.prod(shape)).reshape(shape), np.zeros(shape, bool))


def test_given_neighbors_answer_by_prompt_and_chunk_and_mask_the_rest():
    given = retrieved(2)
    source = GivenNeighbors({1: given}, num_neighbors=2, retrieved_length=4, pad_id=9)
    answer = source.neighbors_of(
        [CompletedChunk(1, 1, []), CompletedChunk(0, 0, []), CompletedChunk(1, 2, [])]
    )
    np.testing.assert_array_equal(answer.tokens[0], given.tokens[1])
    assert not answer.mask[0].any()
    assert (answer.tokens[1:] == 9).all()
    assert answer.mask[1:].all()


def test_neighbors_of_another_shape_are_refused_by_prompt():
    with pytest.raises(ShapeError, match=r"neighbors of prompt 3: .*\[2, 4\].*\[2, 8\]"):
        GivenNeighbors({3: retrieved(1)}, num_neighbors=2, retrieved_length=8, pad_id=0)


def test_tokens_and_mask_must_fit():
    with pytest.raises(ShapeError, match="Both are"):
        RetrievedNeighbors(np.zeros((1, 2, 3), np.int64), np.zeros((1, 2, 4), bool))


def test_one_chunk_of_many():
    many = RetrievedNeighbors(
        retrieved(3).tokens,
        retrieved(3).mask,
        ids=np.arange(6).reshape(3, 2),
        distances=np.arange(6, dtype=np.float32).reshape(3, 2),
    )
    one = many.chunk(1)
    assert len(one) == 1
    assert one.ids.tolist() == [[2, 3]]
    np.testing.assert_array_equal(one.tokens[0], many.tokens[1])


def test_chunks_of_several_texts_are_packed_text_by_text_and_the_rest_is_masked():
    found = retrieved(3)
    texts = [[found.chunk(0), found.chunk(1)], [], [found.chunk(2)]]
    packed = RetrievedNeighbors.pack(texts, num_chunks=2, pad_id=9)
    np.testing.assert_array_equal(packed.tokens[[0, 1, 4]], found.tokens)
    assert packed.mask.all(axis=(1, 2)).tolist() == [False, False, True, True, False, True]
    assert (packed.tokens[[2, 3, 5]] == 9).all()
