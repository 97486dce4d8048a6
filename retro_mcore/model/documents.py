"""Documents of a text that do not see one another: their masks and positions.

See docs/decisions/0028-packed-documents.md. Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retro_mcore.errors import ConfigurationError, raise_problems

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def segment_mask(segments_BS: Tensor) -> Tensor:
    """bool `[B, 1, S, S]`, True = masked out: later tokens, and those of other segments."""
    causal_SS = torch.ones(2 * segments_BS.shape[-1:], device=segments_BS.device).triu(1).bool()
    return (causal_SS | (segments_BS[:, :, None] != segments_BS[:, None, :])).unsqueeze(1)


def mask_apart(segments_BS: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`segment_mask`, and what else `attention_mask` masks out.

    Raises:
        ConfigurationError: `attention_mask` is not bool.
    """
    mask = segment_mask(segments_BS)
    if attention_mask is None:
        return mask
    if attention_mask.dtype != torch.bool:
        raise ConfigurationError(
            "attention_mask",
            f"{attention_mask.dtype}, together with documents that are kept apart",
            "Give bool, True = masked out, or leave it out",
        )
    return mask | attention_mask


def segment_positions(segments_BS: Tensor) -> Tensor:
    """int64 `[B, S]`: positions, which restart in every segment."""
    length = segments_BS.size(1)
    position_BS = torch.arange(length, device=segments_BS.device).expand_as(segments_BS)
    starts_BS = torch.ones_like(segments_BS, dtype=torch.bool)
    starts_BS[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    return position_BS - torch.where(starts_BS, position_BS, 0).cummax(dim=1).values


def packed_segments(packed: PackedSeqParams, sequence_length: int | None = None) -> Tensor:
    """The document of each token of a packed row, from Megatron's description of it.

    Padding behind a document belongs to that document.

    Args:
        packed: With `qkv_format` "thd". `cu_seqlens_q`, int32 or int64 `[documents + 1]`, has 0 and
            then the tokens up to the end of each document. If documents are padded,
            `cu_seqlens_q_padded` has their places, and `cu_seqlens_q` counts tokens without
            padding.
        sequence_length: S; None: as the last document ends.

    Returns:
        int64 `[1, S]` on the device of `cu_seqlens_q`, as `segments` of RetroModel and RetroBatch.

    Raises:
        ConfigurationError: the fields contradict one another or the row, or ask for something that
            segments cannot say. Names the field.
    """
    segments, _ = read_packed(packed, sequence_length)
    return segments.to(packed.cu_seqlens_q.device)


def read_packed(
    packed: PackedSeqParams, sequence_length: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """`packed_segments`, and which tokens are padding, on the CPU.

    Args:
        packed, sequence_length: As `packed_segments` takes them.

    Returns:
        int64 `[1, S]`; bool `[1, S]`, True = padding, or None if no padding is described.

    Raises:
        ConfigurationError: As `packed_segments` says.
    """
    raise_problems([*_unreadable(packed)])
    ends = {name: _on_cpu(getattr(packed, name)) for name in _ENDS}
    raise_problems([*_out_of_order(ends)])
    tokens, padded = ends["cu_seqlens_q"], ends["cu_seqlens_q_padded"]
    assert tokens is not None  # is readable
    places = tokens if padded is None else padded
    row = int(places[-1]) if sequence_length is None else sequence_length
    raise_problems([*_contradictions(packed, ends, row)])
    position_S = torch.arange(row)
    segments_S = torch.searchsorted(places, position_S, right=True) - 1
    if padded is None:
        return segments_S[None], None
    padding_S = position_S - places[segments_S] >= tokens.diff()[segments_S]
    return segments_S[None], padding_S[None]


#: Fields with 0 and the end of each document.
_ENDS = ("cu_seqlens_q", "cu_seqlens_q_padded", "cu_seqlens_kv", "cu_seqlens_kv_padded")


def _on_cpu(ends: Tensor | None) -> Tensor | None:
    return None if ends is None else ends.cpu().long()


def _unreadable(packed: PackedSeqParams) -> Iterator[ConfigurationError]:
    """Problems of single fields."""
    if packed.qkv_format != "thd":
        yield _problem("qkv_format", repr(packed.qkv_format), "Give 'thd', documents in one row")
    if packed.cu_seqlens_q is None:
        yield _problem("cu_seqlens_q", "None", "Give 0 and the end of each document")
    for name in _ENDS:
        ends = getattr(packed, name)
        if ends is None:
            continue
        hint = "Give int32 or int64 [documents + 1]"
        if not isinstance(ends, Tensor):
            yield _problem(name, f"a {type(ends).__name__}", hint)
        elif ends.dtype not in (torch.int32, torch.int64) or ends.dim() != 1 or ends.numel() < 2:
            yield _problem(name, f"{ends.dtype} of shape {tuple(ends.shape)}", hint)
    group = packed.cp_group
    ranks = (packed.local_cp_size or 1) if group is None else group.size()
    if ranks > 1:
        yield _problem(
            "local_cp_size" if group is None else "cp_group",
            f"{ranks} ranks for this row alone",
            "Leave it out; context_parallel_size divides every row alike",
        )


def _out_of_order(ends: Mapping[str, Tensor | None]) -> Iterator[ConfigurationError]:
    """Ends that are none; those of the keys are compared with these."""
    for name in ("cu_seqlens_q", "cu_seqlens_q_padded"):
        numbers = ends[name]
        if numbers is not None and (int(numbers[0]) != 0 or bool((numbers.diff() < 0).any())):
            yield _problem(name, f"{numbers.tolist()}", "Give 0, and then ends that never fall")


def _contradictions(
    packed: PackedSeqParams, ends: Mapping[str, Any], sequence_length: int
) -> Iterator[ConfigurationError]:
    """Fields that do not fit the documents or the row."""
    tokens, padded = ends["cu_seqlens_q"], ends["cu_seqlens_q_padded"]
    places = tokens if padded is None else padded
    for name, expected in (("cu_seqlens_kv", tokens), ("cu_seqlens_kv_padded", places)):
        keys = ends[name]
        if keys is not None and keys.tolist() != expected.tolist():
            hint = f"Give {expected.tolist()}, as of the queries: a row attends to itself"
            yield _problem(name, f"{keys.tolist()}", hint)
    if len(places) != len(tokens):
        hint = f"Give {len(tokens)} numbers, as in cu_seqlens_q"
        yield _problem("cu_seqlens_q_padded", f"{len(places)} numbers", hint)
    elif bool((places.diff() < tokens.diff()).any()):
        hint = f"Give each document its tokens: cu_seqlens_q is {tokens.tolist()}"
        yield _problem("cu_seqlens_q_padded", f"{places.tolist()}", hint)
    if int(places[-1]) != sequence_length:
        name = "cu_seqlens_q" if padded is None else "cu_seqlens_q_padded"
        found = f"the last document ends at {int(places[-1])}, in a row of {sequence_length} tokens"
        yield _problem(name, found, "Make what follows a document, or padding of the last one")
    longest = int(tokens.diff().max())
    for name in ("max_seqlen_q", "max_seqlen_kv"):
        most = getattr(packed, name)
        if most is not None and int(most) < longest:
            yield _problem(name, f"{int(most)}, and a document has {longest} tokens", "Raise it")
    # Fields of later releases: the tokens of the row, and of its samples for experts' balance.
    for name in ("total_tokens", "tokens_per_sample"):
        number = getattr(packed, name, None)
        if number is not None and int(number) != sequence_length:
            found = f"{int(number)}, in a row of {sequence_length} tokens"
            yield _problem(name, found, "Leave it out")


def _problem(field: str, found: Any, hint: str) -> ConfigurationError:
    return ConfigurationError(f"packed_seq_params.{field}", str(found), hint)
