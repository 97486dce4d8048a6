"""Chunks of a forward pass, and the cache of growing texts.

Shapes: B batch, S tokens of the pass, N chunks that it completes, M chunk length, K neighbors,
R retrieved length, D hidden size, G key and value heads, C channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

#: First token of each text in its row, and the end of it: the rest of the row is padding.
Spans = list[tuple[int, int]]


def spans_of(attention_mask: Tensor | None, batch_size: int, length: int) -> Spans:
    """Where the texts of a batch begin and end.

    Args:
        attention_mask: `[B, length]`, 0 = padding, at one side or both. None, or a mask with four
            dimensions: there is no padding.
        batch_size: B.
        length: Tokens of a row, cached ones included.

    Raises:
        ValueError: the mask has another length, or padding inside a text.
    """
    if attention_mask is None or attention_mask.dim() == 4:
        return [(0, length)] * batch_size
    if attention_mask.shape != (batch_size, length):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected "
            f"{[batch_size, length]}: one value per token, cached ones included"
        )
    real = attention_mask.bool()
    counts = real.sum(1)
    # A row of padding alone may go on with a text in the next pass.
    firsts = torch.where(counts > 0, real.int().argmax(1), length)
    edges = (real[:, 1:] != real[:, :-1]).sum(1)
    most = 2 - real[:, 0].int() - real[:, -1].int()
    if bool((edges > most).any()):
        raise ValueError("attention_mask has padding inside a text; pad at its ends")
    pairs = zip(firsts.tolist(), counts.tolist(), strict=True)
    return [(first, first + count) for first, count in pairs]


@dataclass
class ChunkPlan:
    """The chunks of a pass over S tokens, and which positions attend to their neighbors.

    Attributes:
        batch_size, length: B and S.
        chunk_length: M.
        rows: Each chunk's row in the batch.
        places: Its number among the chunks that the pass completes in this row.
        starts: Its first token, counted from the pass's first one; negative if it is cached.
        lengths: Its tokens: M, or fewer in the partial first chunk of a right-aligned grid.
        regular: All rows have the same whole chunks from the pass's first token on.
        mask: bool `[N, K * R]`, True where its neighbors are attended to. None: everywhere.
        has: bool `[N]`, which chunks have any neighbor. None: all.
    """

    batch_size: int
    length: int
    chunk_length: int
    rows: list[int]
    places: list[int]
    starts: list[int]
    lengths: list[int]
    regular: bool = False
    mask: Tensor | None = None
    has: Tensor | None = None

    @classmethod
    def of(
        cls, spans: Spans, past: int, length: int, chunk_length: int, alignment: str
    ) -> ChunkPlan:
        """The chunks whose last token is in a pass.

        Args:
            spans: The texts, counted from the first cached token.
            past: Cached tokens.
            length: S, tokens of the pass.
            chunk_length: M.
            alignment: "left" or "right"; right only without cached tokens.
        """
        plan = cls(len(spans), length, chunk_length, [], [], [], [])
        for row, (first, stop) in enumerate(spans):
            head = (stop - first) % chunk_length if alignment == "right" else 0
            done = max(past - first, 0) // chunk_length
            total = max(stop - first, 0) // chunk_length
            if head:
                plan.add(row, 0, first - past, head)
            for chunk in range(done, total):
                start = first + head + chunk * chunk_length - past
                plan.add(row, chunk - done + bool(head), start, chunk_length)
        whole = alignment == "left" or length % chunk_length == 0
        plan.regular = past == 0 and whole and all(span == (0, length) for span in spans)
        return plan

    def add(self, row: int, place: int, start: int, length: int) -> None:
        """Add a chunk: see the attributes."""
        self.rows.append(row)
        self.places.append(place)
        self.starts.append(start)
        self.lengths.append(length)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def most(self) -> int:
        """The most chunks of a row."""
        return max(self.places, default=-1) + 1

    def after(self, cached: ChunkPlan) -> ChunkPlan:
        """These chunks after those that the cache still attends to."""
        return ChunkPlan(
            self.batch_size,
            self.length,
            self.chunk_length,
            cached.rows + self.rows,
            cached.places + self.places,
            cached.starts + self.starts,
            cached.lengths + self.lengths,
            mask=_join(cached.mask, self.mask),
            has=_join(cached.has, self.has),
        )

    def content(self, states: Tensor) -> Tensor:
        """The chunks' tokens `[N, M, ...]`; zeros after a partial chunk.

        Args:
            states: `[B, T, ...]`, those of the pass, after as many cached ones as there are.
        """
        size = self.chunk_length
        if self.regular:
            chunks = self.length // size
            return states[:, : chunks * size].unflatten(1, (chunks, size)).flatten(0, 1)
        before = states.size(1) - self.length
        rows, starts, lengths = self._tensors(states.device)
        offsets = torch.arange(size, device=states.device)
        index = (starts[:, None] + before + offsets).clamp(0, states.size(1) - 1)
        found = states[rows[:, None], index]
        if min(self.lengths, default=size) < size:
            inside = offsets < lengths[:, None]
            found = found * inside.view(*inside.shape, *[1] * (found.dim() - 2))
        return found

    def attending(self, states_BSX: Tensor) -> Tensor:
        """The M positions `[N, M, X]` that attend to each chunk's neighbors, from its last token
        on; anything beyond the pass."""
        if self.regular:
            size, chunks = self.chunk_length, self.length // self.chunk_length
            states = states_BSX[:, size - 1 :]
            states = torch.nn.functional.pad(states, (0, 0, 0, chunks * size - states.size(1)))
            return states.unflatten(1, (chunks, size)).flatten(0, 1)
        rows, index, _ = self._attending_index(states_BSX.device)
        return states_BSX[rows[:, None], index]

    def put_back(self, attended_NMX: Tensor) -> Tensor:
        """The inverse of `attending`: `[B, S, X]`, zeros where nothing is attended to."""
        if self.regular:
            first = self.chunk_length - 1
            joined = attended_NMX.unflatten(0, (self.batch_size, -1)).flatten(1, 2)
            return torch.nn.functional.pad(joined[:, : self.length - first], (0, 0, first, 0))
        rows, index, inside = self._attending_index(attended_NMX.device)
        size = attended_NMX.size(-1)
        result = attended_NMX.new_zeros(self.batch_size, self.length, size)
        where = (rows[:, None].expand_as(index)[inside], index[inside])
        return result.index_put(where, attended_NMX[inside])

    def attends(self, device: torch.device) -> Tensor:
        """Which positions attend to some neighbor, bool `[B, S, 1]`."""
        has = torch.ones(len(self), device=device) if self.has is None else self.has.to(device)
        ones = has.float()[:, None, None].expand(-1, self.chunk_length, 1)
        return self.put_back(ones) > 0

    def _attending_index(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        rows, starts, lengths = self._tensors(device)
        offsets = torch.arange(self.chunk_length, device=device)
        index = (starts + lengths - 1)[:, None] + offsets
        inside = (index >= 0) & (index < self.length)
        return rows, index.clamp(0, self.length - 1), inside

    def _tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        lists = (self.rows, self.starts, self.lengths)
        return tuple(torch.tensor(each, dtype=torch.long, device=device) for each in lists)

    def last_of_rows(self) -> list[int]:
        """Each row's last chunk, by its number here."""
        return list({row: chunk for chunk, row in enumerate(self.rows)}.values())


