"""The cache of growing texts, with which a forward pass runs over new tokens only.

Kept per text (a row): the keys and values of every self-attention, rotated to their positions; the
states that the neighbor encoder is conditioned on; and, per layer with chunked cross-attention, the
keys and values of the neighbors that the text attends to now. A chunk's neighbors are encoded and
projected once, in the pass that completes the chunk.

A pass is either a prefill (rows that are new, whole prompts) or a step (one token for each row).
Rows have lengths of their own; shorter prompts are padded on the right.
Shapes: S new positions, B rows of the pass, T cached positions, N new chunks, K neighbors,
R retrieved length, G query groups of this rank, C channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from retro_mcore.errors import ConfigurationError


class NewChunk(NamedTuple):
    """A chunk that a pass completes.

    Attributes:
        row: Its text, as a row of the pass.
        start: The chunk's first position in the text.
        length: Its number of tokens.
    """

    row: int
    start: int
    length: int

    @property
    def last(self) -> int:
        """The chunk's last position, the first one that attends to its neighbors."""
        return self.start + self.length - 1


@dataclass
class InferencePass:
    """One forward pass, as all layers see it.

    Attributes:
        first_row: The pass is over the rows `first_row` to `first_row + B`.
        positions_SB: int64 `[S, B]`, places in the texts.
        span: T, the cached positions to look at, the new ones included.
        is_step: Whether S is 1 and the rows have a past.
        key_mask: bool `[B, 1, 1, T]` of a step, True = not this row's past. None: all is.
        chunks: The N chunks that it completes, by row and position.
        chunk_mask: bool `[K * N, R]`, True = padding or missing. None: all is attended to.
        attention_mask: The same for whom attends, `[N, R * K]`, but False for a chunk all missing.
        missing: bool `[N]`, the chunks without any neighbor.
        encoded: `[R, K * N, encoder's D]`, the encoded neighbors, for the next pipeline stage.
    """

    first_row: int
    positions_SB: Tensor
    span: int
    is_step: bool
    key_mask: Tensor | None
    chunks: Sequence[NewChunk] = ()
    chunk_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    missing: Tensor | None = None
    encoded: Tensor | None = None

    def keys_beyond(self, window: int | None) -> Tensor | None:
        """`key_mask` of a layer whose positions attend to the last `window` tokens alone."""
        if window is None or self.span <= window:
            return self.key_mask
        past = torch.arange(self.span, device=self.positions_SB.device)
        before = (past <= self.positions_SB[0][:, None] - window)[:, None, None, :]
        return before if self.key_mask is None else before | self.key_mask

    @property
    def rows(self) -> slice:
        """The rows of the pass in the cache."""
        return slice(self.first_row, self.first_row + self.positions_SB.size(1))


@dataclass
class _Neighbors:
    """The neighbors that the rows attend to now."""

    starts: list[int]
    mask: Tensor | None = None
    has: Tensor | None = None
    key_values: dict[int, Tensor] = field(default_factory=dict)


