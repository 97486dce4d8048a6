"""Writing checkpoints in the formats that they convert to."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from retro_mcore.checkpoint.conversion.model_fields import (
    MODEL_FIELDS,
    RETRIEVAL_FIELDS,
    Flags,
    Target,
)
from retro_mcore.checkpoint.conversion.names import fused_name, to_legacy_name, to_upstream_name
from retro_mcore.checkpoint.conversion.weights import Weight, Weights, fit_vocabulary, is_vocabulary
from retro_mcore.checkpoint.torch_dist import write_torch_dist
from retro_mcore.checkpoint.torch_format import write_torch_format
from retro_mcore.checkpoint.tracker import RELEASE, TRACKER, checkpoint_path
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.model.option_traits import MEGATRON, Implementation, names_there
from retro_mcore.model.options import CHANGED_DEFAULTS, DecoderOptions
from retro_mcore.project.atomic import atomic_write

_ORIGINS = {
    "megatron": ("mcore-0.15", "mcore-0.5"),
    "megatron-torch": ("mcore-0.15", "mcore-0.5"),
    "instructretro": ("legacy",),
}
# They compute every option of ours. (An own module refuses what transformers' model lacks.)
_ALL_OPTIONS = ("retro-mcore", "huggingface")
_LAYER = re.compile(r"^((?:decoder|neighbor_encoder)\.layers\.\d+)\.cross_attention\.")


def check_number_of_files(target: Target, tensor_parallel_size: int) -> None:
    """Reject a tensor parallel size that the target does not have.

    Raises:
        ConfigurationError: naming --target-tensor-parallel-size.
    """
    one_file = target in ("retro-mcore", "megatron", "huggingface")
    if tensor_parallel_size < 1 or (one_file and tensor_parallel_size > 1):
        raise ConfigurationError(
            "--target-tensor-parallel-size",
            f"{tensor_parallel_size} with --target {target}",
            "torch_dist checkpoints load into any layout: leave it out"
            if one_file
            else "1 or more",
        )


def check_origin(target: Target, flags: Flags, forced: bool = False) -> None:
    """Reject a target that would compute something else with the model.

    Args:
        target: The implementation's format.
        flags: Options of the model.
        forced: Whether the user named the origin, and so knows.

    Raises:
        ConfigurationError: naming --retro-origin.
    """
    if target in _ALL_OPTIONS:
        return
    lacked = [f"{name} {flags[name]}" for name in _lacked(target, flags)]
    if lacked:
        raise ConfigurationError(
            f"--target {target}",
            f"cannot represent {', '.join(lacked)}, which the model's results depend on",
            "Keep it in retro-mcore's format",
        )
    check_window(target, flags)
    if target == "megatron-torch" and flags.get("num_experts") is not None:
        raise ConfigurationError(
            "--target megatron-torch",
            f"has files by expert parallel rank, and this model has {flags['num_experts']} experts",
            "Use --target megatron",
        )
    if flags["no_retrieval"]:
        return
    if flags.get("retro_decoder_layers") is not None and not forced:
        raise ConfigurationError(
            f"--target {target}",
            "has cross-attention in every third layer from 6 (9 above 15), and this model in "
            f"{flags['retro_decoder_layers']}",
            f"Keep it in retro-mcore's format, or give --retro-origin {_ORIGINS[target][0]}",
        )
    origin = flags.get("retro_origin")
    if origin not in _ORIGINS[target]:
        raise ConfigurationError(
            f"--target {target}",
            f"computes as {' or '.join(_ORIGINS[target])} does, and this model was trained as "
            f"{origin or 'the paper describes'}",
            "Choose another target; or, to write the weights anyway, give --retro-origin "
            + _ORIGINS[target][0],
        )


def _lacked(target: Target, flags: Flags) -> Iterator[str]:
    """Options that change what the model computes, and that the target's code does not have."""
    gpt: bool = flags["no_retrieval"]
    code: Implementation = "instructretro"
    if target != "instructretro":
        code = "megatron-gpt" if gpt else "megatron-retro"
    for name, traits in MODEL_FIELDS.items():
        used = traits.gpt == "same" or not gpt
        if name in CHANGED_DEFAULTS and flags.get("retro_origin") is None:
            continue  # one of the paper's differences, which are refused together
        if used and traits.is_lost(flags.get(name, traits.absent), flags, code):
            yield name