def _join(cached: Tensor | None, new: Tensor | None) -> Tensor | None:
    if cached is None or new is None:
        return cached if new is None else new
    return torch.cat((cached, new))


class RetroCache(DynamicCache):
    """Transformers' cache of self-attention, and what retrieval needs to go on with a text.

    Kept besides: the tokens and the states of the incomplete chunk, on which the encoder of its
    neighbors will be conditioned, and per cross-attending layer the keys and values of the
    neighbors that each text attends to now, encoded once per chunk.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        self.spans: Spans | None = None
        #: Whether the cached pass had the chunks of a growing text.
        self.can_continue = True
        self.tokens: Tensor | None = None  # [B, up to M - 1]
        self.states: Tensor | None = None  # [B, up to M - 1, D]
        self.starts: list[int | None] = []  # of the attended chunk, in the whole row
        self.earlier: ChunkPlan | None = None
        self.mask: Tensor | None = None  # [B, K * R]
        self.has: Tensor | None = None  # [B]
        self.neighbor_keys: dict[int, Tensor] = {}  # [B, G, K * R, C]
        self.neighbor_values: dict[int, Tensor] = {}

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens can be taken back: not those of a chunk that is encoded."""
        return False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: neighbors of a chunk cannot be exchanged for those of the chunk before."""
        raise ValueError("RetroCache cannot be cropped: assisted generation needs another model")

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def remember_tokens(self, tokens: Tensor, chunk_length: int) -> Tensor:
        """Keep the last tokens; returns the earlier ones and these."""
        tokens = _after(self.tokens, tokens)
        self.tokens = tokens[:, max(0, tokens.size(1) - chunk_length + 1) :]
        return tokens

    def remember_states(self, states: Tensor, chunk_length: int) -> Tensor:
        """Keep the last states; returns the earlier ones and these."""
        states = _after(self.states, states)
        self.states = states[:, max(0, states.size(1) - chunk_length + 1) :]
        return states

    def begin(self, past: int, length: int, chunk_length: int) -> None:
        """Begin a pass: its first tokens attend to the neighbors of cached chunks."""
        self.earlier = None
        known = [(row, start) for row, start in enumerate(self.starts) if start is not None]
        if self.has is None or not known or length == 1:
            return
        plan = ChunkPlan(len(self.starts), length, chunk_length, [], [], [], [])
        for row, start in known:
            plan.add(row, 0, start - past, chunk_length)
        plan.has = self.has[plan.rows]
        plan.mask = None if self.mask is None else self.mask[plan.rows]
        self.earlier = plan

    def attend_to(self, plan: ChunkPlan, past: int) -> None:
        """Take note of the chunks that a pass completes: later tokens attend to their neighbors."""
        if not len(plan):
            return
        last = plan.last_of_rows()
        rows = [plan.rows[chunk] for chunk in last]
        assert plan.has is not None
        if self.has is None:
            self.starts = [None] * plan.batch_size
            self.has = plan.has.new_zeros(plan.batch_size)
            if plan.mask is not None:
                self.mask = plan.mask.new_ones(plan.batch_size, plan.mask.size(1))
        for row, chunk in zip(rows, last, strict=True):
            self.starts[row] = plan.starts[chunk] + past
        index = torch.tensor(rows, device=self.has.device)
        self.has = self.has.index_copy(0, index, plan.has[last])
        if self.mask is not None and plan.mask is not None:
            self.mask = self.mask.index_copy(0, index, plan.mask[last])

    def join_neighbors(
        self, layer: int, plan: ChunkPlan, key_value: tuple[Tensor, Tensor] | None
    ) -> tuple[ChunkPlan, tuple[Tensor, Tensor] | None]:
        """A layer's keys and values, with those that the first tokens of the pass attend to.

        Those of each row's last chunk are kept for later passes.

        Args:
            layer: The layer's number.
            plan: The chunks that the pass completes.
            key_value: Theirs, `[N, G, K * R, C]` each; None: there are no such chunks.
        """
        earlier, stored = self.earlier, None
        if earlier is not None:
            rows = earlier.rows
            stored = self.neighbor_keys[layer][rows], self.neighbor_values[layer][rows]
        if key_value is not None:
            self._remember_neighbors(layer, plan, *key_value)
        if earlier is None or stored is None:
            return plan, key_value
        if key_value is None:
            return plan.after(earlier), stored
        key, value = (torch.cat(pair) for pair in zip(stored, key_value, strict=True))
        return plan.after(earlier), (key, value)

    def _remember_neighbors(self, layer: int, plan: ChunkPlan, key: Tensor, value: Tensor) -> None:
        last = plan.last_of_rows()
        rows = torch.tensor([plan.rows[chunk] for chunk in last], device=key.device)
        for memory, states in ((self.neighbor_keys, key), (self.neighbor_values, value)):
            if layer not in memory:
                memory[layer] = states.new_zeros(plan.batch_size, *states.shape[1:])
            memory[layer] = memory[layer].index_copy(0, rows, states[last])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._select(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        known = self.spans or self.starts
        self._select([row for row in range(len(known)) for _ in range(repeats)])

    def _select(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        for name in ("tokens", "states", "mask", "has"):
            kept = getattr(self, name)
            setattr(self, name, None if kept is None else kept[rows])
        for memory in (self.neighbor_keys, self.neighbor_values):
            memory.update({layer: states[rows] for layer, states in memory.items()})
        self.starts = [self.starts[row] for row in rows] if self.starts else []
        self.spans = [self.spans[row] for row in rows] if self.spans else None


def _after(kept: Tensor | None, states: Tensor) -> Tensor:
    return states if kept is None else torch.cat((kept.to(states.device), states), dim=1)
