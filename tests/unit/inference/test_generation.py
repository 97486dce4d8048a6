"""Generation on small models: consistent with one forward pass, however the texts are batched."""

import dataclasses

import numpy as np
import pytest
import torch

from retro_mcore.errors import ConfigurationError, ProjectError
from tests.unit.inference.small import (
    CHUNK_LENGTH,
    NUM_NEIGHBORS,
    RETRIEVED_LENGTH,
    ChunkFunction,
    Vocabulary,
    prompts,
    requests_for,
    small_model,
)
from tests.unit.model.builders import run_model

# The end of a document never comes, so that lengths are known.
ENDLESS = Vocabulary(eod=90)


class Spelled(Vocabulary):
    """Token 7 is written "t07 "."""

    def __init__(self):
        super().__init__(eod=90)

    def detokenize(self, tokens):
        return "".join(f"t{token:02} " for token in tokens)


@dataclasses.dataclass(frozen=True)
class Ending(Vocabulary):
    """A tokenizer of a checkpoint that records more than one end of a text."""

    eod: int = 90
    end_tokens: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def model(megatron):
    return small_model()


def generate(model, prompt_tokens, **options):
    from retro_mcore.inference.generation import generate
    from retro_mcore.inference.sampling import SamplingOptions

    greedy = SamplingOptions(temperature=0)
    run = {name: options.pop(name) for name in ("use_cache", "on_token") if name in options}
    tokenizer = options.pop("tokenizer", ENDLESS)
    defaults = {"sampling": greedy, "max_new_tokens": 4}
    return generate(model, tokenizer, requests_for(prompt_tokens, **{**defaults, **options}), **run)


