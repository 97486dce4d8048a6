"""Directories of `RetroForCausalLM`, written and read without building the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from retro_mcore.checkpoint.conversion.architecture import flags_of_weights
from retro_mcore.checkpoint.conversion.huggingface_files import (
    TensorFiles,
    end_tokens,
    read_json_object,
    refuse,
)
from retro_mcore.checkpoint.conversion.model_fields import END_TOKENS, Flags
from retro_mcore.checkpoint.conversion.retro_config import (
    DOCUMENT_TOKENS,
    flags_of_retro_config,
    huggingface_package,
    retro_config,
)
from retro_mcore.checkpoint.conversion.retro_names import (
    Parts,
    is_gated,
    parameter_names,
    parts_of,
    to_retro_huggingface,
)
from retro_mcore.checkpoint.conversion.weights import Weight, Weights
from retro_mcore.model.expert_options import expert_layers

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_AUTO_CLASSES = {"AutoConfig": "configuration_retro.RetroConfig",
                 "AutoModel": "modeling_retro.RetroModel",
                 "AutoModelForCausalLM": "modeling_retro.RetroForCausalLM"}  # fmt: skip


def retro_model_files(
    flags: Flags, weights: Weights
) -> tuple[dict[str, Any], dict[str, Weight], list[Path]]:
    """What a directory of `RetroForCausalLM` holds.

    Args:
        flags: The model's options, resolved.
        weights: By our names.

    Returns:
        The content of config.json, the weights under their names there, and files of code.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigurationError: an option that it does not compute.
    """
    values = config_values(flags, next(iter(weights.values())).dtype)
    code = sorted(Path(huggingface_package().__file__).parent.glob("*_retro.py"))
    return values, to_retro_huggingface(weights, flags), code


def config_values(flags: Flags, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json.

    Args:
        flags: The model's options, resolved.
        dtype: Of its weights.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigurationError: an option that it does not compute.
    """
    tokens = flags.get(DOCUMENT_TOKENS) or {}
    config = retro_config(flags, tokens.get("eod"), tokens.get("bos"))
    values = {
        **config.to_dict(),
        "architectures": ["RetroForCausalLM"],
        "auto_map": _AUTO_CLASSES,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return {**values, DOCUMENT_TOKENS: dict(tokens)} if tokens else values


def generation_config(values: Mapping[str, Any], flags: Flags) -> dict[str, Any]:
    """The content of generation_config.json.

    Args:
        values: The content of config.json.
        flags: The model's options, with the tokens that end a text if they are recorded.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: values[name] for name in names if values.get(name) is not None}
    ends = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    ends = list(dict.fromkeys([*ends, *flags.get(END_TOKENS, ())]))
    if len(ends) > 1:  # `generate` ends at any of them
        return {**ids, "eos_token_id": ends}
    if ends:
        ids["eos_token_id"] = ends[0]
    return {"_from_model_config": True, **ids}


def copy_code(files: list[Path], directory: Path) -> None:
    """Copy the model's code, for `trust_remote_code=True`."""
    for file in files:
        shutil.copyfile(file, directory / file.name)


def is_retro(directory: Path) -> bool:
    """Whether a Hugging Face directory holds a `RetroForCausalLM`.

    Raises:
        CheckpointError: its config.json cannot be read.
    """
    return read_json_object(directory / CONFIG).get("model_type") == "retro"


def read_retro_huggingface(directory: Path) -> tuple[Flags, dict[str, Weight], list[str]]:
    """Flags and weights of a `RetroForCausalLM`, and notes for the user.

    Raises:
        CheckpointError: a file is missing or damaged, or a setting, a weight or its size is none
            of our model's.
        ConfigurationError: a setting has a value of another type.
    """
    values = read_json_object(directory / CONFIG)
    flags = flags_of_retro_config(directory, values)
    if found := end_tokens(directory, values):
        flags[END_TOKENS] = found
    tensors = TensorFiles.of_directory(directory, values)
    shapes = tensors.shapes()
    notes = []
    if not flags["untie_embeddings_and_output_weights"] and "lm_head.weight" in shapes:
        pair = ("lm_head.weight", "embed_tokens.weight")
        if all(name in shapes for name in pair) and not torch.equal(*map(tensors.load, pair)):
            flags["untie_embeddings_and_output_weights"] = True
            notes = ["config.json ties the output layer to the embedding, but their weights "
                     "differ: both are kept, as transformers does"]  # fmt: skip
    weights = {}
    for name, parts in parts_by_name(flags, values).items():
        short = [part.removeprefix("model.") for part in parts.names]
        weights[name] = tensors.take({part: shapes.get(part, ()) for part in short}, parts.join)
    tied = not flags["untie_embeddings_and_output_weights"]
    tensors.check(lambda name: tied and name == "lm_head.weight")
    differing = {
        name: value
        for name, value in flags_of_weights(weights).items()
        if flags.get(name) is not None and value is not None and _differs(name, value, flags)
    }
    if differing:
        said = ", ".join(f"{name} {flags[name]}" for name in differing)
        shown = ", ".join(f"{name} {value}" for name, value in differing.items())
        raise refuse(directory, f"{said} in its config.json", f"{shown}, as its weights have")
    return flags, weights, notes


def _differs(name: str, value: Any, flags: Flags) -> bool:
    """Whether the weights show another value of an option than config.json states."""
    if name == "swiglu":  # they show a gate alone
        return bool(is_gated(flags) != value)
    if name == "moe_layer_freq":
        layers = (flags["num_experts"], flags["num_layers"])
        stated, found = (expert_layers(layers[0], p, layers[1]) for p in (flags[name], value))
        return stated != found
    return bool(flags[name] != value)


def parts_by_name(flags: Flags, values: Mapping[str, Any]) -> dict[str, Parts]:
    """The tensors of each of our weights, by its name.

    Args:
        flags: The model's options.
        values: The content of config.json.
    """
    norm = bool(values["no_retrieval"] or values.get("retro_final_layernorm", True))
    names = parameter_names({**flags, "retro_final_layernorm": norm})
    return {name: parts_of(name, flags) for name in names}
