"""The model's options as conversion sees them: read from the fields that declare them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from retro_mcore.model.option_traits import ModelTraits, model_traits
from retro_mcore.model.options import ModelArguments, RetroOptions

Flags = dict[str, Any]

#: Checkpoint argument with the tokens that end a generated text: the `eos_token_id` of the model's
#: generation_config.json.
END_TOKENS = "end_tokens"

#: Formats that checkpoints are written in.
Target = Literal["retro-mcore", "megatron", "megatron-torch", "instructretro", "huggingface"]

#: By the option's name, in the order in which contradictions are listed.
MODEL_FIELDS: Mapping[str, ModelTraits] = model_traits(ModelArguments)

#: Options of retrieval, which a GPT does not have.
RETRIEVAL_FIELDS = frozenset({*model_traits(RetroOptions), "retro_chunk_length"})

#: Flags that must agree when a model takes a checkpoint's decoder.
DECODER_FLAGS = tuple(name for name, traits in MODEL_FIELDS.items() if traits.gpt == "same")

#: Options that no other implementation has, with the values of a model that does not state them.
OURS_ALONE: Flags = {
    name: traits.absent for name, traits in MODEL_FIELDS.items() if traits.ours_alone
}
