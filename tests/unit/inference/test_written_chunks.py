"""Chunks with the neighbors they were written with, and what is copied from these."""

from __future__ import annotations

import numpy as np

from retro_mcore.inference.texts import GeneratedText
from retro_mcore.retrieval.neighbors import RetrievedNeighbors
from retro_mcore.session.written_chunks import written_chunks

#: Chunks 0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12; the prompt ends with 5.
TOKENS = list(range(13))


def neighbors(*rows: list[int], length: int = 8) -> RetrievedNeighbors:
    """Neighbors of one chunk (N = 1), padded with masked zeros."""
    tokens = np.array([row + [0] * (length - len(row)) for row in rows])
    mask = np.array([[False] * len(row) + [True] * (length - len(row)) for row in rows])
    return RetrievedNeighbors(tokens[None], mask[None])


def chunks_of(found, **kwargs):
    text = GeneratedText(TOKENS, kwargs.pop("prompt_length", 6), found, **kwargs)
    return list(written_chunks(text, 4, None))


def test_each_chunk_has_the_neighbors_of_the_chunk_before():
    found = [neighbors([50, row]) for row in range(3)]
    chunks = chunks_of(found)
    assert [chunk.tokens.tolist() for chunk in chunks] == [TOKENS[i : i + 4] for i in (0, 4, 8, 12)]
    assert [chunk.num_prompt for chunk in chunks] == [4, 2, 0, 0]
    assert [[n.tokens.tolist() for n in chunk.neighbors] for chunk in chunks] == [
        [], [[50, 0]], [[50, 1]], [[50, 2]]
    ]  # fmt: skip


def test_generated_runs_are_copied_from_the_neighbor_with_the_longest():
    found = [
        neighbors([4, 5, 6, 7], [60]),  # two of this run are the prompt's
        neighbors([8, 9, 10, 70], [71, 8, 9, 10, 11]),
        neighbors([12], [72]),  # too short
    ]
    chunks = chunks_of(found)
    assert [chunk.copied_from.tolist() for chunk in chunks] == [
        [0] * 4, [0] * 4, [2, 2, 2, 2], [0]
    ]  # fmt: skip
    assert [n.copied.tolist() for n in chunks[2].neighbors] == [
        [True, True, True, False],
        [False, True, True, True, True],
    ]
    assert chunks[2].copied_share == "4 of 4 tokens are in a run copied from neighbors"
    assert chunks[1].copied_share == "0 of 2 tokens are in a run copied from neighbors"


def test_ranks_are_those_that_the_model_reads_and_padding_is_never_copied():
    tokens = np.array([[[8, 9, 10, 0, 0], [80, 8, 0, 9, 10]]])
    mask = np.array([[[True, True, True, True, True], [False, False, True, False, False]]])
    chunks = chunks_of([neighbors([1]), RetrievedNeighbors(tokens, mask), neighbors([1])])
    (only,) = chunks[2].neighbors
    assert (only.rank, only.tokens.tolist()) == (2, [80, 8, 9, 10])
    assert not chunks[2].num_copied


def test_in_two_chunks_the_answer_has_the_prompts_neighbors():
    prompt, answer = chunks_of([neighbors([6, 7, 8])], two_chunks=True)
    assert (prompt.num_generated, prompt.neighbors) == (0, [])
    assert answer.copied_from.tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_neighbors_of_a_text_that_ends_with_a_chunk_are_still_shown():
    text = GeneratedText(TOKENS[:8], 6, [neighbors([50]), neighbors([51])])
    *_, last = written_chunks(text, 4, None)
    assert last.title == "chunk 2: the text ended before it"
    assert [n.tokens.tolist() for n in last.neighbors] == [[51]]