def whole_logits(model, text, neighbors):
    """One forward pass over a finished text with the neighbors of all of its chunks."""
    tokens = torch.tensor([text.tokens])
    retrieved = neighbors.neighbors_of(
        [
            type(neighbors.asked[0])(0, i, text.tokens[i * CHUNK_LENGTH :][:CHUNK_LENGTH])
            for i in range(len(text.tokens) // CHUNK_LENGTH)
        ]
    )
    inputs = {
        "tokens": tokens,
        "retrieved": torch.from_numpy(retrieved.tokens)[None],
        "mask": torch.from_numpy(retrieved.mask)[None],
    }
    with torch.no_grad():
        return run_model(model, inputs)[0, :, : ENDLESS.vocab_size]


@pytest.mark.parametrize("length", [1, CHUNK_LENGTH - 1, CHUNK_LENGTH, 2 * CHUNK_LENGTH + 3])
def test_greedy_tokens_are_the_argmax_of_one_pass_over_the_finished_text(model, length):
    source = ChunkFunction()
    (text,) = generate(model, prompts(length), max_new_tokens=20, neighbors=source)
    expected = whole_logits(model, text, source).argmax(-1)
    assert text.new_tokens == expected[length - 1 : -1].tolist()
    assert text.finish_reason == "length"
    assert len(text.new_tokens) == 20


def test_each_chunk_is_retrieved_once_as_soon_as_it_is_complete(model):
    source = ChunkFunction()
    (text,) = generate(model, prompts(CHUNK_LENGTH + 2), max_new_tokens=15, neighbors=source)
    # 25 tokens: the third chunk is complete before the last token is chosen, and used for it.
    assert [chunk.chunk for chunk in source.asked] == [0, 1, 2]
    for chunk in source.asked:
        start = chunk.chunk * CHUNK_LENGTH
        assert chunk.tokens == text.tokens[start : start + CHUNK_LENGTH]
    assert len(text.neighbors) == 3


def test_a_prompt_continues_the_same_with_any_companions(model):
    given = prompts(3, 2 * CHUNK_LENGTH, CHUNK_LENGTH + 1)
    together = generate(model, given, max_new_tokens=12, neighbors=ChunkFunction())
    for prompt, text in zip(given, together, strict=True):
        (alone,) = generate(model, [prompt], max_new_tokens=12, neighbors=ChunkFunction())
        assert text.tokens == alone.tokens


def test_neighbors_matter_and_without_them_the_model_is_its_gpt_decoder(model):
    prompt = prompts(2 * CHUNK_LENGTH)
    (live,) = generate(model, prompt, max_new_tokens=12, neighbors=ChunkFunction())
    (off,) = generate(model, prompt, max_new_tokens=12)
    assert live.tokens != off.tokens
    assert off.neighbors == []
    inputs = {"tokens": torch.tensor([off.tokens]), "retrieved": None, "mask": None}
    with torch.no_grad():
        expected = run_model(model, inputs)[0, :, : ENDLESS.vocab_size].argmax(-1)
    assert off.new_tokens == expected[2 * CHUNK_LENGTH - 1 : -1].tolist()


def test_given_neighbors_are_used_for_their_chunk_alone(model):
    from retro_mcore.retrieval.neighbors import GivenNeighbors, RetrievedNeighbors

    tokens = np.random.default_rng(1).integers(1, 90, (1, NUM_NEIGHBORS, RETRIEVED_LENGTH))
    given = RetrievedNeighbors(tokens, np.zeros(tokens.shape, bool))
    source = GivenNeighbors({1: given}, NUM_NEIGHBORS, RETRIEVED_LENGTH, pad_id=0)
    same_twice = prompts(CHUNK_LENGTH) * 2
    without, with_neighbors = generate(model, same_twice, max_new_tokens=10, neighbors=source)
    assert without.tokens != with_neighbors.tokens
    np.testing.assert_array_equal(with_neighbors.neighbors[0].tokens[0], tokens[0])
    assert with_neighbors.neighbors[1].mask.all()


def test_a_text_ends_at_eod_and_its_companions_go_on(model):
    given = prompts(5, 6)
    free = generate(model, given, max_new_tokens=6)
    first = free[0].new_tokens
    eod = next(token for token in first if token not in free[1].new_tokens)
    texts = generate(model, given, max_new_tokens=6, tokenizer=Vocabulary(eod=eod))
    assert texts[0].new_tokens == first[: first.index(eod)]
    assert texts[0].finish_reason == "eod"
    assert texts[1].tokens == free[1].tokens


def test_sampling_is_reproducible_and_never_leaves_the_vocabulary(model):
    from retro_mcore.inference.sampling import SamplingOptions

    def draw(seed):
        sampling = SamplingOptions(temperature=50.0, seed=seed)  # nearly uniform
        texts = generate(model, prompts(4) * 4, max_new_tokens=30, sampling=sampling)
        return [text.new_tokens for text in texts]

    first = draw(1)
    assert first == draw(1)
    assert first != draw(2)
    assert max(map(max, first)) < ENDLESS.vocab_size
    assert len({tuple(tokens) for tokens in first}) == 4  # each row has draws of its own


def test_every_token_is_announced_in_order(model):
    heard = []
    texts = generate(
        model, prompts(2, 9), max_new_tokens=3, on_token=lambda *event: heard.append(event)
    )
    for row, text in enumerate(texts):
        assert [token for place, token in heard if place == row] == text.new_tokens
    assert [row for row, _ in heard] == [0, 1] * 3


def test_the_models_mode_is_left_as_it_was(model):
    model.train()
    try:
        generate(model, prompts(2), max_new_tokens=1)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "prompt 0: no tokens"),
        ([[1], [90]], {}, "prompt 1: token ids from 90 to 90.*90 tokens"),
        ([[1] * 60], {"max_new_tokens": 5}, "--max-new-tokens: 5 after the 60 .* window of 64"),
        ([[1]], {"max_new_tokens": 0}, "--max-new-tokens: 0"),
        ([[1]], {"min_new_tokens": 9}, "--min-new-tokens: 9 of at most 4"),
        ([[1]], {"stop_strings": [""]}, "--stop: an empty string"),
        ([[1]], {"stop_strings": ["x"]}, "--stop: strings, but the tokenizer cannot detokenize"),
        ([], {}, "no prompt"),
        ([[True]], {}, "prompt 0: values that are not token ids"),
        ([[1.0]], {}, "prompt 0: values that are not token ids"),
        ([[10**40]], {}, "prompt 0: token ids from a number of 133 bits"),
        ([[1]], {"stop_tokens": [96]}, "--stop-token-ids: 96. Give ids from 0 to 95"),
        ([[1]], {"stop_tokens": [-1]}, "--stop-token-ids: -1"),
        (
            [[1]],
            {"stop_tokens": range(90), "min_new_tokens": 1},
            "--stop-token-ids: every token, with --min-new-tokens 1",
        ),
    ],
)
def test_impossible_requests_are_refused(model, prompt, options, message):
    with pytest.raises(ConfigurationError, match=message):
        generate(model, prompt, **options)


def test_the_cache_changes_nothing(model):
    options = {"max_new_tokens": 20, "neighbors": ChunkFunction(), "top_logprobs": 3}
    for two_chunks in (False, True):
        cached = generate(model, prompts(3, 17), two_chunks=two_chunks, **options)
        whole = generate(model, prompts(3, 17), two_chunks=two_chunks, use_cache=False, **options)
        for one, other in zip(cached, whole, strict=True):
            assert one.tokens == other.tokens
            assert [entry.logprob for entry in one.logprobs] == pytest.approx(
                [entry.logprob for entry in other.logprobs], abs=1e-4
            )


