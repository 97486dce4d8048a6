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
from retro_mcore.retrieval.embedders import static_models
from retro_mcore.retrieval.embedders.base import (
    BATCH_SIZE,
    CPU_BATCH_TOKENS,
    DEFAULT_EMBEDDER,
    GPU_BATCH_TOKENS,
    LEXICAL_EMBEDDER,
    Embedder,
    Encoder,
    Pooling,
)
from retro_mcore.retrieval.embedders.half_precision import HalfPrecision
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder
from retro_mcore.retrieval.embedders.model_files import begins_with_transformer
from retro_mcore.retrieval.embedders.pooled import PooledEncoder
from retro_mcore.retrieval.embedders.precision import (
    FLAG,
    Precision,
    automatic_precision,
    chooses_cpu,
    require_precision,
)
from retro_mcore.retrieval.embedders.sentence import SentenceEncoder

#: A test whether a name belongs to this kind, and a builder (name, batch size, device, pooling).
Recognizer = Callable[[str], bool]
Builder = Callable[[str, int, str | None, Pooling | None], Embedder]

#: Modules for special kinds of models; each defines `is_of_kind` and `build` as above.
_MODULES = (
    "retro_mcore.retrieval.embedders.static",
    "retro_mcore.retrieval.embedders.megatron_bert",
)
#: Kinds registered by other packages; these take precedence.
_registered: list[tuple[Recognizer, Builder]] = []


def register_embedder(is_of_kind: Recognizer, build: Builder) -> None:
    """Let `build_embedder` build embedders that this package does not know.

    Args:
        is_of_kind: Returns whether a name belongs to such a model.
        build: Builds the `Embedder` from name, batch size, device and pooling; anything else is
            refused. Its `half()`, `bfloat16()` or `int8()` is called for --embed-precision.
    """
    if all(known is not is_of_kind for known, _ in _registered):
        _registered.append((is_of_kind, build))


def default_precision(name: str, device: str) -> Precision:
    """The precision of a new project: automatic for an encoder, fp32 for other kinds.

    Which kind a hub's model is, is looked up on the hub if need be; fp32 if it cannot be.

    Args:
        name: Name of the embedder.
        device: "auto", "cpu" or "cuda".
    """
    precision = automatic_precision(device)
    return precision if precision == "fp32" or _is_encoder(name) else "fp32"


def default_batch_tokens(name: str, device: str) -> int | None:
    """Tokens of a batch in a new project, for an encoder; None: batches of 16 texts.

    A hub name may stand for any kind of model, also for one that counts no tokens.

    Args:
        name: Name of the embedder.
        device: "auto", "cpu" or "cuda".
    """
    is_known = name == DEFAULT_EMBEDDER or Path(name).is_dir()
    if not (is_known and _is_encoder(name)):
        return None
    return CPU_BATCH_TOKENS if chooses_cpu(device) else GPU_BATCH_TOKENS


def takes_batches(name: str) -> bool:
    """Whether an embedder runs a model on batches of texts; lexical and static ones do not."""
    return _is_registered(name) or not (name == LEXICAL_EMBEDDER or static_models.is_static(name))


def _is_encoder(name: str) -> bool:
    """Whether a name stands for a sentence-transformers or Hugging Face encoder."""
    is_model = takes_batches(name) and not _is_registered(name)
    return is_model and begins_with_transformer(name)


def _is_registered(name: str) -> bool:
    return name != LEXICAL_EMBEDDER and any(is_of_kind(name) for is_of_kind, _ in _registered)


