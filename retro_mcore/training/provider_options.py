"""The model's options in Megatron-LM's trainer: complete in its arguments, and in a configuration.

Megatron-LM takes some options from the checkpoint that it loads and compares some. The others, such
as a softmax scale, show in no weight's shape, so they are taken or compared here.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.arguments import in_our_form
from retro_mcore.checkpoint.contents import is_torch_dist, read_common
from retro_mcore.checkpoint.conversion.architecture import window_flags
from retro_mcore.checkpoint.tracker import checkpoint_path, tracked_checkpoint
from retro_mcore.errors import ConfigurationError, RetroError, flag_of, raise_problems
from retro_mcore.model.config import RetroConfig, values_of_origin
from retro_mcore.model.decoder_config import DecoderConfig
from retro_mcore.model.option_traits import ModelTraits, model_traits
from retro_mcore.model.options import (
    ModelOptions,
    RetroOptions,
    changed_defaults,
    with_unstated,
)
from retro_mcore.training.options.model_sizes import default_ffn_hidden_size
from retro_mcore.training.provider_flags import OURS, WINDOW, check_arguments, is_given
from retro_mcore.training.setup.model_config import activation_fields

_LOG = logging.getLogger(__name__)
_OF_RETRIEVAL = {*model_traits(RetroOptions), "retro_origin"}
#: Options that Megatron-LM does not compare with the checkpoint's, and that no weight shows.
_NOT_COMPARED = OURS | _OF_RETRIEVAL | {"window_attn_skip_freq"}
#: Options that another run cannot change.
_FIXED: dict[str, ModelTraits] = {
    name: traits
    for name, traits in model_traits(ModelOptions).items()
    if traits.reuse == "same" and traits.form != "opposite"
}


def settle_options(args: Namespace) -> None:
    """Complete the options in Megatron-LM's arguments, which its checkpoints record.

    Those that were not given and whose default changed get the checkpoint's value, or that of a
    new model. With --use-checkpoint-args all that were not given do. May be called again.

    Raises:
        ConfigurationError: options differ from those of the checkpoint to load, or what it has is
            refused. Names them all.
        CheckpointError: it cannot be read.
    """
    saved = _saved(args)
    if args.retro_add_retriever:
        for name, value in _unstated(args, saved).items():
            setattr(args, name, value)
    if getattr(args, "use_checkpoint_args", False):
        _take(args, saved)
        check_arguments(args)
    _settle_window(args)
    if saved:
        raise_problems([*_contradictions(args, saved)])
    # Fused with the bias, Megatron's GELU is its tanh approximation; ours is exact.
    if args.geglu or args.openai_gelu or (saved and in_our_form(saved)):
        args.bias_gelu_fusion = False
    taken = getattr(args, "use_checkpoint_args", False) and saved.get("ffn_hidden_size")
    if args.geglu and not taken and not is_given("ffn_hidden_size"):
        plain = {**vars(args), "ffn_hidden_size": None}
        args.ffn_hidden_size = default_ffn_hidden_size(Namespace(**plain))  # type: ignore[arg-type]


def configuration(args: Namespace) -> Any:
    """The model's configuration: a RetroConfig, or without retrieval a DecoderConfig."""
    from megatron.training.arguments import core_transformer_config_from_args

    if args.retro_add_retriever:
        for name, value in _retro_fields(args).items():
            setattr(args, name, value)
    # Megatron-LM uses the arguments that have the names of the configuration's fields. Functions
    # must not get into the checkpoint's.
    values = Namespace(**{**vars(args), **activation_fields(args)})
    kind = RetroConfig if args.retro_add_retriever else DecoderConfig
    return core_transformer_config_from_args(values, kind)


def _retro_fields(args: Namespace) -> dict[str, Any]:
    """Fields of the configuration without an argument: values of the origin, or defaults."""
    defaults = {
        field.name: field.default
        for field in fields(RetroConfig)
        if field.name.startswith("retro_") and getattr(args, field.name, 0) is None
    }
    if args.retro_origin is None:
        return defaults
    if args.retro_encoder_cross_attention_dropout is None:
        defaults["retro_encoder_cross_attention_dropout"] = args.attention_dropout
    return {**defaults, **values_of_origin(args.retro_origin)}


