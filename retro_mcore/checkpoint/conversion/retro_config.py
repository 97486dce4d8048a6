"""Our model options as the configuration of `RetroForCausalLM`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retro_mcore.checkpoint.conversion.model_fields import MODEL_FIELDS, Flags
from retro_mcore.errors import ConfigurationError, MissingDependencyError

#: Our options that have another name there.
RENAMED = {"vocab_size": "tokenizer_vocab_size", "padded_vocab_size": "vocab_size"}
#: Our options that it states in another way.
TRANSLATED = frozenset({"untie_embeddings_and_output_weights", "group_query_attention"})


def retro_config(flags: Flags, **token_ids: int | None) -> Any:
    """The configuration of a model.

    Args:
        flags: Its options.
        **token_ids: `eod` and `bos`, if they are known.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigurationError: an option that it does not compute.
    """
    try:
        from retro_mcore.huggingface import RetroConfig
    except ImportError as error:
        raise MissingDependencyError(
            "--target huggingface",
            f"transformers does not import ({error})",
            "Install the `embed` extra",
        ) from error
    known = names_there()
    values: dict[str, Any] = {}
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
    values["tie_word_embeddings"] = not flags["untie_embeddings_and_output_weights"]
    eod = token_ids.get("eod")
    return RetroConfig(
        **{name: value for name, value in values.items() if value is not None},
        eos_token_id=eod,
        pad_token_id=eod,
        bos_token_id=token_ids.get("bos"),
    )


def names_there() -> Mapping[str, str]:
    """Names in its configuration, by the names of our options."""
    import inspect

    from retro_mcore.huggingface import RetroConfig

    known = inspect.signature(RetroConfig.__init__).parameters
    names = {name: RENAMED.get(name, name) for name in MODEL_FIELDS if name not in TRANSLATED}
    return {name: there for name, there in names.items() if there in known}
