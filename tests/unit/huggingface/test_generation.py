"""transformers' generate() gives our generation's tokens, however texts are batched and cached."""

from __future__ import annotations

import pytest
import torch

from tests.unit.huggingface.models import SMALL, pair
from tests.unit.huggingface.test_against_megatron import TOGETHER
from tests.unit.inference.small import ChunkFunction, Vocabulary, prompts, requests_for

ROPE = {"position_embedding_type": "rope"}
#: The end of a document never comes, so that lengths are known.
ENDLESS = Vocabulary(eod=90)
CHUNK_LENGTH = SMALL["retro_chunk_length"]
LENGTHS = (17, 3, 8)


@pytest.fixture(scope="module")
def models(megatron):
    return pair(**ROPE)


def retriever(chunks):
    """`ChunkFunction` as transformers' model calls it; one chunk in seven has no neighbors."""
    from retro_mcore.retrieval.neighbors import CompletedChunk

    completed = [CompletedChunk(0, 0, chunk) for chunk in chunks.tolist()]
    found = ChunkFunction().neighbors_of(completed)
    tokens = torch.from_numpy(found.tokens).masked_fill(torch.from_numpy(found.mask), -1)
    tokens[chunks.sum(1) % 7 == 0] = -1
    return tokens


class Source:
    """The same, as our generation asks."""

    def neighbors_of(self, chunks):
        from retro_mcore.retrieval.neighbors import RetrievedNeighbors

        found = retriever(torch.tensor([list(chunk.tokens) for chunk in chunks]))
        return RetrievedNeighbors(found.masked_fill(found < 0, 3).numpy(), (found < 0).numpy())


def our_tokens(model, texts, neighbors, new=20):
    from retro_mcore.inference.generation import generate
    from retro_mcore.inference.sampling import SamplingOptions

    options = {"sampling": SamplingOptions(temperature=0), "max_new_tokens": new}
    return [
        text.new_tokens
        for text in generate(
            model, ENDLESS, requests_for(texts, neighbors=neighbors, **options), use_cache=True
        )
    ]


def padded(texts):
    longest = max(map(len, texts))
    rows = [[0] * (longest - len(text)) + text for text in texts]
    mask = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def their_tokens(model, texts, new=20, **options):
    return generated(model, texts, new, **options).sequences[:, max(map(len, texts)) :].tolist()


def generated(model, texts, new=20, **options):
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": 90, "pad_token_id": 0,
               "output_scores": True, "return_dict_in_generate": True, **options}  # fmt: skip
    return model.generate(**padded(texts), **options)


@pytest.mark.parametrize("use_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_greedy_tokens_are_ours(models, use_cache):
    ours, theirs = models
    texts = prompts(*LENGTHS)
    wanted = our_tokens(ours, texts, Source())
    assert their_tokens(theirs, texts, retriever=retriever, use_cache=use_cache) == wanted
    assert wanted != our_tokens(ours, texts, None) == their_tokens(theirs, texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"retro_origin": "mcore-0.15"},
        {"sliding_window": 5, "window_attn_skip_freq": [3], **ROPE},
        {"retro_cross_attention_positions": "rotary", "num_query_groups": 2, **ROPE},
        {"retro_deepnorm": True, "retro_chunk_length": 5},
        *(TOGETHER[name] for name in ("gemma", "gpt_neox", "granite, yarn", "groups of experts")),
    ],
)
def test_greedy_tokens_of_other_models(megatron, options):
    ours, theirs = pair(**options)
    if options.get("retro_chunk_length"):
        functions = ChunkFunction(retrieved_length=10), None
        functions = functions[0], lambda chunks: _of(functions[0], chunks)
    else:
        functions = Source(), retriever
    texts = prompts(*LENGTHS)
    wanted = our_tokens(ours, texts, functions[0])
    for use_cache in (True, False):
        found = their_tokens(theirs, texts, retriever=functions[1], use_cache=use_cache)
        assert found == wanted


def _of(function, chunks):
    from retro_mcore.retrieval.neighbors import CompletedChunk

    found = function.neighbors_of([CompletedChunk(0, 0, chunk) for chunk in chunks.tolist()])
    return torch.from_numpy(found.tokens).masked_fill(torch.from_numpy(found.mask), -1)


def test_given_neighbors_are_those_of_the_prompts_chunks(models):
    """Later chunks have none, or what a retriever finds."""
    _, theirs = models
    texts = prompts(17, 16)
    chunks = torch.tensor([[text[:8], text[8:16]] for text in texts])
    given = retriever(chunks.flatten(0, 1)).unflatten(0, (2, 2))
    found = their_tokens(theirs, texts, retriever=retriever)
    both = {"retrieved_input_ids": given}
    assert their_tokens(theirs, texts, retriever=retriever, **both) == found
    alone = their_tokens(theirs, texts, **both)
    assert alone == their_tokens(theirs, texts, use_cache=False, **both)
    scores = [
        generated(theirs, texts, **how).scores[-1] for how in ({"retriever": retriever}, both)
    ]
    assert not torch.equal(*scores)  # later chunks retrieve in one of them
    for use_cache in (True, False):
        some = {"retrieved_input_ids": given[:, :1], "use_cache": use_cache}
        assert their_tokens(theirs, texts, retriever=retriever, **some) == found


def test_given_neighbors_of_prompts_of_several_lengths(models):
    """A shorter prompt's row is filled with -1; its later chunks are retrieved nevertheless."""
    _, theirs = models
    texts = prompts(17, 9)
    chunks = torch.tensor([texts[0][:8], texts[0][8:16], texts[1][:8]])
    given = torch.nn.utils.rnn.pad_sequence(
        retriever(chunks).split((2, 1)), batch_first=True, padding_value=-1
    )
    both = {"retriever": retriever, "retrieved_input_ids": given}
    found = their_tokens(theirs, texts, retriever=retriever)
    assert their_tokens(theirs, texts, **both) == found