class InferenceContext:
    """The cache of a model (of a pipeline stage), for `max_batch_size` texts.

    It goes to the decoder as its `inference_context`: RetroSelfAttention and ChunkedCrossAttention
    know it.

    Args:
        max_batch_size: Most texts at a time.
        max_sequence_length: Most tokens of a text.
    """

    def __init__(self, max_batch_size: int, max_sequence_length: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_sequence_length = max_sequence_length
        #: Tokens of each text that are cached.
        self.lengths: list[int] = []
        self._current: InferencePass | None = None
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._states: Tensor | None = None
        self._neighbors = _Neighbors([0] * max_batch_size)

    # What megatron's layers ask of any context.
    def is_static_batching(self) -> bool:
        return True

    def is_dynamic_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        return True

    @property
    def current(self) -> InferencePass:
        """The pass that is running."""
        assert self._current is not None, "start a pass first: prefill or step"
        return self._current

    def prefill(self, lengths: Sequence[int], device: torch.device) -> InferencePass:
        """Begin a pass over the whole prompts of new texts, which become the last rows."""
        first = len(self.lengths)
        longest = max(lengths)
        if first + len(lengths) > self.max_batch_size or longest > self.max_sequence_length:
            raise ConfigurationError(
                "inference context",
                f"{first + len(lengths)} texts of up to {longest} tokens",
                f"It holds {self.max_batch_size} of {self.max_sequence_length}",
            )
        positions = torch.arange(longest, device=device)[:, None].expand(longest, len(lengths))
        self.lengths += lengths
        self._forget_neighbors(slice(first, len(self.lengths)))
        self._current = InferencePass(first, positions, longest, False, None)
        return self._current

    def step(self, device: torch.device) -> InferencePass:
        """Begin a pass over one more token of every text."""
        if max(self.lengths) >= self.max_sequence_length:
            raise ConfigurationError(
                "inference context",
                f"a text of more than {self.max_sequence_length} tokens",
                "Create it for longer texts",
            )
        positions = torch.tensor([self.lengths], device=device)
        mask = None
        if min(self.lengths) != max(self.lengths):
            past = torch.arange(max(self.lengths) + 1, device=device)
            mask = (past > positions[0][:, None])[:, None, None, :]
        self._current = InferencePass(0, positions, max(self.lengths) + 1, True, mask)
        self.lengths = [length + 1 for length in self.lengths]
        return self._current

    def completes(self, chunks: Sequence[NewChunk], chunk_mask: Tensor | None) -> None:
        """Say which chunks the current pass completes, before it runs.

        Args:
            chunks: N of them, in the order of rows and positions.
            chunk_mask: bool `[N, K, R]`, True = padding or missing. None: all is attended to.
        """
        if not chunks:
            return
        current, neighbors = self.current, self._neighbors
        current.chunks = list(chunks)
        device = current.positions_SB.device
        if neighbors.has is None:
            neighbors.has = torch.zeros(self.max_batch_size, dtype=torch.bool, device=device)
        last = self.last_chunks()
        rows = torch.tensor([current.first_row + chunks[place].row for place in last])
        for row, place in zip(rows.tolist(), last, strict=True):
            neighbors.starts[row] = chunks[place].start
        if chunk_mask is None:
            neighbors.has[rows] = True
            return
        current.chunk_mask = chunk_mask.transpose(0, 1).flatten(0, 1)
        mask_NX = chunk_mask.transpose(1, 2).flatten(1)  # as join_neighbors orders the tokens
        current.missing = mask_NX.all(dim=1)
        # A row that is masked out whole would be NaN: its result is dropped instead.
        current.attention_mask = mask_NX & ~current.missing[:, None]
        if neighbors.mask is None:
            width = current.attention_mask.size(1)
            neighbors.mask = current.attention_mask.new_zeros(self.max_batch_size, width)
        neighbors.mask[rows] = current.attention_mask[last]
        neighbors.has[rows] = ~current.missing[last]

    def last_chunks(self) -> list[int]:
        """The place in `current.chunks` of each row's last new chunk."""
        return list({chunk.row: place for place, chunk in enumerate(self.current.chunks)}.values())

    def remember_keys(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Store a self-attention's new keys and values `[S, B, G, C]`."""
        if layer_number not in self._keys:
            shape = (self.max_batch_size, key.size(2), self.max_sequence_length, key.size(3))
            # Zeros: what is masked out must be finite.
            self._keys[layer_number] = key.new_zeros(shape)
            self._values[layer_number] = value.new_zeros(shape)
        for memory, states in ((self._keys, key), (self._values, value)):
            rows = memory[layer_number][self.current.rows]
            if not self.current.is_step:
                rows[:, :, : key.size(0)] = states.permute(1, 2, 0, 3)
            elif self.current.key_mask is None:
                rows[:, :, self.current.span - 1] = states[0]
            else:
                place = torch.arange(rows.size(0), device=rows.device)
                rows[place, :, self.current.positions_SB[0]] = states[0]

    def past(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """A self-attention's keys and values `[B, G, T, C]`, the new ones included."""
        rows, span = self.current.rows, self.current.span
        return self._keys[layer_number][rows, :, :span], self._values[layer_number][rows, :, :span]

    def remember_states(self, states_SBD: Tensor) -> None:
        """Store the new states that the encoder will be conditioned on."""
        if self._states is None:
            shape = (self.max_sequence_length, self.max_batch_size, states_SBD.size(2))
            self._states = states_SBD.new_zeros(shape)
        positions = self.current.positions_SB
        rows = torch.arange(positions.size(1), device=positions.device) + self.current.first_row
        self._states[positions, rows] = states_SBD

    def chunk_states(self, chunks: Sequence[NewChunk]) -> Tensor:
        """The states `[M, N, D]` of new chunks of one length M."""
        assert self._states is not None
        device = self._states.device
        starts = torch.tensor([chunk.start for chunk in chunks], device=device)
        rows = torch.tensor([chunk.row for chunk in chunks], device=device) + self.current.first_row
        return self._states[torch.arange(chunks[0].length, device=device)[:, None] + starts, rows]

    def remember_neighbors(self, layer_number: int, key_value: Tensor) -> None:
        """Store what a layer projected from the new chunks' neighbors `[R * K, N, G, 2, C]`.

        A text attends to the neighbors of its last chunk alone, so only those stay.
        """
        stored = self._neighbors.key_values
        if layer_number not in stored:
            length, _, *rest = key_value.shape
            stored[layer_number] = key_value.new_zeros(length, self.max_batch_size, *rest)
        current, last = self.current, self.last_chunks()
        rows = [current.first_row + current.chunks[place].row for place in last]
        stored[layer_number][:, rows] = key_value[:, last]

    def neighbors_now(self, layer_number: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The neighbors that the rows of a step attend to in a layer.

        Returns:
            Keys and values `[R * K, B, G, 2, C]`; the mask `[B, R * K]`, True = masked out, or
            None; and which rows have neighbors, bool `[B]`.
        """
        neighbors, rows = self._neighbors, self.current.rows
        assert neighbors.has is not None
        mask = None if neighbors.mask is None else neighbors.mask[rows]
        return neighbors.key_values[layer_number][:, rows], mask, neighbors.has[rows]

    def offsets_in_chunk(self) -> Tensor:
        """How far the positions of a step `[1, B]` are from their chunk's first token."""
        positions = self.current.positions_SB
        starts = self._neighbors.starts[self.current.rows]
        return positions - torch.tensor(starts, device=positions.device)

    @property
    def attends(self) -> bool:
        """Whether some row of the pass may attend to neighbors."""
        if self.current.is_step:
            return self._neighbors.has is not None
        return bool(self.current.chunks)

    def remove(self, row: int) -> int:
        """Forget a text; the last row takes its place. Returns the row that moved."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            for memory in (*self._keys.values(), *self._values.values()):
                memory[row, :, :length] = memory[last, :, :length]
            if self._states is not None:
                self._states[:length, row] = self._states[:length, last]
            self._neighbors.starts[row] = self._neighbors.starts[last]
            for kept in (self._neighbors.mask, self._neighbors.has):
                if kept is not None:
                    kept[row] = kept[last]
            for key_value in self._neighbors.key_values.values():
                key_value[:, row] = key_value[:, last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        return last

    def _forget_neighbors(self, rows: slice) -> None:
        if self._neighbors.has is not None:
            self._neighbors.has[rows] = False
        if self._neighbors.mask is not None:
            self._neighbors.mask[rows] = False