def _saved(args: Namespace) -> dict[str, Any]:
    """The arguments of the checkpoint to load; empty if there is none, or it is no torch_dist."""
    for name in ("load", "pretrained_checkpoint"):
        directory = getattr(args, name, None)
        step = getattr(args, "ckpt_step", None) if name == "load" else None
        if directory is None:
            continue
        found = checkpoint_path(directory, step) if step else tracked_checkpoint(directory)
        if found is None or not found.is_dir():
            continue
        if is_torch_dist(found):
            saved = read_common(found).get("args")
            return {} if saved is None else _in_our_terms(dict(vars(saved)), found)
        if getattr(args, "use_checkpoint_args", False):
            _LOG.warning(
                "%s is not in Megatron's torch_dist format: of its arguments only those that "
                "Megatron-LM takes itself are used. Give the other flags of its model",
                found,
            )
        return {}
    return {}


def _in_our_terms(saved: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    if in_our_form(saved):
        saved["group_query_attention"] = bool(saved.get("num_query_groups"))
    else:
        saved |= window_flags(saved, checkpoint)
    return with_unstated(saved) if _retrieves(saved) else saved


def _retrieves(saved: Mapping[str, Any]) -> bool:
    return bool(saved.get("retro_add_retriever", not saved.get("no_retrieval", True)))


def _unstated(args: Namespace, saved: Mapping[str, Any]) -> dict[str, str]:
    """Options that were not given and whose default changed: their values in the checkpoint to
    load, or those of a new model."""
    values = changed_defaults(args.retro_origin)
    if _retrieves(saved):
        values = {name: saved[name] or value for name, value in with_unstated({}).items()}
    return {name: value for name, value in values.items() if getattr(args, name) is None}


def _names(args: Namespace, name: str) -> list[str]:
    """The arguments that hold an option."""
    also = () if name == WINDOW else _FIXED[name].also
    return [each for each in (name, *also) if hasattr(args, each)]


def _of_checkpoint(saved: Mapping[str, Any], name: str) -> Any:
    """An option's value in a checkpoint; None: not stated, or the default."""
    values = (saved.get(each) for each in (name, *_FIXED[name].also))
    return saved.get(name) if name == WINDOW else next((v for v in values if v is not None), None)


def _compared(args: Namespace, saved: Mapping[str, Any]) -> Iterator[str]:
    """Options that both models have."""
    both = args.retro_add_retriever and _retrieves(saved)
    return (name for name in _FIXED if both or name not in _OF_RETRIEVAL)


def _take(args: Namespace, saved: Mapping[str, Any]) -> None:
    """Give options that were not given their values in a checkpoint."""
    for name in _compared(args, saved):
        value, names = _of_checkpoint(saved, name), _names(args, name)
        windows = ("window_size",) if name == WINDOW else ()
        if value is not None and not any(map(is_given, (*names, *windows))):
            for each in names:
                setattr(args, each, value)


def _contradictions(args: Namespace, saved: Mapping[str, Any]) -> Iterator[RetroError]:
    """Errors of options that Megatron-LM does not compare."""
    if _retrieves(saved) and not args.retro_add_retriever and not getattr(args, "finetune", False):
        yield ConfigurationError(
            "--load",
            "holds a model with retrieval",
            "Add --retro-add-retriever, or --finetune to go on without retrieval",
        )
    now = {**vars(args), **window_flags(vars(args), "--window-size")}
    for name in _compared(args, saved):
        if name not in _NOT_COMPARED or not {name, *_FIXED[name].also} & saved.keys():
            continue
        value, wanted = now.get(name), _of_checkpoint(saved, name)
        if value != wanted:
            yield ConfigurationError(
                flag_of(name),
                f"{value}, and the checkpoint to load was trained with {wanted}",
                "Give its value, or leave it out with --use-checkpoint-args",
            )


def _settle_window(args: Namespace) -> None:
    """State the window in both forms, and its layers as Megatron's configuration does."""
    if (window := getattr(args, WINDOW)) is not None:
        args.window_size = (window - 1, 0)
    else:
        setattr(args, WINDOW, window_flags(vars(args), "--window-size").get(WINDOW))
    layers = getattr(args, "window_attn_skip_freq", None)
    if isinstance(layers, list) and len(layers) == 1 and layers[0] > 1:
        args.window_attn_skip_freq = layers[0]
