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
from typing import TYPE_CHECKING

from retro_mcore.errors import ConfigurationError, RetroError
from retro_mcore.inference.batch import TextBatch
from retro_mcore.inference.decoders import CachedDecoder, Decoder, FullRecomputation
from retro_mcore.inference.requests import (
    GenerationRequest,
    StoppingOptions,
    Vocabulary,
    check_request,
    require_new_tokens,
)
from retro_mcore.inference.texts import GeneratedText, TokenLogprobs
from retro_mcore.platform.parallel import whole_sequences

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
    requests: Sequence[GenerationRequest],
    *,
    use_cache: bool = True,
    on_token: TokenCallback | None = None,
) -> list[GeneratedText]:
    """Continue a batch of prompts.

    Args:
        model: The model, or this rank's pipeline stage of it. Without neighbors any GPTModel of
            ours will do. It runs in eval mode and without sequence parallelism; both are as they
            were afterwards.
        tokenizer: Gives the end of a text (EOD) and the number of tokens that mean something; with
            stop strings also `detokenize`.
        requests: The prompts and how each is continued; see `GenerationRequest.for_prompts`. Their
            lengths may differ.
        use_cache: False recomputes every text from its start for each token.
        on_token: Called on every rank for each new token.

    Raises:
        ConfigurationError: an empty or foreign prompt, a text longer than the model's window, or
            an option out of range.
        RetroError: a source of neighbors failed, or the logits are not numbers.
    """
    if not requests:
        raise ConfigurationError("--prompt", "no prompt", "Give at least one")
    for request in requests:
        require_new_tokens(request)
    for request in requests:
        check_request(request, model, tokenizer, model.max_sequence_length)
    return continue_checked(model, tokenizer, requests, use_cache=use_cache, on_token=on_token)


def continue_checked(
    model: RetroModel,
    tokenizer: Vocabulary,
    requests: Sequence[GenerationRequest],
    *,
    use_cache: bool = True,
    on_token: TokenCallback | None = None,
) -> list[GeneratedText]:
    """Continue requests that `check_request` has accepted; see `generate`."""
    with evaluating(model), whole_sequences(model):
        return _run(model, tokenizer, requests, use_cache, on_token)


def _run(
    model: RetroModel,
    tokenizer: Vocabulary,
    requests: Sequence[GenerationRequest],
    use_cache: bool,
    on_token: TokenCallback | None,
) -> list[GeneratedText]:
    longest = max(len(each.tokens) + each.stopping.max_new_tokens for each in requests)
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
