"""Megatron's older checkpoints: one pickled file for each tensor and pipeline parallel rank.

    DIR/mp_rank_00/model_optim_rng.pt         tensor parallel rank 0 …
    DIR/mp_rank_00_001/model_optim_rng.pt     … of pipeline stage 1

Their names are Megatron-Core's, or those of the modules before it (InstructRetro's among them).
"""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_mcore.checkpoint.checksums import checksums_of_share, write_checksums
from retro_mcore.checkpoint.contents import check_common
from retro_mcore.checkpoint.conversion.names import from_legacy_name, legacy_cross_layers
from retro_mcore.checkpoint.conversion.weights import Weight, cut, joined_weight
from retro_mcore.checkpoint.safe_loading import load_torch_file
from retro_mcore.errors import CheckpointError

_RANK = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?$")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_OLDEST_VERSION = 2.0  # before, rows of queries, keys and values came in another order
_DECODER_LAYER = re.compile(r"^((?:decoder|encoder|transformer)\.layers\.)(\d+)(\..*)$")

State = dict[str, Tensor]


def is_torch_format(directory: Path) -> bool:
    """Whether a directory holds a checkpoint of this format."""
    return any(directory.glob("mp_rank_*/model*_rng.pt"))


def read_torch_format(directory: Path) -> tuple[dict[str, Any], dict[str, Weight], bool]:
    """A checkpoint's common state, its weights, and whether their names were the older ones.

    Weights are whole (joined over tensor parallel ranks), their layers numbered over the whole
    model. The older names are given as ours; Megatron-Core's are left as they are.

    Raises:
        CheckpointError: a rank's file is missing or damaged, or holds more than plain data.
    """
    files = _rank_files(directory)
    states = {rank: _load_state(file) for rank, file in files.items()}
    common = {key: value for key, value in states[0, 0].items() if not key.startswith("model")}
    common.setdefault("args", Namespace())
    pipelines = [_stages(files, states, rank) for rank in sorted({tensor for tensor, _ in files})]
    older = any(name.startswith(("encoder.", "transformer.")) for name in pipelines[0])
    if older:
        version = float(common.get("checkpoint_version", 0))
        if version < _OLDEST_VERSION:
            raise CheckpointError(
                directory,
                f"checkpoint version {version:g}, whose attention rows are in another order",
                "Load and save it with a Megatron-LM of 2021 or later, which writes version 3",
            )
        crossing = legacy_cross_layers(pipelines[0])
        pipelines = [_renamed(pipeline, crossing) for pipeline in pipelines]
    gated = _is_gated(pipelines[0], len(pipelines), common["args"])
    weights = {
        name: joined_weight(name, [Weight.of(pipeline[name]) for pipeline in pipelines], gated)
        for name in pipelines[0]
    }
    return common, weights, older


def write_torch_format(
    directory: Path,
    common: Mapping[str, Any],
    weights: Mapping[str, Weight],
    size: int,
    gated: bool,
) -> None:
    """Write a checkpoint of one pipeline stage.

    Args:
        directory: Made; must not exist.
        common: What each file carries beside the weights; `args` among them.
        weights: Under the names to store.
        size: Tensor parallel size.
        gated: Whether MLPs are.
    """
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for rank in range(size):
        # Of its own storage: a slice would take its whole tensor along.
        model = {
            name: cut(_sliced_as(name), weight.load(), rank, size, gated).clone()
            for name, weight in weights.items()
        }
        nested = nest(model) if any(name.startswith("encoder.") for name in model) else model
        file = temporary / f"mp_rank_{rank:02d}" / _FILES[0]
        file.parent.mkdir(parents=True)
        torch.save({**common, "model": nested}, file)
    write_checksums(temporary, [checksums_of_share(temporary)])
    temporary.replace(directory)


def nest(model: State) -> dict[str, Any]:
    """The older modules' state: dictionaries for the parts of `language_model`.

    >>> nest({"encoder.final_norm.weight": 1})
    {'language_model': {'encoder': {'final_norm.weight': 1}}}
    """
    parts: dict[str, Any] = {}
    for name, tensor in model.items():
        part, _, rest = name.partition(".")
        place = parts.setdefault(part, {})
        if part == "embedding":
            inner, _, rest = rest.partition(".")
            place = place.setdefault(inner, {})
        place[rest] = tensor
    return {"language_model": parts}


