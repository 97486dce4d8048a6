"""Retro in Megatron-Bridge: a model configuration, its data, a forward step and a recipe.

    from megatron.bridge.training.pretrain import pretrain
    from retro_mcore.bridge import forward_step, pretrain_config

    config = pretrain_config("/data/wiki", num_layers=24, hidden_size=2048, num_attention_heads=16)
    pretrain(config, forward_step)

Importing it also lets `AutoBridge` read and write directories of `RetroForCausalLM`.

Needs megatron-bridge 0.6 and megatron-core 0.19. See docs/guides/bridge.md.
"""

from retro_mcore.bridge.data import RetroDatasetProvider
from retro_mcore.bridge.huggingface import RetroBridge
from retro_mcore.bridge.model import RetroModelBuilder, RetroModelConfig
from retro_mcore.bridge.recipe import pretrain_config
from retro_mcore.bridge.step import forward_step

__all__ = [
    "RetroBridge",
    "RetroDatasetProvider",
    "RetroModelBuilder",
    "RetroModelConfig",
    "forward_step",
    "pretrain_config",
]
