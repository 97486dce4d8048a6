"""The modules that a layer spec is built from: Transformer Engine's, or local ones.

Both come through Megatron-Core's BackendSpecProvider, so that one spec builder serves both.
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions import fused_layer_norm
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend

from retro_mcore.errors import MissingDependencyError
from retro_mcore.platform import is_cpu_in_use
from retro_mcore.platform.attention import SDPAttention
from retro_mcore.platform.mlp import RecomputingMLP
from retro_mcore.platform.norm import Norm


class LocalBackend(LocalSpecProvider):
    """Megatron's parallel linears, PyTorch's attention, a norm that knows sequence parallelism."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **kwargs: Any) -> type:
        """The norm: Apex's fused LayerNorm where Apex imports, on CUDA; else our own.

        Args:
            rms_norm: Whether it is for `normalization="RMSNorm"`, which Apex's is not.
            for_qk: Whether it norms the heads of queries and keys.
        """
        apex = fused_layer_norm.HAVE_FUSED_LAYER_NORM and not is_cpu_in_use()
        return Norm if rms_norm or not apex else fused_layer_norm.FusedLayerNorm

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