def notes_on_target(target: Target, flags: Flags) -> list[str]:
    """Remarks for the user about options that the target's Retro computes with restrictions."""
    if target in _ALL_OPTIONS or flags["no_retrieval"]:
        return []
    notes = _ignored_by_script(flags) if target != "instructretro" else []
    heads = flags["num_attention_heads"]
    if flags.get("num_query_groups") not in (None, heads):
        notes.append(
            f"its {flags['num_query_groups']} query groups for {heads} heads: Megatron refuses to "
            "build cross-attention with them"
        )
    return notes


def _ignored_by_script(flags: Flags) -> list[str]:
    """Options of the rotary embedding that megatron-core computes, if its model is given them.

    Megatron-LM's pretrain_retro.py gives it the share of rotated channels alone, whatever its
    arguments and the checkpoint's say.
    """
    if flags.get("position_embedding_type") != "rope":
        return []
    names = {
        there: flags[name]
        for name, there in names_there("model", DecoderOptions).items()
        if MODEL_FIELDS[name].computed_by == MEGATRON
        and flags.get(name) not in (None, MODEL_FIELDS[name].absent)
    }
    return [
        f"Megatron-LM's pretrain_retro.py ignores {name} {value}: pass it to RetroModel yourself"
        for name, value in names.items()
    ]


def check_window(target: Target, flags: Flags) -> None:
    """Reject a target that attends to all tokens, if the model's window is shorter than its texts.

    (Megatron has windows, but takes none from a checkpoint.)

    Raises:
        ConfigurationError: texts may be longer than the window.
    """
    window, length = flags.get("sliding_window"), flags.get("seq_length") or 0
    if target not in _ALL_OPTIONS and window is not None and length > window:
        raise ConfigurationError(
            f"--target {target}",
            f"computes full attention, and this model attends to the last {window} tokens of "
            f"{length}",
            "Keep it in retro-mcore's format; or, for texts that fit, convert it with the "
            f"--project-dir of shorter samples, or with seq_length: {window} in --model-config",
        )


def write_checkpoint(
    directory: Path,
    target: Target,
    args: Namespace,
    flags: Flags,
    weights: Weights,
    tensor_parallel_size: int = 1,
    iteration: int = 0,
) -> Path:
    """Write a checkpoint and the tracker file that names it.

    Args:
        directory: As for --save and --load; the checkpoint is made below.
        target: Format and names.
        args: Arguments of the checkpoint, see `megatron_arguments`.
        flags: Options of the model.
        weights: By our names.
        tensor_parallel_size: Files to cut it into, with the targets that have one for each rank.
        iteration: Its number; 0 writes "release" where Megatron reads that.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: there is a checkpoint already.
    """
    ours = target == "retro-mcore"
    released = not (iteration or ours or target == "megatron")
    path = directory / RELEASE if released else checkpoint_path(directory, iteration)
    if path.exists() or (directory / TRACKER).exists():
        raise CheckpointError(f"--save {directory}", "holds a checkpoint", "Choose another")
    common = {"args": args, "checkpoint_version": 3.0, "iteration": iteration}
    weights = _fit(weights, flags, tensor_parallel_size)
    if ours:
        common["consumed_samples"] = 0
    stored = _keeping_routed_norms(_stored_name(target, weights), weights)
    named = {stored(key): weight for key, weight in weights.items()}
    if target in ("retro-mcore", "megatron"):
        write_torch_dist(path, common, named)
    else:
        write_torch_format(path, common, named, tensor_parallel_size, flags["swiglu"])
    with atomic_write(directory / TRACKER) as tracker:
        tracker.write_text(RELEASE if released else str(iteration), encoding="utf-8")
    return path


