"""Searches in a background thread: begun early, and never dependent on how long they take."""

import threading

import numpy as np
import pytest

from retro_mcore.errors import ConfigurationError, ProjectError
from retro_mcore.retrieval.background import BackgroundRetrieval
from retro_mcore.retrieval.neighbors import CompletedChunk
from tests.unit.inference.small import CHUNK_LENGTH as M
from tests.unit.inference.small import ChunkFunction, Vocabulary, prompts, requests_for, small_model


class Slow(ChunkFunction):
    """A search that does not end before it is allowed to."""

    def __init__(self):
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()

    def neighbors_of(self, chunks):
        self.begun.set()
        assert self.may_end.wait(30)
        return super().neighbors_of(chunks)


def chunk(number, tokens=(1, 2, 3), prompt=0):
    return CompletedChunk(prompt, number, list(tokens))


def test_a_search_begins_when_it_is_expected_and_runs_once():
    slow = Slow()
    source = BackgroundRetrieval(slow)
    source.expect([chunk(0), chunk(1)])
    assert slow.begun.wait(30)  # nobody has asked for it yet
    source.expect([chunk(0)])
    slow.may_end.set()
    found = source.neighbors_of([chunk(1), chunk(0)])
    expected = ChunkFunction().neighbors_of([chunk(1), chunk(0)])
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert [asked.chunk for asked in slow.asked] == [0, 1]
    assert source.waited_seconds > 0
    source.close()


def test_chunks_between_searches_keep_what_was_found_last():
    search = ChunkFunction()
    source = BackgroundRetrieval(search, interval=3)
    chunks = [chunk(number, tokens=[number, 5]) for number in range(5)]
    found = [source.neighbors_of([one]).tokens for one in chunks]
    assert [asked.chunk for asked in search.asked] == [0, 3]
    np.testing.assert_array_equal(found[2], found[0])
    np.testing.assert_array_equal(found[4], found[3])
    assert (found[3] != found[0]).any()
    source.close()


def test_an_error_of_the_search_is_raised_where_its_result_is_needed():
    class Broken:
        def neighbors_of(self, chunks):
            raise ProjectError("index", "gone", "Build it")

    source = BackgroundRetrieval(Broken())
    source.expect([chunk(0)])
    with pytest.raises(ProjectError, match="gone"):
        source.neighbors_of([chunk(0)])
    source.close()


def write(model, source, on_token=None):
    from retro_mcore.inference.generation import generate
    from retro_mcore.inference.sampling import SamplingOptions

    requests = requests_for(
        prompts(3, 2 * M + 1),
        max_new_tokens=3 * M,
        sampling=SamplingOptions(temperature=0),
        neighbors=source,
    )
    return generate(model, Vocabulary(eod=90), requests, on_token=on_token)


def test_generation_is_the_same_with_and_without_the_thread(megatron):
    model, search = small_model(), ChunkFunction()
    source = BackgroundRetrieval(search)
    direct = write(model, ChunkFunction())
    assert [text.tokens for text in write(model, source)] == [text.tokens for text in direct]
    for asked in search.asked:
        tokens = direct[asked.prompt].tokens
        assert asked.tokens == tokens[asked.chunk * M :][:M]
    source.close()


def test_a_lead_asks_earlier_with_fewer_tokens(megatron):
    model, search = small_model(), ChunkFunction()
    source = BackgroundRetrieval(search, lead=3)
    expected_at = {}
    expect = source.expect

    def noting(chunks):
        for one in chunks:
            expected_at.setdefault((one.prompt, one.chunk), len(heard[one.prompt]))
        expect(chunks)

    heard = {0: [0] * 3, 1: [0] * (2 * M + 1)}
    source.expect = noting
    texts = write(model, source, on_token=lambda row, token: heard[row].append(token))
    for asked in search.asked:
        assert asked.tokens == texts[asked.prompt].tokens[asked.chunk * M :][: M - 3]
    # Known after M - 3 tokens of the chunk; texts of the step are told after their tokens.
    assert expected_at[0, 1] <= 2 * M - 3
    assert all(len(text.neighbors) == (len(text.tokens) - 1) // M for text in texts)
    source.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"interval": 0}, "--retrieval-interval: 0"), ({"lead": -1}, "--retrieval-lead: -1")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        BackgroundRetrieval(ChunkFunction(), **options)


def test_a_lead_leaves_some_tokens_to_search_with(megatron):
    with pytest.raises(ConfigurationError, match=f"--retrieval-lead: {M} of the {M} tokens"):
        write(small_model(), BackgroundRetrieval(ChunkFunction(), lead=M))
