"""The one way to load a trained model with its tokenizer, project and retriever."""

from retro_mcore.session.generation import GenerationModel, load_generation_model
from retro_mcore.session.loading import (
    LoadedModel,
    load_model,
    require_reading,
    warn_beyond_training,
)

__all__ = [
    "GenerationModel",
    "LoadedModel",
    "load_generation_model",
    "load_model",
    "require_reading",
    "warn_beyond_training",
]
