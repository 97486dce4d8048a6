"""Retro under pipeline parallelism, without touching Megatron's schedules.

What crosses a stage boundary is one tensor: hidden states and, between the first and the last
layer with chunked cross-attention, the encoded neighbors behind them along dimension 0. The last
layer of a stage packs, RetroModel unpacks. The stage that encodes needs the embedding: it holds a
copy, whose gradients are summed with the first stage's before the optimizer's step.

Shapes: S sequence, B batch, D hidden, L chunks per sample, K neighbors, R retrieved length; under
sequence parallelism each rank packs its own part of S and of R. See docs/parallelism.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)
from torch import Tensor

from retro_mcore.distributed import group_timeout
from retro_mcore.errors import ConfigurationError
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.context_parallel import chunks_in_context
from retro_mcore.platform.parallel import unwrap_model

if TYPE_CHECKING:
    from retro_mcore.model.model import RetroModel

Shape = tuple[int, ...]


def stage_layer_numbers(
    config: Any, vp_stage: int | None = None, pp_rank: int | None = None
) -> range:
    """The decoder layers of a pipeline stage, 1-based.

    Args:
        config: A TransformerConfig.
        vp_stage: Virtual stage, under the interleaved schedule.
        pp_rank: Pipeline rank; this process's by default.
    """
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        where = {"layer_type": LayerType.decoder, "vp_stage": vp_stage, "pp_rank": pp_rank}
        offset = layout.get_layer_offset(**where)
        return range(offset + 1, offset + layout.get_num_layers_to_build(**where) + 1)
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return range(offset + 1, offset + get_num_layers_to_build(config, vp_stage, pp_rank) + 1)


def carries_neighbors(config: RetroConfig, last_layer: int) -> bool:
    """Whether encoded neighbors cross the boundary after layer `last_layer` (0: before layer 1)."""
    return config.retro_layer_numbers[0] <= last_layer < config.retro_layer_numbers[-1]


def is_interleaved(config: RetroConfig) -> bool:
    """Whether the schedule is the interleaved one, whose boundaries all have one shape."""
    return config.virtual_pipeline_model_parallel_size is not None


def packed_rows(config: RetroConfig, neighbors_per_sample: int) -> int:
    """Rows of dimension 0 that the encoded neighbors add to what a rank sends.

    R * L * K rows of the encoder's width, as rows of the decoder's width, divided over the
    tensor-parallel ranks under sequence parallelism.

    Args:
        config: The model's configuration.
        neighbors_per_sample: L * K, as `chunks_in_context` counts L.
    """
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    retrieved_length = config.retro_num_retrieved_chunks * config.retro_chunk_length // parts
    channels = retrieved_length * neighbors_per_sample * config.encoder_hidden_size
    return -(-channels // config.hidden_size)


def schedule_kwargs(
    config: RetroConfig,
    sequence_length: int,
    with_retrieval: bool = True,
    pp_rank: int | None = None,
) -> dict[str, Any]:
    """`seq_length` and `adjust_tensor_shapes_fn` for megatron's forward-backward function.

    Args:
        config: The model's configuration.
        sequence_length: S.
        with_retrieval: Whether the model gets neighbors in this call.
        pp_rank: Pipeline rank; this process's by default.
    """
    if config.pipeline_model_parallel_size == 1 or not with_retrieval:
        return {"seq_length": sequence_length}
    num_chunks = chunks_in_context(config, sequence_length)
    rows = packed_rows(config, num_chunks * config.retro_num_neighbors)
    if is_interleaved(config):
        # Megatron divides the length over the ranks under sequence and context parallelism.
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return {"seq_length": sequence_length + rows * parts * config.context_parallel_size}
    numbers = stage_layer_numbers(config, None, pp_rank)

    def add_rows(shapes: Sequence[Shape], last_layer: int) -> list[Shape]:
        if not carries_neighbors(config, last_layer):
            return list(shapes)
        return [(length + rows, *rest) for length, *rest in shapes]

    def adjust(receive: Sequence[Shape], send: Sequence[Shape]) -> tuple[list[Shape], list[Shape]]:
        return add_rows(receive, numbers.start - 1), add_rows(send, numbers.stop - 1)

    return {"seq_length": sequence_length, "adjust_tensor_shapes_fn": adjust}


def pack(
    hidden_SBD: Tensor, neighbors: Tensor | None, config: RetroConfig, num_neighbors: int
) -> Tensor:
    """Put the encoded neighbors behind the hidden states.

    Args:
        hidden_SBD: `[S, B, D]`.
        neighbors: `[R, K * B * L, encoder's D]`, or None for zeros.
        config: The model's configuration.
        num_neighbors: B * L * K.

    Returns:
        `[S + packed rows, B, D]` in `pipeline_dtype`, no view, so that the schedule may free it.
    """
    _, batch_size, hidden_size = hidden_SBD.shape
    rows, dtype = packed_rows(config, num_neighbors // batch_size), config.pipeline_dtype
    if neighbors is None:
        tail = hidden_SBD.new_zeros(rows, batch_size, hidden_size, dtype=dtype)
    else:
        missing = rows * batch_size * hidden_size - neighbors.numel()
        tail = torch.nn.functional.pad(neighbors.flatten(), (0, missing))
        tail = tail.view(rows, batch_size, hidden_size)
    return torch.cat((hidden_SBD.to(dtype), tail.to(dtype)))


def unpack(packed: Tensor, config: RetroConfig, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: hidden states `[S, B, D]`, neighbors `[R, K * B * L, encoder's D]`.

    Args:
        packed: `[S + packed rows, B, D]`.
        config: The model's configuration.
        num_neighbors: B * L * K.
    """
    batch_size = packed.size(1)
    rows = packed_rows(config, num_neighbors // batch_size)
    hidden_SBD, tail = packed.split((packed.size(0) - rows, rows))
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    retrieved_length = config.retro_num_retrieved_chunks * config.retro_chunk_length // parts
    shape = (retrieved_length, num_neighbors, config.encoder_hidden_size)
    return hidden_SBD, tail.flatten()[: math.prod(shape)].view(shape)


class RetroTransformerLayer(TransformerLayer):
    """A transformer layer that, where its stage ends, sends the encoded neighbors along.

    Args:
        packing: Whether this is the last layer of a stage whose boundary has room for neighbors.
        **kwargs: As TransformerLayer takes them.
    """

    def __init__(self, *args: Any, packing: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.packing = packing

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """TransformerLayer's forward; the output is packed if this layer ends its stage.

        Packing here, not after the block, puts it under activation recomputation too.
        """
        hidden_states, context = super().forward(*args, **kwargs)
        mask = kwargs.get("context_mask")
        if self.packing and mask is not None:
            sent = context if carries_neighbors(self.config, self.layer_number) else None
            hidden_states = pack(hidden_states, sent, self.config, mask.size(0))
        return hidden_states, context


@dataclass(frozen=True)
class EmbeddingGroups:
    """Who holds a copy of the embedding because the neighbor encoder's stage needs one.

    Attributes:
        word: The ranks with a word embedding: first stage, encoder's stage, and the last stage if
            it ties its output weights. None: no copies.
        position: The ranks with learned positions: first and encoder's stage. None: no copies.
    """

    word: dist.ProcessGroup | None = None
    position: dist.ProcessGroup | None = None


def create_embedding_groups(
    config: RetroConfig, pipeline_group: dist.ProcessGroup, tied_output: bool
) -> EmbeddingGroups:
    """Groups of the ranks that hold copies of the embedding. Every rank must call this.

    Args:
        config: The model's configuration.
        pipeline_group: This rank's pipeline-parallel group.
        tied_output: Whether output and embedding weights are shared.
    """
    if config.pipeline_model_parallel_size == 1:
        return EmbeddingGroups()
    encoder, last = _encoder_rank(config), config.pipeline_model_parallel_size - 1
    position = sorted({0, encoder})
    word = sorted({0, encoder, last} if tied_output else {0, encoder})
    pipelines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, dist.get_process_group_ranks(pipeline_group))
    return EmbeddingGroups(_new_group(pipelines, word), _new_group(pipelines, position))


def _encoder_rank(config: RetroConfig) -> int:
    for pp_rank in range(config.pipeline_model_parallel_size):
        for vp_stage in range(config.virtual_pipeline_model_parallel_size or 1):
            stage = vp_stage if is_interleaved(config) else None
            if config.retro_layer_numbers[0] in stage_layer_numbers(config, stage, pp_rank):
                return pp_rank
    raise ConfigurationError(
        "pipeline_model_parallel_layout",
        f"no stage holds layer {config.retro_layer_numbers[0]}",
        "Give every decoder layer to a stage",
    )


def _new_group(pipelines: Iterable[list[int]], members: list[int]) -> dist.ProcessGroup | None:
    own = None
    for ranks in sorted({tuple(ranks) for ranks in pipelines}):
        group_ranks = [ranks[member] for member in members]
        group = dist.new_group(group_ranks, timeout=group_timeout(), group_desc="EMBEDDING_COPIES")
        if dist.get_rank() in group_ranks:
            own = group
    return own


def synchronize_embedding_copies(stages: Sequence[Any], groups: EmbeddingGroups) -> None:
    """Give every copy of the embedding the first stage's values; once, after construction.

    Args:
        stages: This rank's stages (RetroModels, wrapped or not).
    """
    for group, pick in ((groups.word, _word_weights), (groups.position, _position_weights)):
        if group is None or not (held := pick(stages)).all:
            continue
        values = (held.source if held.source is not None else held.all[0]).data
        if dist.get_backend(group) == "nccl":
            values = values.cuda()  # no copy, unless weights are initialized in host memory
        dist.broadcast(values, dist.get_global_rank(group, 0), group)
        for weight in held.all:
            weight.data.copy_(values)


def finalize_model_grads_with(
    groups: EmbeddingGroups, finalize: Callable = finalize_model_grads
) -> Callable:
    """megatron's `finalize_model_grads`, followed by the sum over the embedding's copies.

    Set it as `config.finalize_model_grads_func`.

    Args:
        groups: The ranks with copies.
        finalize: A function to use in place of megatron's.
    """
    return partial(_finalize_model_grads, groups, finalize)


def share_embedding(model: RetroModel, pipeline: dist.ProcessGroup) -> None:
    """Keep the copies of the embedding equal in a trainer that only asks for the model.

    They are synchronized here, and the model's forward pass has the trainer sum their gradients.
    All ranks call it together, with a stage that is not wrapped yet.

    Args:
        model: This rank's stage.
        pipeline: This rank's pipeline-parallel group.
    """
    tied = model.share_embeddings_and_output_weights
    model.embedding_groups = create_embedding_groups(model.config, pipeline, tied)
    synchronize_embedding_copies([model], model.embedding_groups)


def finalize_with_copies(config: RetroConfig, groups: EmbeddingGroups) -> None:
    """Have the trainer's function that finalizes gradients also sum those of the copies.

    Trainers set their function after they have built the model, some at the start of training.

    Args:
        config: The model's, which schedules read the function from.
        groups: The ranks with copies.
    """
    finalize = config.finalize_model_grads_func
    wrapped = isinstance(finalize, partial) and finalize.func is _finalize_model_grads
    if finalize is not None and not wrapped:
        config.finalize_model_grads_func = finalize_model_grads_with(groups, finalize)


def _finalize_model_grads(
    groups: EmbeddingGroups, finalize: Callable, model: Sequence[Any], *args: Any, **kwargs: Any
) -> None:
    finalize(model, *args, **kwargs)
    for group, pick in ((groups.word, _word_weights), (groups.position, _position_weights)):
        if group is None or not (held := pick(model)).all:
            continue
        if not held.all[0].requires_grad:  # frozen on all ranks: no gradients
            continue
        # Tied output weights hold the first stage's sum already: megatron added the two.
        addends = [weight for weight in (held.source, *held.copies) if weight is not None]
        total = torch.zeros_like(held.all[0].main_grad)
        for weight in addends:
            total += weight.main_grad
        dist.all_reduce(total, group=group)
        for weight in held.all:
            weight.main_grad.copy_(total)


@dataclass
class _Held:
    """The weights of one embedding table that this rank holds."""

    source: Any
    copies: list[Any]
    output: list[Any]

    @property
    def all(self) -> list[Any]:
        first = [] if self.source is None else [self.source]
        return [*first, *self.copies, *self.output]


def _word_weights(stages: Sequence[Any]) -> _Held:
    models = [unwrap_model(stage) for stage in stages]
    return _Held(
        source=next((m.embedding.word_embeddings.weight for m in models if m.pre_process), None),
        copies=[m.embedding.word_embeddings.weight for m in models if m.has_own_embedding_copy],
        output=[
            m.output_layer.weight
            for m in models
            if m.post_process and not m.pre_process and m.share_embeddings_and_output_weights
        ],
    )


def _position_weights(stages: Sequence[Any]) -> _Held:
    models = [
        model
        for model in map(unwrap_model, stages)
        if model.position_embedding_type == "learned_absolute"
    ]
    return _Held(
        source=next(
            (m.embedding.position_embeddings.weight for m in models if m.pre_process), None
        ),
        copies=[m.embedding.position_embeddings.weight for m in models if m.has_embedding_copy],
        output=[],
    )