def test_the_models_own_retriever(models):
    """As tools use it that know nothing of retrieval: set once, used in every pass."""
    _, theirs = models
    texts = prompts(*LENGTHS)
    wanted = their_tokens(theirs, texts, retriever=retriever)
    theirs.retriever = retriever
    try:
        assert their_tokens(theirs, texts) == wanted
    finally:
        theirs.retriever = None


@pytest.mark.slow
def test_each_chunk_is_retrieved_and_encoded_once(models):
    _, theirs = models
    asked, encoded = [], []
    hook = theirs.model.encoder.register_forward_hook(
        lambda module, inputs, output: encoded.append(inputs[1].size(0))
    )
    texts = prompts(17)
    answer = their_tokens(theirs, texts, retriever=lambda c: asked.append(c) or retriever(c))
    hook.remove()
    whole = texts[0] + answer[0]
    assert encoded == [2, 1, 1]  # of 36 cached tokens: the last new one is not read
    chunks = torch.cat(asked).tolist()
    assert chunks == [whole[i : i + CHUNK_LENGTH] for i in range(0, 32, CHUNK_LENGTH)]


@pytest.mark.slow
def test_beams_and_several_answers(models):
    """Rows of the cache move; without a cache there is nothing to move."""
    _, theirs = models
    texts = prompts(15, 6)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        found = [
            their_tokens(theirs, texts, retriever=retriever, use_cache=use_cache, **options)
            for use_cache in (True, False)
        ]
        assert found[0] == found[1]


def test_a_text_goes_on_in_pieces(models):
    """Passes of several tokens with a cache, over the boundaries of chunks."""
    _, theirs = models
    texts = prompts(30, 22)
    inputs = padded(texts)
    with torch.no_grad():
        whole = theirs(**inputs, retriever=retriever).logits
        cache, parts, done = None, [], 0
        for size in (12, 3, 1, 9, 5):
            part = inputs["input_ids"][:, done : done + size]
            done += size
            output = theirs(
                part,
                attention_mask=inputs["attention_mask"][:, :done],
                past_key_values=cache,
                retriever=retriever,
                use_cache=True,
            )
            cache, parts = output.past_key_values, [*parts, output.logits]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-10, rtol=0)


@pytest.mark.slow
def test_chunked_prefill(models):
    _, theirs = models
    texts = prompts(17, 9)
    wanted = their_tokens(theirs, texts, retriever=retriever)
    assert their_tokens(theirs, texts, retriever=retriever, prefill_chunk_size=5) == wanted


def test_caches_that_cannot_go_on_are_refused(megatron, models):
    from transformers import DynamicCache

    _, theirs = models
    tokens = torch.tensor(prompts(9))
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        theirs(tokens, past_key_values=DynamicCache(), retriever=retriever)
    with pytest.raises(ValueError, match="past_key_values is a StaticCache, of a fixed size"):
        theirs.generate(tokens, max_new_tokens=2, cache_implementation="static")
    _, right = pair(retro_origin="legacy", **ROPE)
    cache = right(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="give chunk_alignment='left'"):
        right(tokens[:, :1], past_key_values=cache)
    padding = {"attention_mask": torch.tensor([[1] * 9, [1] * 7 + [0] * 2])}
    cache = theirs(tokens.expand(2, -1), use_cache=True, **padding).past_key_values
    with pytest.raises(ValueError, match="pad at the left"):
        theirs(tokens[:, :1].expand(2, -1), past_key_values=cache)


def test_a_prompt_of_embeddings(models):
    """Its neighbors may be given; a retriever needs tokens."""
    _, theirs = models
    texts = prompts(17, 9)
    inputs = padded(texts)
    embedded = {"inputs_embeds": theirs.get_input_embeddings()(inputs["input_ids"])}
    embedded |= {"attention_mask": inputs["attention_mask"]}
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 90, "pad_token_id": 0}
    chunks = torch.tensor([texts[0][:8], texts[0][8:16], texts[1][:8]])
    given = torch.nn.utils.rnn.pad_sequence(
        retriever(chunks).split((2, 1)), batch_first=True, padding_value=-1
    )
    for neighbors in ({}, {"retrieved_input_ids": given}):
        found = theirs.generate(**embedded, **neighbors, **options)
        assert found.tolist() == their_tokens(theirs, texts, **neighbors)
    with pytest.raises(ValueError, match=r"inputs_embeds.*with a retriever.*give input_ids"):
        theirs.generate(**embedded, retriever=retriever, **options)


def test_a_chunk_of_which_tokens_are_unknown_is_not_retrieved(models):
    _, theirs = models
    tokens = torch.tensor(prompts(5, 5))
    cache = theirs(inputs_embeds=theirs.get_input_embeddings()(tokens), use_cache=True)
    with pytest.raises(ValueError, match="tokens of whole chunks: give input_ids"):
        theirs(tokens[:, :3], past_key_values=cache.past_key_values, retriever=retriever)


@pytest.mark.parametrize("filled", [False, True])
def test_rows_of_a_cache_without_neighbors_are_selected(models, filled):
    from retro_mcore.huggingface import RetroCache

    _, theirs = models
    for select, rows in (
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1]),
    ):
        texts = padded(prompts(9, 4))
        cache = theirs(**texts, use_cache=True).past_key_values if filled else RetroCache()
        spans = cache.spans
        select(cache)
        assert cache.spans == ([spans[row] for row in rows] if filled else None)
        assert cache.starts == []
        assert filled == (cache.tokens is not None)
