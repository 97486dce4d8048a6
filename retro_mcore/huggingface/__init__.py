"""Retro as a transformers model; importing this registers it with transformers' Auto classes.

Nothing here needs megatron-core. See docs/huggingface.md.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from retro_mcore.huggingface.chunks_retro import RetroCache
from retro_mcore.huggingface.configuration_retro import RetroConfig
from retro_mcore.huggingface.modeling_retro import (
    Retriever,
    RetroForCausalLM,
    RetroModel,
    RetroPreTrainedModel,
)

__all__ = [
    "Retriever",
    "RetroCache",
    "RetroConfig",
    "RetroForCausalLM",
    "RetroModel",
    "RetroPreTrainedModel",
]

AutoConfig.register(RetroConfig.model_type, RetroConfig, exist_ok=True)
AutoModel.register(RetroConfig, RetroModel, exist_ok=True)
AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM, exist_ok=True)
# `save_pretrained` copies the code beside the weights, for `trust_remote_code=True`.
RetroConfig.register_for_auto_class()
RetroModel.register_for_auto_class("AutoModel")
RetroForCausalLM.register_for_auto_class("AutoModelForCausalLM")
