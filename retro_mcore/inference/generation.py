"""Text from a Retro model: each completed chunk gets its neighbors once, each step adds a token.

The chunk grid is left-aligned, so the chunks of a text stay what they are while it grows, and
prompts of different lengths share a batch: rows are padded on the right, where causality hides
the padding, and a row's logits are read at its own last token.

`generate` asks a `Decoder` for the next logits. `FullRecomputation` runs the whole window for
every token; a decoder with a cache fits behind the same method.

Under tensor parallelism every rank of the group calls `generate` with the same arguments. The
group's first rank retrieves and samples, and the others receive its neighbors and tokens, so that
no difference in rounding can part them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from retro_mcore.distributed import broadcast_object, get_rank, get_world_size, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.neighbors import CompletedChunk, NeighborSource, RetrievedNeighbors
from retro_mcore.inference.sampling import SamplingOptions, sample

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


@dataclass
class GeneratedText:
    """A prompt and what has been added to it.

    Attributes:
        tokens: The prompt's tokens, then the new ones (without the EOD that ends the text).
        prompt_length: How many of them are the prompt.
        neighbors: One entry (N = 1) for each completed chunk that was given neighbors.
        finish_reason: "eod", or "length" for `max_new_tokens`; None while it grows.
    """

    tokens: list[int]
    prompt_length: int
    neighbors: list[RetrievedNeighbors] = field(default_factory=list)
    finish_reason: Literal["eod", "length"] | None = None

    @property
    def new_tokens(self) -> list[int]:
        """What was generated."""
        return self.tokens[self.prompt_length :]


class Decoder(Protocol):
    """Runs the model over growing texts; one decoder serves one call of `generate`."""

    def next_logits(self, texts: Sequence[GeneratedText]) -> torch.Tensor:
        """The logits [B, V] of each text's next token."""
        ...


class FullRecomputation:
    """A `Decoder` that runs every text from its first token, each time.

    Args:
        model: A single-stage model in eval mode.
        pad_id: The token that fills the rows of shorter texts; it changes nothing.
    """

    def __init__(self, model: RetroModel, pad_id: int) -> None:
        self._model, self._pad_id = model, pad_id
        self._device = next(model.parameters()).device

    def next_logits(self, texts: Sequence[GeneratedText]) -> torch.Tensor:
        """The logits [B, V] of each text's next token, whole on every tensor-parallel rank."""
        lengths_B = torch.tensor([len(text.tokens) for text in texts], device=self._device)
        tokens_BS = self._padded_tokens(texts)
        position_ids_BS = torch.arange(tokens_BS.shape[1], device=self._device).expand_as(tokens_BS)
        logits_BSV = self._model(
            tokens_BS, position_ids_BS, None, **self._context(texts, tokens_BS.shape[1])
        )
        last_BV = logits_BSV[torch.arange(len(texts), device=self._device), lengths_B - 1]
        if self._model.parallel_output:
            last_BV = gather_from_tensor_model_parallel_region(
                last_BV, group=self._model.pg_collection.tp
            )
        return last_BV

    def _padded_tokens(self, texts: Sequence[GeneratedText]) -> torch.Tensor:
        config = self._model.config
        # Sequence parallelism shares out the positions, so they must divide.
        multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        longest = max(len(text.tokens) for text in texts)
        padded_length = -(-longest // multiple) * multiple
        rows = [text.tokens + [self._pad_id] * (padded_length - len(text.tokens)) for text in texts]
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _context(
        self, texts: Sequence[GeneratedText], sequence_length: int
    ) -> dict[str, torch.Tensor]:
        """The model's context arguments; empty as long as no text has neighbors."""
        if not any(text.neighbors for text in texts):
            return {}
        num_chunks = self._model.config.chunk_grid(sequence_length).num_chunks
        shape_KR = next(text.neighbors[0].tokens.shape[1:] for text in texts if text.neighbors)
        tokens_BLKR = np.full((len(texts), num_chunks, *shape_KR), self._pad_id, np.int64)
        mask_BLKR = np.ones(tokens_BLKR.shape, bool)
        for row, text in enumerate(texts):
            for chunk, retrieved in enumerate(text.neighbors):
                tokens_BLKR[row, chunk], mask_BLKR[row, chunk] = retrieved.tokens, retrieved.mask
        retrieved_length = shape_KR[1]
        tokens_R_BLK = torch.from_numpy(tokens_BLKR).reshape(-1, retrieved_length)
        mask_R_BLK = torch.from_numpy(mask_BLKR).reshape(-1, retrieved_length)
        return {
            "context_input_ids": tokens_R_BLK.to(self._device),
            "context_position_ids": torch.arange(retrieved_length, device=self._device).expand(
                tokens_R_BLK.shape
            ),
            "context_mask": mask_R_BLK.to(self._device),
        }


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
        ConfigurationError: an empty or foreign prompt, a text longer than the model's window, or
            a model whose chunk grid is right-aligned and so moves as the text grows.
    """
    sampling = sampling or SamplingOptions()
    _check(model, tokenizer, prompt_tokens, max_new_tokens, neighbors)
    texts = [GeneratedText(list(prompt), len(prompt)) for prompt in prompt_tokens]
    generators = sampling.generators(len(texts))
    decoder: Decoder = FullRecomputation(model, tokenizer.eod)
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
    if neighbors is not None and model.config.retro_chunk_alignment != "left":
        raise ConfigurationError(
            "retro_chunk_alignment",
            f"{model.config.retro_chunk_alignment!r}: this model's chunks move as a text grows",
            "Generate without neighbors, or with a model whose chunk grid is left-aligned",
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
