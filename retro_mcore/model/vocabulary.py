"""The tokenizer's vocabulary in the model's, which is padded.

An embedding has more rows than the tokenizer has tokens, so that it divides over tensor parallel
ranks; how many more depends on their number. No text holds such a token. Everything that scores
text leaves their logits out, so that its numbers depend neither on the padding nor on the layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from retro_mcore.model.decoder_model import DecoderModel


def mask_padding_rows(logits: Tensor, vocab_size: int | None, model: DecoderModel) -> Tensor:
    """Logits in which no row of the padding has any probability; changed in place.

    Args:
        logits: [..., V], this rank's part of the vocabulary or all of it, as `model` gives them.
        vocab_size: The tokenizer's; None: every row is a token.
        model: It says which part.
    """
    if vocab_size is None:
        return logits
    size = logits.size(-1)
    rank = dist.get_rank(model.pg_collection.tp) if model.parallel_output else 0
    first_padding = max(0, vocab_size - rank * size)
    # The lowest number, not minus infinity: a rank may hold padding alone, and less a maximum of
    # its own that would be no number.
    logits[..., first_padding:] = torch.finfo(logits.dtype).min
    return logits


def losses_of_logits(
    logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int | None, model: DecoderModel
) -> Tensor:
    """The loss of each label [B, S] in nats, over the tokenizer's vocabulary.

    Args:
        logits_BSV: As `model` gives them on its last stage; they are changed.
        labels_BS: i64.
        vocab_size: The tokenizer's; None: every row is a token.
        model: It gave the logits.
    """
    logits_BSV = mask_padding_rows(logits_BSV, vocab_size, model)
    if model.parallel_output:
        return vocab_parallel_cross_entropy(logits_BSV.float(), labels_BS)
    return torch.nn.functional.cross_entropy(
        logits_BSV.float().flatten(0, 1), labels_BS.flatten(), reduction="none"
    ).view_as(labels_BS)


def whole_vocabulary(logits: Tensor, vocab_size: int, model: DecoderModel) -> Tensor:
    """Logits [..., vocab_size] over the tokenizer's vocabulary, on every tensor parallel rank."""
    if model.parallel_output:
        group = model.pg_collection.tp
        logits = gather_from_tensor_model_parallel_region(logits.contiguous(), group=group)
    return logits[..., :vocab_size]