def _sliced_as(name: str) -> str:
    """The name by which `cut` knows the older modules' names."""
    return from_legacy_name(name, ()) if name.startswith("encoder.") else name


def _load_state(file: Path) -> dict[str, Any]:
    state = check_common(file, load_torch_file(file, file, mapped=True))
    parts = list(_model_parts(state))
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise CheckpointError(file, "holds no model", "Restore it")
    return state


def _rank_files(directory: Path) -> dict[tuple[int, int], Path]:
    """Files by tensor and pipeline parallel rank."""
    files: dict[tuple[int, int], Path] = {}
    for folder in sorted(directory.glob("mp_rank_*")):
        match = _RANK.match(folder.name)
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if match is None or file is None:
            raise CheckpointError(folder, f"holds no {_FILES[0]}", "Restore it, or remove it")
        if match[3] is not None:
            raise CheckpointError(folder, "has expert parallel ranks", "Only dense models convert")
        files[int(match[1]), int(match[2] or 0)] = file
    tensor, pipeline = (max(ranks) + 1 for ranks in zip(*files, strict=True))
    for rank in ((t, p) for p in range(pipeline) for t in range(tensor)):
        if rank not in files:
            raise CheckpointError(
                directory,
                f"has no file of tensor parallel rank {rank[0]}, pipeline stage {rank[1]}, of "
                f"{tensor} x {pipeline}",
                "Copy it completely",
            )
    return files


def _stages(files: Mapping, states: Mapping, tensor_rank: int) -> State:
    """One tensor parallel rank's weights over all pipeline stages, layers numbered over them."""
    ranks = sorted(rank for rank in files if rank[0] == tensor_rank)
    counts = {len(list(_model_parts(states[rank]))) for rank in ranks}
    if len(counts) != 1:
        raise CheckpointError(
            files[ranks[0]], "has different parts from the other stages", "Restore it"
        )
    whole: State = {}
    first_layer = 0
    for part in range(counts.pop()):
        for rank in ranks:  # interleaved: every stage's first part comes before any second one
            state = _flat(list(_model_parts(states[rank]))[part])
            number = -1
            for name, tensor in state.items():
                match = _DECODER_LAYER.match(name)
                if match:
                    number = max(number, int(match[2]))
                    name = f"{match[1]}{int(match[2]) + first_layer}{match[3]}"
                if not _is_copy(name, tensor, whole):
                    whole[name] = tensor
            first_layer += number + 1
    return whole


def _is_copy(name: str, tensor: Tensor, whole: State) -> bool:
    """Whether it is a later stage's copy of the tied embedding."""
    if name.startswith("word_embeddings_for_head."):
        return True
    embedding = whole.get("embedding.word_embeddings.weight")
    if name != "output_layer.weight" or embedding is None:
        return name in whole
    return embedding.shape == tensor.shape and torch.equal(embedding, tensor)


def _model_parts(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "model" in state:
        yield state["model"]
        return
    for index in range(len(state)):
        if f"model{index}" not in state:
            return
        yield state[f"model{index}"]


def _flat(model: Mapping[str, Any], prefix: str = "") -> State:
    """Tensors of nested dictionaries, by dotted names; without what carries no weights."""
    flat: State = {}
    for key, value in model.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{name}."))
        elif isinstance(value, Tensor) and not name.endswith(("_extra_state", "inv_freq")):
            flat[re.sub(r"^(?:module\.)*(?:language_model\.)?", "", name)] = value
    return flat


def _renamed(state: State, crossing: set[str]) -> State:
    return {from_legacy_name(name, crossing): tensor for name, tensor in state.items()}


def _is_gated(state: State, size: int, args: Namespace) -> bool:
    """By the MLP's own shapes: its first layer has twice the rows of its second one's columns."""
    first = next((name for name in state if name.endswith("mlp.linear_fc1.weight")), None)
    if first is None:
        return bool(getattr(args, "swiglu", False))
    second = first.replace("linear_fc1", "linear_fc2")
    return state[first].size(0) == 2 * state[second].size(1)