def build_embedder(
    name: str = DEFAULT_EMBEDDER,
    batch_size: int = BATCH_SIZE,
    device: str | None = None,
    pooling: Pooling | None = None,
    weights: Path | None = None,
    precision: Precision = "fp32",
    batch_tokens: int | None = None,
) -> Embedder:
    """Build the embedder that `name` stands for.

    Args:
        name: "lexical", "static", "minilm", a model's folder or hub name, or a registered name.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA if available.
        pooling: Pooling of a Hugging Face encoder; None: as the model's sentence-transformers
            settings say, or the mean.
        weights: File of the lexical embedder's weights.
        precision: Precision to compute in.
        batch_tokens: Tokens per forward pass, padding included, instead of `batch_size`.

    Raises:
        ConfigurationError: there is no such model, options are incompatible, a registered builder
            returns no `Embedder`, or this machine or model cannot compute in the precision.
        MissingDependencyError: a package that the embedder needs is not installed.
        ProjectError: the lexical embedder has no weights yet.
    """
    _check(batch_size, batch_tokens, pooling)
    if name == LEXICAL_EMBEDDER:
        return _lexical(pooling, weights, precision, batch_tokens)
    require_precision(precision, device)
    embedder = _builder(name, pooling)(name, batch_size, device, pooling)
    _require_embedder(name, embedder)
    if batch_tokens is not None:
        _batch_by_tokens(embedder, batch_tokens)
    return embedder if precision == "fp32" else _converted(embedder, precision)


def _check(batch_size: int, batch_tokens: int | None, pooling: Pooling | None) -> None:
    if batch_size < 1:
        raise ConfigurationError("--embed-batch-size", str(batch_size), "Give at least 1")
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigurationError("--embed-batch-tokens", str(batch_tokens), "Give at least 1")
    if batch_tokens is not None and batch_size != BATCH_SIZE:
        found = f"{batch_tokens} with --embed-batch-size {batch_size}"
        raise ConfigurationError("--embed-batch-tokens", found, "Give one of them")
    if pooling not in (None, "mean", "cls"):
        raise ConfigurationError("--embedder-pooling", str(pooling), "Choose mean or cls")


def _lexical(
    pooling: Pooling | None, weights: Path | None, precision: Precision, batch_tokens: int | None
) -> Embedder:
    given = {
        "--embedder-pooling": pooling,
        FLAG: precision != "fp32",
        "--embed-batch-tokens": batch_tokens,
        "--embedder": weights is None,
    }
    for flag, value in given.items():
        if value:
            raise ConfigurationError(flag, "lexical has no model", "Leave it out")
    assert weights is not None
    return LexicalEmbedder.load(weights)


def _require_embedder(name: str, built: object) -> None:
    """Refuse what a registered builder returned if it is not a complete `Embedder`."""
    found = f"not an Embedder but {type(built).__name__}"
    if isinstance(built, Embedder):
        lacking = [each for each in ("name", "dimension") if not hasattr(built, each)]
        if not lacking:
            return
        found = f"an Embedder without {' and '.join(lacking)}"
    base = f"{Embedder.__module__}.{Embedder.__name__}"
    raise ConfigurationError(
        "--embedder",
        f"the builder registered for {name!r} returns {found}",
        f"Return a subclass of {base} that sets name and dimension",
    )


def _batch_by_tokens(embedder: Embedder, tokens: int) -> None:
    if not isinstance(embedder, Encoder):
        found = f"{embedder.name} is not batched by tokens"
        raise ConfigurationError("--embed-batch-tokens", found, "Leave it out")
    embedder.batch_tokens = tokens


def _converted(embedder: Embedder, precision: Precision) -> Embedder:
    """Let an embedder compute in another precision than fp32."""
    if precision == "fp16":
        return HalfPrecision(embedder)
    if precision == "bf16":
        embedder.bfloat16()
    else:
        embedder.int8()
    return embedder


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
    batch_size: int = BATCH_SIZE,
    device: str | None = None,
    precision: Precision | None = None,
    batch_tokens: int | None = None,
) -> Embedder:
    """Build the embedder that a project's index was built with; see `build_embedder`.

    Its precision is the recorded one unless another is given.
    """
    return build_embedder(
        str(settings.embedder),
        batch_size=batch_size,
        device=device,
        pooling=settings.embedder_pooling,
        weights=paths.lexical_weights,
        precision=precision or settings.embed_precision or "fp32",
        batch_tokens=batch_tokens,
    )
