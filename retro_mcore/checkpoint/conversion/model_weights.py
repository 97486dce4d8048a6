"""Between whole weights and a model that is spread over tensor and pipeline parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from retro_mcore.checkpoint.conversion.names import local_name, shift_expert, split_expert_name
from retro_mcore.checkpoint.conversion.weights import (
    Weights,
    cut,
    fit_vocabulary,
    is_vocabulary,
    join,
    partition_dim,
)
from retro_mcore.distributed import get_rank, get_world_size, raise_together
from retro_mcore.errors import CheckpointError
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.pipeline import stage_layer_numbers

_DECODER_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EMBEDDING = "embedding.word_embeddings.weight"


def whole_name(model: DecoderModel, name: str) -> str:
    """A parameter's name in the whole model: layers are numbered over all pipeline stages, and a
    tied output weight is the embedding."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return _EMBEDDING
    first = stage_layer_numbers(model.config, model.vp_stage).start - 1
    name = shift_expert(name, _first_expert(model))
    return _DECODER_LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first}.", name)


def whole_shape(model: DecoderModel, name: str, tensor: Tensor) -> tuple[int, ...]:
    """Shape of a parameter over all tensor parallel ranks."""
    shape, dim = list(tensor.shape), partition_dim(name)
    if dim is not None:
        shape[dim] *= get_world_size(_group_of(model, name))
    return tuple(shape)


def _first_expert(model: DecoderModel) -> int:
    """Number of this rank's first expert, from 0."""
    experts = model.config.num_moe_experts
    if experts is None:
        return 0
    group = model.pg_collection.ep
    return get_rank(group) * experts // get_world_size(group)


def _group_of(model: DecoderModel, name: str) -> dist.ProcessGroup:
    """The ranks that a parameter is split over."""
    groups = model.pg_collection
    return groups.tp if split_expert_name(name) is None else groups.expt_tp


def put_weights(
    models: Sequence[DecoderModel],
    weights: Weights,
    vocab_size: int | None = None,
    fresh: Iterable[str] = (),
    source: object = "the checkpoint",
    hint: str = "Build the model with the checkpoint's own arguments",
    named: Callable[[str], str] = str,
) -> list[str]:
    """Copy whole weights into this rank's parts of a model; all ranks call it together.

    Args:
        models: This rank's stages (one, or several in the interleaved schedule).
        weights: By our names; more than this rank's.
        vocab_size: The tokenizer's. If given, the checkpoint may pad its vocabulary otherwise.
        fresh: Regular expressions of parameters that keep their values if `weights` lacks them.
        source: The checkpoint, for the error.
        hint: What to do about it, for the error.
        named: Our parameter names to the checkpoint's, for the error.

    Returns:
        Names, over all ranks, of the parameters that kept their values.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape; nothing is changed.
    """
    kept: set[str] = set()
    own: list[tuple[DecoderModel, str, Tensor]] = []
    with raise_together():
        for model in models:
            own += [(model, name, value) for name, value in parameters(model)]
        known = {local_name(name) for _, name, _ in own}
    known = _union(known, models[0])
    with raise_together():
        problems = [f"unknown {named(name)}" for name in weights.keys() - known]
        for model, name, tensor in own:
            local = local_name(name)
            if local in weights:
                problem = _shape_problem(model, local, tensor, weights, vocab_size)
                problems += [f"{named(local)} {problem}"] if problem else []
            elif any(re.search(pattern, local) for pattern in fresh):
                kept.add(local)
            else:
                problems.append(f"missing {named(local)}")
        if problems:
            raise CheckpointError(source, "; ".join(sorted(set(problems))), hint)
    with raise_together(), torch.no_grad():
        for model, name, tensor in own:
            if local_name(name) in weights:
                tensor.copy_(_part(model, local_name(name), tensor, weights, vocab_size))
    return sorted(_union(kept, models[0]))


def gather_weights(models: Sequence[DecoderModel]) -> dict[str, Tensor]:
    """The whole model's weights under our names (fused norms keep theirs), on every rank, on the
    CPU; all ranks call it together."""
    own: dict[str, Tensor] = {}
    for model in models:
        gated = model.config.gated_linear_unit
        for name, tensor in parameters(model):
            if name not in own:
                own[name] = _gather_tensor_parallel(model, name, tensor.detach(), gated)
    for group in _groups_of_parts(models[0]):
        parts: list[dict[str, Tensor]] = [{}] * get_world_size(group)
        dist.all_gather_object(parts, own, group=group)
        own = {name: tensor for part in parts for name, tensor in part.items()}
    return own


def parameters(model: DecoderModel) -> list[tuple[str, Tensor]]:
    """A stage's parameters under their names in the whole model."""
    state = model.state_dict(keep_vars=True)
    return [
        (whole_name(model, name), value)
        for name, value in state.items()
        if isinstance(value, Tensor) and not name.endswith("_extra_state")
    ]


def _shape_problem(
    model: DecoderModel, name: str, tensor: Tensor, weights: Weights, vocab_size: int | None
) -> str | None:
    wanted, found = whole_shape(model, name, tensor), weights[name].shape
    if vocab_size is not None and is_vocabulary(name):
        if found[0] < vocab_size:
            return f"has {found[0]} rows for a vocabulary of {vocab_size}"
        wanted = (found[0], *wanted[1:])
    return None if wanted == found else f"is {found}, not {wanted}"


def _part(
    model: DecoderModel, name: str, tensor: Tensor, weights: Weights, vocab_size: int | None
) -> Tensor:
    group = _group_of(model, name)
    whole = weights[name].load()
    if vocab_size is not None and is_vocabulary(name):
        whole = fit_vocabulary(whole, tensor.size(0) * get_world_size(group), vocab_size)
    gated = model.config.gated_linear_unit
    return cut(name, whole, get_rank(group), get_world_size(group), gated)


def _gather_tensor_parallel(model: DecoderModel, name: str, tensor: Tensor, gated: bool) -> Tensor:
    group = _group_of(model, name)
    if get_world_size(group) == 1:
        return tensor.cpu().clone()
    parts = [torch.empty_like(tensor) for _ in range(get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return join(name, [part.cpu() for part in parts], gated)


def _union(names: set[str], model: DecoderModel) -> set[str]:
    """Over the pipeline's stages, and ranks with other experts."""
    for group in _groups_of_parts(model):
        parts: list[set[str]] = [set()] * get_world_size(group)
        dist.all_gather_object(parts, names, group=group)
        names = set().union(*parts)
    return names


def _groups_of_parts(model: DecoderModel) -> list[dist.ProcessGroup]:
    """The groups of more than one rank whose ranks hold other parameters."""
    groups = [model.pg_collection.pp]
    groups += [] if model.config.num_moe_experts is None else [model.pg_collection.ep]
    return [group for group in groups if get_world_size(group) > 1]
