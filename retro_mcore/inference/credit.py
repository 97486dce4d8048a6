"""Credit of each neighbor for each token: the loss without the neighbor minus the loss with it.

The neighbors of one rank are left out of all chunks at once, so K + 1 forward passes credit a whole
text. A token's credit is mostly that of the neighbor that its own position reads. It includes what
the neighbors of the same rank changed in the text before. See docs/decisions/0025.

Shapes: T tokens of a text, L chunks, K neighbors, R retrieved length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from retro_mcore.inference.decoders import Decoder
from retro_mcore.inference.texts import GeneratedText
from retro_mcore.retrieval.neighbors import RetrievedNeighbors

#: Losses f32 of all tokens, given the retrieved tokens and their mask [..., K, R]; None except on
#: the last pipeline stage.
LossesWith = Callable[[Tensor, Tensor], Tensor | None]


@torch.no_grad()
def neighbor_credit(
    losses_with: LossesWith,
    tokens: Tensor,
    mask: Tensor,
    pad_id: int,
    left_out: Sequence[Sequence[int]] | None = None,
) -> Tensor | None:
    """Nats by which each neighbor lowers the loss of each token.

    Call it on every rank of a model, with the same arguments.

    Args:
        losses_with: Runs the model.
        tokens: i64 [..., K, R], retrieved tokens.
        mask: bool [..., K, R], True for padding and missing neighbors.
        pad_id: Token in place of a missing neighbor.
        left_out: Ranks, from 0, that are left out together. Default: each of the K alone.

    Returns:
        f32 [*losses, K], or one column for each entry of `left_out`. A missing neighbor has 0.
        None except on the last pipeline stage.
    """
    groups = [[rank] for rank in range(tokens.shape[-2])] if left_out is None else left_out
    whole = losses_with(tokens, mask)
    gains = []
    for ranks in groups:
        if mask[..., list(ranks), :].all():  # the same on every rank of the model
            gains.append(None if whole is None else torch.zeros_like(whole))
            continue
        without = losses_with(*_leave_out(tokens, mask, ranks, pad_id))
        if whole is not None and without is not None:
            gains.append(without - whole)
    return None if whole is None else torch.stack([g for g in gains if g is not None], dim=-1)


def _leave_out(
    tokens: Tensor, mask: Tensor, ranks: Sequence[int], pad_id: int
) -> tuple[Tensor, Tensor]:
    """The same, as if these neighbors did not exist."""
    tokens, mask = tokens.clone(), mask.clone()
    tokens[..., list(ranks), :] = pad_id
    mask[..., list(ranks), :] = True
    return tokens, mask


def text_credit(
    decoder: Decoder, text: GeneratedText, chunk_length: int, pad_id: int, num_tokens: int
) -> np.ndarray | None:
    """Credit of each neighbor for the tokens of a text, f32 [T, K]; the first token has 0.

    Args:
        decoder: Runs the model.
        text: A text with neighbors.
        chunk_length: The model's chunk length.
        pad_id: Token in place of a missing neighbor.
        num_tokens: Size of the vocabulary over which losses are normalized.

    Returns:
        None if no token was predicted with neighbors, and except on the last pipeline stage.
    """
    read = text.tokens[:-1]
    found = text.neighbors[: len(text.chunks(chunk_length, 0, len(read)))]
    if not found:
        return None
    neighbors = RetrievedNeighbors.join(found)

    def losses_with(tokens: Tensor, mask: Tensor) -> Tensor | None:
        changed = RetrievedNeighbors(tokens.numpy(), mask.numpy())
        chunks = [changed.chunk(row) for row in range(len(changed))]
        logits_TV = decoder.prompt_logits(replace(text, tokens=read, neighbors=chunks))
        if logits_TV is None:
            return None
        labels_T = torch.tensor(text.tokens[1:], device=logits_TV.device)
        logits_TV = logits_TV[:, :num_tokens].float()
        return torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")

    tokens, mask = torch.from_numpy(neighbors.tokens), torch.from_numpy(neighbors.mask)
    gains = neighbor_credit(losses_with, tokens, mask, pad_id)
    return None if gains is None else np.pad(gains.cpu().numpy(), ((1, 0), (0, 0)))
