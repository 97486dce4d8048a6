"""Generate text with a Retro model: neighbors are retrieved once for each completed chunk.

`generate` continues a batch of prompts, which may differ in length. It runs the steps of a
`TextBatch` (batch.py), which gets the next logits from a `Decoder` (decoders.py) and the neighbors
of completed chunks from a `NeighborSource` (neighbors.py).

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

#: Called with the prompt's index in the batch and its new token, as soon as it is generated.
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
        model: The model, or this rank's pipeline stage of it; a DecoderModel without neighbors.
            It runs in eval mode and without sequence parallelism; both settings are restored.
        tokenizer: Provides EOD and the number of valid tokens; with stop strings also `detokenize`.
        requests: The prompts with their options; see `GenerationRequest.for_prompts`. Their lengths
            may differ.
        use_cache: False recomputes every text from its start for each token.
        on_token: Called on every rank for each new token.

    Raises:
        ConfigurationError: a prompt is empty or has invalid tokens, a text is longer than the
            model's window, or an option is out of range.
        RetroError: a source of neighbors failed, or the logits are not finite.
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
    """Continue requests already accepted by `check_request`; see `generate`."""
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
    """Context in which the model is in eval mode; its mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
