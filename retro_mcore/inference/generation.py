"""Text from a Retro model: each completed chunk gets its neighbors once, each step adds a token.

The chunk grid is left-aligned, so the chunks of a text stay what they are while it grows, and
prompts of different lengths share a batch: rows are padded on the right, where causality hides
the padding, and a row's logits are read at its own last token.

`generate` asks a `Decoder` for the next logits: one with a cache (`CachedDecoder`).

Under tensor parallelism every rank of the group calls `generate` with the same arguments. The
group's first rank retrieves and samples, and the others receive its neighbors and tokens, so that
no difference in rounding can part them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from retro_mcore.distributed import broadcast_object, get_rank, get_world_size, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.decoders import CachedDecoder, Decoder
from retro_mcore.inference.neighbors import CompletedChunk, NeighborSource, RetrievedNeighbors
from retro_mcore.inference.sampling import SamplingOptions, sample
from retro_mcore.inference.texts import GeneratedText

if TYPE_CHECKING:
    from retro_mcore.model.model import RetroModel

#: Called with the prompt's place in the batch and its new token, as soon as there is one.
TokenCallback = Callable[[int, int], None]


class Vocabulary(Protocol):
    """What generation must know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...


@torch.no_grad()
def generate(
    model: RetroModel,
    tokenizer: Vocabulary,
    prompt_tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: SamplingOptions | None = None,
    neighbors: NeighborSource | None = None,
    on_token: TokenCallback | None = None,
) -> list[GeneratedText]:
    """Continue a batch of prompts.

    Args:
        model: A model of one pipeline stage (without `neighbors` any GPTModel will do); its
            training mode is left as it was.
        tokenizer: Gives the end of a text (EOD) and the number of tokens that mean something.
        prompt_tokens: At least one token each; their lengths may differ.
        max_new_tokens: Where a text stops that does not end by itself.
        sampling: How tokens are chosen (default: `SamplingOptions()`).
        neighbors: Where neighbors come from; None turns retrieval off.
        on_token: Called on every rank for each new token.

    Raises:
        ConfigurationError: an empty or foreign prompt, or a text longer than the model's window.
    """
    sampling = sampling or SamplingOptions()
    _check(model, tokenizer, prompt_tokens, max_new_tokens, neighbors)
    texts = [GeneratedText(list(prompt), len(prompt)) for prompt in prompt_tokens]
    generators = sampling.generators(len(texts))
    decoder: Decoder = CachedDecoder(model, tokenizer.eod, len(texts))
    group = model.pg_collection.tp
    with _evaluating(model):
        for _ in range(max_new_tokens):
            growing = [row for row, text in enumerate(texts) if text.finish_reason is None]
            if not growing:
                break
            if neighbors is not None:
                chunk_length = model.config.retro_chunk_length
                _retrieve(neighbors, texts, growing, chunk_length, group)
            logits_BV = decoder.next_logits([texts[row] for row in growing])
            assert logits_BV is not None  # one stage
            logits_BV[:, tokenizer.vocab_size :] = -torch.inf  # padding of the vocabulary
            chosen = _choose(logits_BV, sampling, [generators[row] for row in growing], group)
            for row, token in zip(growing, chosen, strict=True):
                if token == tokenizer.eod:
                    texts[row].finish_reason = "eod"
                    continue
                texts[row].tokens.append(token)
                if on_token is not None:
                    on_token(row, token)
    for text in texts:
        text.finish_reason = text.finish_reason or "length"
    return texts


def _retrieve(
    source: NeighborSource,
    texts: Sequence[GeneratedText],
    growing: Sequence[int],
    chunk_length: int,
    group: dist.ProcessGroup | None,
) -> None:
    """Give the chunks that are complete and have no neighbors yet theirs."""
    chunks = [
        CompletedChunk(row, chunk, texts[row].tokens[chunk * chunk_length :][:chunk_length])
        for row in growing
        for chunk in range(len(texts[row].neighbors), len(texts[row].tokens) // chunk_length)
    ]
    if not chunks:
        return
    retrieved: object = None
    with raise_together(group):
        if get_rank(group) == 0:
            retrieved = source.neighbors_of(chunks)
    retrieved = broadcast_object(retrieved, group)
    assert isinstance(retrieved, RetrievedNeighbors)
    for place, chunk in enumerate(chunks):
        texts[chunk.prompt].neighbors.append(retrieved.chunk(place))


def _choose(
    logits_BV: torch.Tensor,
    sampling: SamplingOptions,
    generators: list[torch.Generator],
    group: dist.ProcessGroup | None,
) -> list[int]:
    """The next tokens, chosen by the group's first rank."""
    if get_world_size(group) == 1:
        return sample(logits_BV, sampling, generators)
    tokens_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    if get_rank(group) == 0:
        tokens_B.copy_(torch.tensor(sample(logits_BV, sampling, generators)))
    assert group is not None
    dist.broadcast(tokens_B, src=dist.get_global_rank(group, 0), group=group)
    return tokens_B.tolist()


@contextmanager
def _evaluating(model: RetroModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check(
    model: RetroModel,
    tokenizer: Vocabulary,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    neighbors: NeighborSource | None,
) -> None:
    if max_new_tokens < 1:
        raise ConfigurationError("--max-new-tokens", str(max_new_tokens), "Give at least 1")
    if not prompts:
        raise ConfigurationError("--prompt", "no prompt", "Give at least one")
    if neighbors is not None and getattr(model, "neighbor_encoder", None) is None:
        raise ConfigurationError(
            "--retro-neighbors", "the model was trained without retrieval", "Use none"
        )
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigurationError(f"prompt {place}", "no tokens", "Give some text to continue")
        if min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
            raise ConfigurationError(
                f"prompt {place}",
                f"token ids from {min(prompt)} to {max(prompt)}",
                f"The vocabulary has {tokenizer.vocab_size} tokens; use the project's tokenizer",
            )
        if len(prompt) + max_new_tokens > model.max_sequence_length:
            raise ConfigurationError(
                "--max-new-tokens",
                f"{max_new_tokens} after the {len(prompt)} tokens of prompt {place} are more than "
                f"the model's window of {model.max_sequence_length}",
                "Shorten the prompt or ask for fewer tokens",
            )