def test_stop_tokens_end_a_text_and_do_not_belong_to_it(model):
    (free,) = generate(model, prompts(5), max_new_tokens=6)
    stop = free.new_tokens[3]
    (text,) = generate(model, prompts(5), max_new_tokens=6, stop_tokens=[stop, 91])
    assert text.new_tokens == free.new_tokens[: free.new_tokens.index(stop)]
    assert text.finish_reason == "stop"


def test_a_stop_string_across_tokens_ends_the_text(model):
    (free,) = generate(model, prompts(5), max_new_tokens=8, tokenizer=Spelled())
    words = Spelled().detokenize(free.new_tokens)
    stop = words[7:10]  # the end of one token and the beginning of the next
    cut = words.index(stop)
    (text,) = generate(
        model, prompts(5), max_new_tokens=8, tokenizer=Spelled(), stop_strings=["never", stop]
    )
    assert (text.finish_reason, text.stop_text) == ("stop", words[:cut])
    assert text.new_tokens == free.new_tokens[: (cut + len(stop) - 1) // 4 + 1]
    assert free.stop_text is None


def test_a_text_does_not_end_before_its_least_length(model):
    (free,) = generate(model, prompts(5), max_new_tokens=6)
    eod = free.new_tokens[0]
    vocabulary = Vocabulary(eod=eod)
    (short,) = generate(model, prompts(5), max_new_tokens=6, tokenizer=vocabulary)
    (text,) = generate(model, prompts(5), max_new_tokens=6, min_new_tokens=3, tokenizer=vocabulary)
    assert short.new_tokens == []
    assert len(text.new_tokens) >= 3
    assert eod not in text.new_tokens
    # Endings that cannot be drawn, in padding rows, are no obstacle.
    (endless,) = generate(
        model, prompts(5), max_new_tokens=6, min_new_tokens=6, stop_tokens=[90, 95]
    )
    assert endless.new_tokens == free.new_tokens


def test_log_probabilities_are_those_of_one_pass(model):
    source = ChunkFunction()
    (text,) = generate(
        model,
        prompts(CHUNK_LENGTH + 1),
        max_new_tokens=9,
        neighbors=source,
        top_logprobs=4,
        prompt_logprobs=True,
    )
    expected = whole_logits(model, text, source).log_softmax(-1)
    entries = [*text.prompt_logprobs, *text.logprobs]
    assert [entry.token for entry in entries] == text.tokens[1:]
    for entry, row in zip(entries, expected, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(4).indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(
            row.topk(4).values.tolist(), abs=1e-4
        )


def test_a_prompt_may_be_scored_without_being_continued(model):
    (text,) = generate(model, prompts(7), max_new_tokens=0, prompt_logprobs=True)
    assert len(text.prompt_logprobs) == 6
    assert text.new_tokens == []


def test_in_two_chunks_the_whole_prompt_is_the_query(model):
    source = ChunkFunction()
    given = prompts(CHUNK_LENGTH + 3, 2)
    texts = generate(model, given, max_new_tokens=20, neighbors=source, two_chunks=True)
    assert [(chunk.prompt, chunk.tokens) for chunk in source.asked] == [
        (0, given[0]),
        (1, given[1]),
    ]
    assert [len(text.neighbors) for text in texts] == [1, 1]


def test_the_window_may_be_filled_to_its_last_position(model):
    (text,) = generate(model, [[1] * 60], max_new_tokens=4)
    assert len(text.tokens) == 64


def test_a_right_aligned_model_generates_with_neighbors(megatron):
    model, source = small_model(origin="mcore-0.15"), ChunkFunction()
    (text,) = generate(model, prompts(3), max_new_tokens=2 * CHUNK_LENGTH, neighbors=source)
    whole = dataclasses.replace(text, tokens=text.tokens + [1] * 5, neighbors=list(text.neighbors))
    expected = whole_logits(model, whole, source).argmax(-1)  # in whole chunks, as in training
    assert len(whole.tokens) % CHUNK_LENGTH == 0
    assert text.new_tokens == expected[2 : len(text.tokens) - 1].tolist()


def test_an_error_of_the_search_reaches_the_caller(model):
    class Broken:
        def neighbors_of(self, chunks):
            raise ProjectError("index", "gone", "Build it")

    with pytest.raises(ProjectError, match="gone"):
        generate(model, prompts(CHUNK_LENGTH), neighbors=Broken())


def test_padding_rows_count_nowhere(model):
    # 90 tokens in 96 rows: neither drawn, nor among the likeliest, nor in any softmax.
    from retro_mcore.inference.sampling import SamplingOptions

    with torch.no_grad():
        weight = (
            model.output_layer.weight
            if not model.share_embeddings_and_output_weights
            else (model.shared_embedding_or_output_weight())
        )
        saved = weight[90:].clone()
        weight[90:] *= 50
    try:
        (text,) = generate(
            model,
            prompts(5),
            max_new_tokens=8,
            sampling=SamplingOptions(temperature=30.0),
            top_logprobs=90,
            prompt_logprobs=True,
        )
    finally:
        with torch.no_grad():
            weight[90:] = saved
    assert max(text.tokens) < 90
    for entry in [*text.prompt_logprobs, *text.logprobs]:
        assert sorted(token for token, _ in entry.top) == list(range(90))
        assert np.exp([value for _, value in entry.top]).sum() == pytest.approx(1, abs=1e-4)


def test_a_text_that_fails_ends_alone(model):
    from retro_mcore.inference.batch import TextBatch
    from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
    from retro_mcore.inference.sampling import SamplingOptions

    class FailsForEights(ChunkFunction):
        def neighbors_of(self, chunks):
            if any(len(set(chunk.tokens)) == 1 for chunk in chunks):
                raise ProjectError("index", "gone", "Build it")
            return super().neighbors_of(chunks)

    class Unspeakable(Spelled):
        def detokenize(self, tokens):
            if 88 in tokens:
                raise ValueError("no such token")
            return super().detokenize(tokens)

    def request(tokens, **options):
        return GenerationRequest(
            tokens=tokens, sampling=SamplingOptions(temperature=0), neighbors=source, **options
        )

    source, stopping = FailsForEights(), StoppingOptions(6, stop_strings=("never",))
    healthy = prompts(CHUNK_LENGTH)[0]
    (alone,) = generate(model, [healthy], max_new_tokens=6, neighbors=ChunkFunction())
    batch = TextBatch(model, Unspeakable(), 3)
    good = batch.add(request(healthy, stopping=StoppingOptions(6)))
    without_neighbors = batch.add(request([8] * CHUNK_LENGTH))
    speechless = batch.add(request([88], stopping=stopping))
    while batch.growing:
        batch.step()
    assert (good.tokens, good.error) == (alone.tokens, None)
    assert isinstance(without_neighbors.error, ProjectError)
    assert isinstance(speechless.error, ValueError)
    assert without_neighbors.finish_reason == speechless.finish_reason == "failed"


def test_a_request_for_several_prompts_numbers_them_and_their_seeds():
    from retro_mcore.inference.requests import GenerationRequest
    from retro_mcore.inference.sampling import SamplingOptions

    request = GenerationRequest(sampling=SamplingOptions(seed=5), two_chunks=True)
    first, second = request.for_prompts([[1], [2, 3]], [None, ChunkFunction()])
    assert (first.number, first.tokens, first.sampling.seed) == (0, [1], 5)
    assert (second.number, second.tokens, second.sampling.seed) == (1, [2, 3], 6)
    assert (first.neighbors is None, second.neighbors is None) == (True, False)
    assert second.two_chunks
    with pytest.raises(ValueError, match="zip"):
        request.for_prompts([[1]], [])


def test_sequence_parallelism_is_off_for_a_while_in_every_module_and_configuration(model):
    from retro_mcore.inference.decoders import CachedDecoder
    from retro_mcore.platform.parallel import whole_sequences

    configs = [model.config, model.neighbor_encoder.config]
    try:
        for config in configs:
            config.sequence_parallel = True
        with pytest.raises(ConfigurationError, match="sequence_parallel"):
            CachedDecoder(model, 0, 1)
        with whole_sequences(model):
            assert [config.sequence_parallel for config in configs] == [False, False]
        assert [config.sequence_parallel for config in configs] == [True, True]
    finally:
        for config in configs:
            config.sequence_parallel = False


def test_each_end_that_the_checkpoint_records_ends_a_text(model):
    (free,) = generate(model, prompts(5), max_new_tokens=12)
    end = free.new_tokens[6]
    never = next(token for token in range(90) if token not in free.new_tokens)
    ended = Ending(end_tokens=(never, end))
    (text,) = generate(model, prompts(5), max_new_tokens=12, tokenizer=ended)
    assert text.new_tokens == free.new_tokens[: free.new_tokens.index(end)]
    assert text.finish_reason == "eod"
    (held,) = generate(model, prompts(5), max_new_tokens=12, min_new_tokens=12, tokenizer=ended)
    assert end not in held.new_tokens
