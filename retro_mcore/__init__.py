"""Retro for Megatron-Core: retrieval-enhanced pretraining, evaluation and generation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retro_mcore.missing_triton import allow_missing_triton

if TYPE_CHECKING:
    from retro_mcore.model.config import RetroConfig
    from retro_mcore.model.model import RetroModel
    from retro_mcore.model.specs import get_retro_decoder_block_spec

allow_missing_triton()  # before any module of this package imports megatron

__version__ = "0.1.0"
__all__ = ["RetroConfig", "RetroModel", "get_retro_decoder_block_spec"]

_HOMES = {
    "RetroConfig": "retro_mcore.model.config",
    "RetroModel": "retro_mcore.model.model",
    "get_retro_decoder_block_spec": "retro_mcore.model.specs",
}


def __getattr__(name: str) -> Any:
    # Lazy: the data pipeline must not import megatron.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