def _stored_name(target: Target, weights: Weights) -> Callable[[str], str]:
    crossing = {match[1] for name in weights if (match := _LAYER.match(name))}
    numbers = [int(p.split(".")[2]) + 1 for p in crossing if p.startswith("decoder.")]
    first = min(numbers, default=1)
    if target == "retro-mcore":
        return fused_name
    if target == "megatron":
        return lambda name: to_upstream_name(fused_name(name), first)
    if target == "megatron-torch":
        return lambda name: to_upstream_name(name, first)
    return lambda name: to_legacy_name(name, first, crossing)


def _keeping_routed_norms(stored: Callable[[str], str], weights: Weights) -> Callable[[str], str]:
    """The norm before a router has its own name: no linear layer follows, to be fused into."""
    routed = {
        name.removesuffix("mlp.router.weight") + "pre_mlp_layernorm"
        for name in weights
        if name.endswith(".mlp.router.weight")
    }
    return lambda name: name if name.rpartition(".")[0] in routed else stored(name)


def padded_vocabulary(flags: Flags, tensor_parallel_size: int) -> int:
    """Rows of the embedding: as they are where they divide, else padded by Megatron's rule."""
    rows: int = flags["padded_vocab_size"]
    vocab_size: int = flags.get("vocab_size") or rows
    if rows % tensor_parallel_size == 0:
        return rows
    multiple = flags.get("make_vocab_size_divisible_by", 128) * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def _fit(weights: Weights, flags: Flags, size: int) -> dict[str, Weight]:
    rows, vocab_size = padded_vocabulary(flags, size), flags.get("vocab_size")
    fitted = dict(weights)
    for name, weight in weights.items():
        if is_vocabulary(name) and rows != weight.shape[0]:
            fitted[name] = Weight(
                (rows, *weight.shape[1:]),
                weight.dtype,
                partial(_fitted, weight, rows, vocab_size or weight.shape[0]),
            )
    return fitted


def _fitted(weight: Weight, rows: int, vocab_size: int) -> Tensor:
    return fit_vocabulary(weight.load(), rows, vocab_size)


def megatron_arguments(flags: Flags, tensor_parallel_size: int) -> Namespace:
    """The arguments of a Megatron-LM checkpoint, for its own checks and --use-checkpoint-args.

    Args:
        flags: By our names, resolved.
        tensor_parallel_size: Tensor parallel size of the checkpoint.
    """
    heads = flags["num_attention_heads"]
    groups = flags.get("num_query_groups") or heads
    rotary = flags["position_embedding_type"] == "rope"
    rows = padded_vocabulary(flags, tensor_parallel_size)
    window, layers = flags.get("sliding_window"), flags.get("window_attn_skip_freq")
    values: dict[str, Any] = {}
    for name, value in flags.items():
        if name not in MODEL_FIELDS:  # of training, or of the checkpoint
            values[name] = value
        elif not (flags["no_retrieval"] and name in RETRIEVAL_FIELDS):
            values |= MODEL_FIELDS[name].write(name, value)
    values |= {
        "group_query_attention": groups != heads,
        "num_query_groups": groups if groups != heads else 1,
        "kv_channels": flags.get("kv_channels") or flags["hidden_size"] // heads,
        "max_position_embeddings": flags.get("max_position_embeddings") or flags["seq_length"],
        "use_rotary_position_embeddings": rotary,
        "add_position_embedding": not rotary,
        # Megatron-Core's way to the tanh approximation; it needs biases.
        "bias_gelu_fusion": bool(flags.get("openai_gelu")) and not flags["disable_bias_linear"],
        "padded_vocab_size": rows,
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": 1,
        "data_parallel_random_init": False,
        **_expert_arguments(flags),
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": layers[0] if layers and len(layers) == 1 else layers,
    }
    return Namespace(**values)


def _expert_arguments(flags: Flags) -> Flags:
    pattern = flags.get("moe_layer_freq") or [1]
    has_experts = flags.get("num_experts") is not None
    return {"moe_layer_freq": pattern[0] if len(pattern) == 1 else pattern} if has_experts else {}
