"""Retro for Megatron-Core: retrieval-enhanced pretraining, evaluation and generation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retro_mcore.missing_triton import allow_missing_triton

if TYPE_CHECKING:
    from retro_mcore.api.models import evaluate_perplexity, generate, load_model, pretrain
    from retro_mcore.api.project import Project
    from retro_mcore.api.retriever import project_retriever
    from retro_mcore.inference.prompt_files import Prompt
    from retro_mcore.model.config import RetroConfig
    from retro_mcore.model.model import RetroModel
    from retro_mcore.model.specs import get_retro_decoder_block_spec
    from retro_mcore.platform import setup_device
    from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds

allow_missing_triton()  # before any module of this package imports megatron

__version__ = "0.1.0"
__all__ = [
    "Project",
    "Prompt",
    "RetroConfig",
    "RetroModel",
    "evaluate_perplexity",
    "generate",
    "get_retro_decoder_block_spec",
    "initialize_parallel",
    "load_model",
    "pretrain",
    "project_retriever",
    "set_seeds",
    "setup_device",
]

_HOMES = {
    "Project": "retro_mcore.api.project",
    "Prompt": "retro_mcore.inference.prompt_files",
    "RetroConfig": "retro_mcore.model.config",
    "RetroModel": "retro_mcore.model.model",
    "evaluate_perplexity": "retro_mcore.api.models",
    "generate": "retro_mcore.api.models",
    "get_retro_decoder_block_spec": "retro_mcore.model.specs",
    "initialize_parallel": "retro_mcore.training.setup.initialize",
    "load_model": "retro_mcore.api.models",
    "pretrain": "retro_mcore.api.models",
    "project_retriever": "retro_mcore.api.retriever",
    "set_seeds": "retro_mcore.training.setup.initialize",
    "setup_device": "retro_mcore.platform",
}


def __getattr__(name: str) -> Any:
    # Lazy: the data pipeline must not import megatron, and `--help` is fast without it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
