"""Causal self-attention under context parallelism, with the keys and values of all ranks gathered.

The Llama 3 way (Dubey et al. 2024, section 3.3.2): each rank keeps its queries, so nothing else of
the attention changes. It needs no CUDA, and it is exact up to the order of sums. The results differ
from one process only in attention dropout, which every rank draws for its own positions.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.attention import SDPAttention
from retro_mcore.platform.context_parallel import ContextPart
from retro_mcore.platform.windows import shared_by_layers


class GatheredAttention(SDPAttention):
    """SDPAttention for a rank that holds two pieces of each sequence (`ContextPart`).

    Args:
        config: As SDPAttention takes it.
        *args, **kwargs: As SDPAttention takes them.
        pg_collection: Process groups; `cp` is the context parallel group.
        cp_comm_type: The exchange that was asked for; this one is "all_gather".

    Raises:
        ConfigurationError: another exchange was asked for.
    """

    gathers_keys = True

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: Any,
        cp_comm_type: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        if cp_comm_type not in (None, "all_gather"):
            raise ConfigurationError(
                "cp_comm_type",
                f"{cp_comm_type} (the default with Transformer Engine), in local layers or with "
                "attention_softcap, whose attention gathers all keys",
                "Add --cp-comm-type all_gather",
            )
        self._group = pg_collection.cp
        self._part = ContextPart.of(self._group)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend to this rank's and all earlier positions.

        Args:
            query: `[S / c, B, heads, channels]`, the rank's two pieces.
            key, value: `[S / c, B, groups, channels]`, likewise.
            attention_mask: bool, broadcastable to `[B, heads, S / c, S]`, True = masked out; it
                also masks later positions. None: causal.
            attention_bias: Not supported.

        Returns:
            `[S / c, B, heads * channels]`.
        """
        if attention_bias is not None:
            raise ConfigurationError(
                "attention_bias", "not supported under context parallelism", "Leave it out"
            )
        key, value = self._gather(key, value)
        length = query.size(0) // 2
        attended = []
        for place, number in enumerate(self._part.pieces):
            rows = slice(place * length, (place + 1) * length)
            columns = self._keys_in_reach(number * length, length)
            here, seen = query[rows], key[columns]
            mask = None if attention_mask is None else attention_mask[..., rows, columns]
            bias = None
            if mask is None and number > 0 and self._band(here, seen) is None:
                bias = _lower_right(length, seen.size(0), query.dtype, query.device)
            attended.append(
                super().forward(
                    here,
                    seen,
                    value[columns],
                    mask,
                    AttnMaskType.causal if number == 0 else AttnMaskType.no_mask,
                    bias,
                    packed_seq_params,
                )
            )
        return torch.cat(attended)

    def _keys_in_reach(self, start: int, length: int) -> slice:
        """The keys that the piece of `length` positions from `start` attends to."""
        first = 0 if self.window is None else max(0, start + 1 - self.window)
        return slice(first, start + length)

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions; the backward pass sums their gradients over ranks."""
        both = torch.cat((key, value), dim=-1)
        gathered = gather_from_sequence_parallel_region(both, group=self._group)
        key, value = self._part.restore(gathered, 0).split((key.size(-1), value.size(-1)), dim=-1)
        return key, value


@shared_by_layers
def _lower_right(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values to add to the scores so that the last row sees all columns, the one before one less.

    One tensor serves all layers, which keep it for the backward pass.
    """
    with torch.inference_mode(mode=False):
        mask = torch.full((rows, columns), float("-inf"), dtype=dtype, device=device)
        return mask.triu(columns - rows + 1)
