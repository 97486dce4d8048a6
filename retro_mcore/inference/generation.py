"""Text from a Retro model: each completed chunk gets its neighbors once, each step adds a token.

`generate` continues a batch of prompts, which may differ in length. The pieces behind it: a
`TextBatch` (batch.py) steps over the texts, asks a `Decoder` (decoders.py) for the next logits and
a `NeighborSource` (neighbors.py) for the neighbors of completed chunks.

Under tensor and pipeline parallelism every rank of the model calls `generate` with the same
arguments and gets the same texts. See docs/generation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from retro_mcore.errors import ConfigurationError, RetroError
from retro_mcore.inference.batch import TextBatch
from retro_mcore.inference.decoders import CachedDecoder, Decoder, FullRecomputation
from retro_mcore.inference.requests import (
    GenerationRequest,
    StoppingOptions,
    Vocabulary,
    check_request,
)
from retro_mcore.inference.sampling import LogitAdjustments, SamplingOptions
from retro_mcore.inference.texts import GeneratedText, TokenLogprobs
from retro_mcore.platform.parallel import whole_sequences
from retro_mcore.retrieval.neighbors import NeighborSource

if TYPE_CHECKING:
    from retro_mcore.model.model import RetroModel

__all__ = [
    "CachedDecoder",
    "Decoder",
    "FullRecomputation",
    "GeneratedText",
    "GenerationRequest",
    "StoppingOptions",
    "TextBatch",
    "TokenLogprobs",
    "Vocabulary",
    "generate",
]

#: Called with the prompt's place in the batch and its new token, as soon as there is one.
TokenCallback = Callable[[int, int], None]


def generate(
    model: RetroModel,
    tokenizer: Vocabulary,
    prompt_tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    sampling: SamplingOptions | Sequence[SamplingOptions] | None = None,
    adjustments: LogitAdjustments | None = None,
    neighbors: NeighborSource | Sequence[NeighborSource | None] | None = None,
    two_chunks: bool = False,
    top_logprobs: int | None = None,
    prompt_logprobs: bool = False,
    use_cache: bool = True,
    on_token: TokenCallback | None = None,
) -> list[GeneratedText]:
    """Continue a batch of prompts.

    Args:
        model: The model, or this rank's pipeline stage of it (without `neighbors` any GPTModel of
            ours will do). It runs in eval mode and without sequence parallelism; both are as they
            were afterwards.
        tokenizer: Gives the end of a text (EOD) and the number of tokens that mean something; with
            stop strings also `detokenize`.
        prompt_tokens: At least one token each; their lengths may differ.
        max_new_tokens: Where a text stops that does not end by itself.
        min_new_tokens: Until a text has so many, it does not end.
        stop_tokens: Tokens that end a text, besides EOD; they do not belong to it.
        stop_strings: Strings that end a text: `GeneratedText.stop_text` is what precedes.
        sampling: How tokens are chosen (default: `SamplingOptions()`); prompt i draws with its
            seed + i, so no prompt's text depends on its companions. Or options for each prompt.
        adjustments: Penalties and biases on the logits, if any.
        neighbors: Where neighbors come from, for all prompts or one for each; None turns retrieval
            off.
        two_chunks: Each prompt is the first chunk and its answer the second, whatever their
            lengths, as InstructRetro's models were used; else chunks have the model's length.
        top_logprobs: Keep the log-probability of each new token (0), and of the n likeliest (n).
        prompt_logprobs: Keep those of the prompts' tokens too, from the second on.
        use_cache: False recomputes every text from its start for each token.
        on_token: Called on every rank for each new token.

    Raises:
        ConfigurationError: an empty or foreign prompt, a text longer than the model's window, or
            an option out of range.
        RetroError: a source of neighbors failed, or the logits are not numbers.
    """
    stopping = StoppingOptions(
        max_new_tokens, min_new_tokens, tuple(stop_tokens), tuple(stop_strings)
    )
    if max_new_tokens < 1 and not prompt_logprobs:
        raise ConfigurationError("--max-new-tokens", str(max_new_tokens), "Give at least 1")
    if not prompt_tokens:
        raise ConfigurationError("--prompt", "no prompt", "Give at least one")
    if isinstance(neighbors, Sequence):
        sources = list(neighbors)
    else:
        sources = [neighbors] * len(prompt_tokens)
    if isinstance(sampling, Sequence):
        samplings = list(sampling)
    else:
        shared = sampling or SamplingOptions()
        samplings = [replace(shared, seed=shared.seed + i) for i in range(len(prompt_tokens))]
    requests = [
        GenerationRequest(
            tokens=prompt,
            sampling=own_sampling,
            adjustments=adjustments or LogitAdjustments(),
            stopping=stopping,
            neighbors=source,
            number=row,
            two_chunks=two_chunks,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for row, (prompt, source, own_sampling) in enumerate(
            zip(prompt_tokens, sources, samplings, strict=True)
        )
    ]
    for request in requests:
        check_request(request, model, tokenizer, model.max_sequence_length)
    with evaluating(model), whole_sequences(model):
        return _run(model, tokenizer, requests, use_cache, on_token)


def _run(
    model: RetroModel,
    tokenizer: Vocabulary,
    requests: Sequence[GenerationRequest],
    use_cache: bool,
    on_token: TokenCallback | None,
) -> list[GeneratedText]:
    longest = max(len(request.tokens) for request in requests)
    longest += requests[0].stopping.max_new_tokens
    decoder = None if use_cache else FullRecomputation(model, tokenizer.eod)
    batch = TextBatch(model, tokenizer, len(requests), longest, decoder)
    texts = [batch.add(request) for request in requests]
    places = {text: place for place, text in enumerate(texts)}
    while batch.growing:
        for text, token in batch.step():
            if on_token is not None:
                on_token(places[text], token)
        for text in texts:
            if text.error is not None:
                if isinstance(text.error, RetroError):
                    text.error.raised_together = True  # every rank has it
                raise text.error
    return texts


@contextmanager
def evaluating(model: RetroModel) -> Iterator[None]:
    """The model in eval mode; as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
