"""Text embedders, which turn the text of a chunk into the vector that the index searches by.

`build_embedder` picks the kind from the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from retro_mcore.errors import ConfigurationError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.embedders.base import (
    DEFAULT_EMBEDDER,
    LEXICAL_EMBEDDER,
    Embedder,
    Pooling,
)
from retro_mcore.retrieval.embedders.half_precision import HalfPrecision
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder
from retro_mcore.retrieval.embedders.pooled import PooledEncoder
from retro_mcore.retrieval.embedders.sentence import SentenceEncoder

#: A test whether a name belongs to this kind, and a builder (name, batch size, device, pooling).
Recognizer = Callable[[str], bool]
Builder = Callable[[str, int, str | None, Pooling | None], Embedder]

#: Modules for special kinds of models; each defines `is_of_kind` and `build` as above.
_MODULES = ("retro_mcore.retrieval.embedders.megatron_bert",)
#: Kinds registered by other packages; these take precedence.
_registered: list[tuple[Recognizer, Builder]] = []


def register_embedder(is_of_kind: Recognizer, build: Builder) -> None:
    """Let `build_embedder` build embedders that this package does not know.

    Args:
        is_of_kind: Returns whether a name belongs to such a model.
        build: Builds the `Embedder` from name, batch size, device and pooling. With --embed-fp16
            its `half()` is called.
    """
    if all(known is not is_of_kind for known, _ in _registered):
        _registered.append((is_of_kind, build))


def build_embedder(
    name: str = DEFAULT_EMBEDDER,
    batch_size: int = 16,
    device: str | None = None,
    pooling: Pooling | None = None,
    half: bool = False,
    weights: Path | None = None,
) -> Embedder:
    """Build the embedder that `name` stands for.

    Args:
        name: "lexical", "minilm", a model's folder or hub name, or a registered name.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA if available.
        pooling: Pooling of a Hugging Face encoder; None: as the model's sentence-transformers
            settings say, or the mean.
        half: Compute in half precision; needs a GPU.
        weights: File of the lexical embedder's weights.

    Raises:
        ConfigurationError: there is no such model, or options are incompatible.
        MissingDependencyError: a package that the embedder needs is not installed.
        ProjectError: the lexical embedder has no weights yet.
    """
    if batch_size < 1:
        raise ConfigurationError("--embed-batch-size", str(batch_size), "Give at least 1")
    if pooling not in (None, "mean", "cls"):
        raise ConfigurationError("--embedder-pooling", str(pooling), "Choose mean or cls")
    if name == LEXICAL_EMBEDDER:
        return _lexical(pooling, half, weights)
    if half and not str(device or "cuda").startswith("cuda"):
        raise ConfigurationError("--embed-fp16", "on the CPU", "Leave it out, or use a GPU")
    embedder = _builder(name, pooling)(name, batch_size, device, pooling)
    if not half:
        return embedder
    return HalfPrecision(embedder)


def _lexical(pooling: Pooling | None, half: bool, weights: Path | None) -> Embedder:
    if pooling or half or weights is None:
        flag = "--embedder-pooling" if pooling else "--embed-fp16" if half else "--embedder"
        raise ConfigurationError(flag, "lexical has no model", "Leave it out")
    return LexicalEmbedder.load(weights)


def _builder(name: str, pooling: Pooling | None) -> Builder:
    for is_of_kind, build in _kinds():
        if is_of_kind(name):
            return build
    return _sentence if pooling is None else _pooled


def _kinds() -> Iterator[tuple[Recognizer, Builder]]:
    yield from _registered
    for module in map(import_module, _MODULES):
        yield module.is_of_kind, module.build


def _sentence(name: str, batch_size: int, device: str | None, pooling: Pooling | None) -> Embedder:
    return SentenceEncoder(name, batch_size, device)


def _pooled(name: str, batch_size: int, device: str | None, pooling: Pooling | None) -> Embedder:
    assert pooling is not None
    return PooledEncoder(name, pooling, batch_size, device)


def load_project_embedder(
    settings: ProjectSettings,
    paths: ProjectPaths,
    batch_size: int = 16,
    device: str | None = None,
    half: bool = False,
) -> Embedder:
    """Build the embedder that a project's index was built with; see `build_embedder`."""
    return build_embedder(
        str(settings.embedder),
        batch_size=batch_size,
        device=device,
        pooling=settings.embedder_pooling,
        half=half,
        weights=paths.lexical_weights,
    )
