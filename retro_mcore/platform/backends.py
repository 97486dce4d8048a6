"""The modules that a layer spec is built from: Transformer Engine's, or local ones.

Both come through Megatron-Core's BackendSpecProvider, so that one spec builder serves both.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend

from retro_mcore.errors import MissingDependencyError
from retro_mcore.platform.attention import SDPAttention
from retro_mcore.platform.mlp import RecomputingMLP
from retro_mcore.platform.norm import Norm


class LocalBackend(LocalSpecProvider):
    """Megatron's parallel linears, PyTorch's attention, a norm that knows sequence parallelism."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **kwargs: Any) -> type:
        """The norm; reads `config.normalization` itself."""
        return Norm

    def core_attention(self) -> type:
        """The core attention of self-attention."""
        return SDPAttention

    def mlp(self) -> type:
        """The MLP."""
        return RecomputingMLP


class NormsApart:
    """Another backend's modules, with norms apart from the linear layers.

    Args:
        backend: The backend.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def fuse_layernorm_and_linear(self) -> bool:
        """Never."""
        return False


def get_mlp(backend: Any) -> Any:
    """The spec of the MLP: the backend's own, or megatron's from the backend's linear layers."""
    if hasattr(backend, "mlp"):
        return backend.mlp()
    return get_mlp_module_spec_for_backend(backend)


def get_backend(use_transformer_engine: bool) -> Any:
    """The provider of modules for a spec.

    Raises:
        MissingDependencyError: Transformer Engine was asked for and does not import.
    """
    if not use_transformer_engine:
        return LocalBackend()
    try:
        import transformer_engine  # noqa: F401
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    except ImportError as error:
        raise MissingDependencyError(
            "use_transformer_engine=True",
            f"Transformer Engine does not import ({error})",
            "Install the `gpu` extra, or pass use_transformer_engine=False",
        ) from error
    return TESpecProvider()
