"""Our model options as the configuration of `RetroForCausalLM`, and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.conversion.huggingface_config import is_neutral
from retro_mcore.checkpoint.conversion.model_fields import MODEL_FIELDS, RETRIEVAL_FIELDS, Flags
from retro_mcore.checkpoint.conversion.model_file import flags_of_file
from retro_mcore.errors import CheckpointError, ConfigurationError, MissingDependencyError
from retro_mcore.model.config import RetroConfig, values_of_origin
from retro_mcore.model.expert_options import EXPERT_OPTIONS
from retro_mcore.model.family_options import FamilyOptions
from retro_mcore.model.option_traits import stated

#: Our options that have another name there.
RENAMED = {"vocab_size": "tokenizer_vocab_size", "padded_vocab_size": "vocab_size"}
#: Our options that it states in another way.
TRANSLATED = frozenset({"untie_embeddings_and_output_weights", "group_query_attention"})
#: Options that directories of earlier releases do not state: their models have the default. Later
#: directories state all of those that were added together.
LATER = (
    frozenset(
        {option.name for option in fields(FamilyOptions)}
        | {"window_attn_skip_freq", "geglu", "retro_encoder_rotary_scaling", *EXPERT_OPTIONS}
    ),
    frozenset({"retro_encoder_input"}),
    frozenset({"retro_cross_attention_keys"}),
)
#: Tokens that begin and end documents, as our checkpoints record them.
DOCUMENT_TOKENS = "document_tokens"

_OF_TRANSFORMERS = (
    "tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "model_type",
    DOCUMENT_TOKENS,
)  # fmt: skip


def huggingface_package() -> Any:
    """`retro_mcore.huggingface`.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from retro_mcore import huggingface
    except ImportError as error:
        raise MissingDependencyError(
            "--target huggingface",
            f"transformers does not import ({error})",
            "Install the `huggingface` extra",
        ) from error
    return huggingface


def names_there() -> Mapping[str, str]:
    """Names in its configuration, by the names of our options."""
    package = huggingface_package()
    known = inspect.signature(package.RetroConfig.__init__).parameters
    names = {name: RENAMED.get(name, name) for name in MODEL_FIELDS if name not in TRANSLATED}
    return {name: there for name, there in names.items() if there in known}


def retro_config(flags: Flags, eod: int | None = None, bos: int | None = None) -> Any:
    """The configuration of a model.

    Args:
        flags: Its options, resolved.
        eod: Token that ends documents; it also stands for padding. None: unknown.
        bos: Token that begins documents, if any.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigurationError: an option that it does not compute.
    """
    known, values = names_there(), {}
    for name, traits in MODEL_FIELDS.items():
        value = flags.get(name, traits.absent)
        if name in known:
            values[known[name]] = value
        elif name not in TRANSLATED and value not in (None, False, 0, traits.absent):
            raise ConfigurationError(
                "--target huggingface",
                f"cannot represent {name} {value}, which the model's results depend on",
                "Keep it in retro-mcore's format",
            )
    given = {name: value for name, value in values.items() if value is not None}
    ids = {"eos_token_id": eod, "pad_token_id": eod, "bos_token_id": bos}
    tied = not flags["untie_embeddings_and_output_weights"]
    return huggingface_package().RetroConfig(**given, **ids, tie_word_embeddings=tied)


def flags_of_retro_config(directory: Path, values: Mapping[str, Any]) -> Flags:
    """Our options from the config.json of a `RetroForCausalLM`.

    Args:
        directory: The model's, for errors.
        values: The file's content.

    Raises:
        CheckpointError: an option is missing, unknown, or not what its origin computes.
        ConfigurationError: a value is of another type.
    """
    source = directory / "config.json"
    names = [name for name in MODEL_FIELDS if name not in TRANSLATED]
    there = {name: RENAMED.get(name, name) for name in names}
    optional = {name for added in LATER if added.isdisjoint(values) for name in added}
    optional |= RETRIEVAL_FIELDS if values.get("no_retrieval") else set()
    missing = [key for name, key in there.items() if key not in values and name not in optional]
    missing += [] if "tie_word_embeddings" in values else ["tie_word_embeddings"]
    if missing:
        raise CheckpointError(source, f"does not say {', '.join(missing)}", "Copy it again")
    known = {*there.values(), *stated("origins", RetroConfig), *_OF_TRANSFORMERS}
    unknown = [key for key in values if key not in known and not is_neutral(key, values[key])]
    if unknown:
        raise CheckpointError(
            source,
            f"has settings that our model does not have: {', '.join(unknown)}",
            "Convert it with the release of retro-mcore that wrote it",
        )
    given = {name: values[key] for name, key in there.items() if values.get(key) is not None}
    later = {name: MODEL_FIELDS[name].absent for added in LATER for name in added}
    flags = later | flags_of_file(str(source), given)
    flags["untie_embeddings_and_output_weights"] = not values["tie_word_embeddings"]
    if isinstance(values.get(DOCUMENT_TOKENS), dict):
        flags[DOCUMENT_TOKENS] = values[DOCUMENT_TOKENS]
    if not flags["no_retrieval"]:
        differing = list(_not_of_origin(flags, values))
        if differing:
            raise CheckpointError(
                source,
                f"computes otherwise than {flags.get('retro_origin') or 'the paper'}: "
                + ", ".join(differing),
                "Our model has these settings only together, as its origin",
            )
    return flags


def _not_of_origin(flags: Flags, values: Mapping[str, Any]) -> Iterator[str]:
    origin = flags.get("retro_origin")
    defaults = {field.name: field.default for field in fields(RetroConfig)}
    computed = {name: defaults[name] for name in stated("origins", RetroConfig)}
    computed |= {} if origin is None else values_of_origin(origin)
    if flags.get("retro_deepnorm"):
        computed["retro_final_layernorm"] = False
    for name, value in computed.items():
        if values.get(name, value) != value:
            yield f"{name} {values[name]} (it computes {value})"
