"""How a project's chunks are embedded and stored where no flag says so.

A project continues as it was begun, on any machine; only a new one takes this machine's defaults.
Packed projects, which other programs read, are exact by default: fp32 in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from retro_mcore.errors import ConfigurationError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.markers import fingerprint_of, read_marker
from retro_mcore.project.shards import Shard
from retro_mcore.retrieval.chunk_text import DocumentEnds
from retro_mcore.retrieval.embedders import takes_batches
from retro_mcore.retrieval.embedders.base import BATCH_SIZE, CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from retro_mcore.retrieval.embedders.precision import FLAG, PRECISIONS, Precision
from retro_mcore.retrieval.stored_types import StoredType

WantedPrecision = Literal["auto", "fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class Batches:
    """How chunks are batched for the embedder. Last bits of vectors depend on it.

    Attributes:
        size: Chunks of a batch.
        tokens: Tokens of a batch, padding included, instead of `size`.
    """

    size: int = BATCH_SIZE
    tokens: int | None = None

    @classmethod
    def of(cls, size: int | None, tokens: int | None) -> Batches | None:
        """What flags ask for; None: nothing."""
        return None if size is None and tokens is None else cls(size or BATCH_SIZE, tokens)

    @property
    def options(self) -> dict[str, Any]:
        """By flag, without the one that older versions did not have."""
        tokens = {} if self.tokens is None else {"--embed-batch-tokens": self.tokens}
        return {"--embed-batch-size": self.size, **tokens}

    @classmethod
    def recorded(cls, options: Mapping[str, Any]) -> Batches | None:
        """What the record of a stage names; None: the stage has not finished."""
        return cls.of(options.get("--embed-batch-size"), options.get("--embed-batch-tokens"))


#: Batches that versions and machines choose for a new project.
_AUTOMATIC_BATCHES = (
    Batches(),
    Batches(tokens=CPU_BATCH_TOKENS),
    Batches(tokens=GPU_BATCH_TOKENS),
)


@dataclass(frozen=True)
class EmbeddedAs:
    """How chunks become stored vectors.

    Attributes:
        precision: Precision that the embedder computes in.
        dtype: Type that vectors are stored in.
        document_ends: Text that the embedder reads for an end of document inside a chunk.
        batches: How chunks are batched.
    """

    precision: Precision
    dtype: StoredType
    document_ends: DocumentEnds
    batches: Batches

    @property
    def options(self) -> dict[str, Any]:
        """The options by flag, without those that older versions did not have."""
        options: dict[str, Any] = {**self.batches.options, **precision_options(self.precision)}
        if self.dtype != "fp32":
            options["--embeddings-dtype"] = self.dtype
        return options

    def fingerprint(self, options: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        """Fingerprint of the embeddings; unchanged for those of older versions.

        Args:
            options: The other options that embeddings depend on, by flag.
            inputs: Digests of the files that they are made from.
        """
        named = [] if self.document_ends == "line break" else [self.document_ends]
        return fingerprint_of([{**options, **self.options}, dict(inputs), *named])


def precision_options(precision: Precision) -> dict[str, Any]:
    """A precision as the record of a stage names it: fp32 and fp16 as in older versions."""
    if precision == "fp16":
        return {"--embed-fp16": True}
    return {} if precision == "fp32" else {FLAG: precision}


@dataclass(frozen=True)
class Automatic:
    """How a new aligned project is embedded by this machine.

    Attributes:
        precision: Precision.
        batches: How chunks are batched.
    """

    precision: Precision = "fp32"
    batches: Batches = Batches()


@dataclass(frozen=True)
class Wanted:
    """What the flags ask for.

    Attributes:
        precision: Precision; None: automatic.
        dtype: Type of the stored vectors; None: the project's; in a new one fp16, if it is aligned.
        batches: How chunks are batched; None: automatic.
        automatic: What a new aligned project takes where nothing is asked for.
    """

    precision: Precision | None
    dtype: StoredType | None
    batches: Batches | None
    automatic: Automatic

    def choose(
        self,
        settings: ProjectSettings,
        record: Mapping[str, Any],
        shards: Sequence[Shard],
        options: Mapping[str, Any],
        inputs: Mapping[str, str],
    ) -> EmbeddedAs:
        """Choose how a project is embedded: as before, as begun, or the defaults.

        Args:
            settings: The project's settings.
            record: Options of its build_index, if it has finished.
            shards: Files of the embeddings.
            options: See `EmbeddedAs.fingerprint`.
            inputs: See `EmbeddedAs.fingerprint`.
        """
        if settings.embedder is not None:
            candidates = list(self._as_before(settings, record))
        else:
            candidates = list(self._candidates(packed=settings.samples == "packed"))
        markers = (read_marker(shard.path) or {} for shard in shards)
        begun = {marker.get("fingerprint") for marker in markers} if len(candidates) > 1 else set()
        for candidate in candidates:
            if candidate.fingerprint(options, inputs) in begun:
                return candidate
        return candidates[0]

    def _as_before(
        self, settings: ProjectSettings, record: Mapping[str, Any]
    ) -> Iterable[EmbeddedAs]:
        """The ways in which a finished project may have been embedded."""
        precision = self.precision or recorded_precision(settings, record)
        dtype, batches = self.dtype or settings.embeddings_dtype, [self.batches]
        if self.batches is None and record:
            batches = [Batches.recorded(record) or Batches()]
        elif self.batches is None:  # an extended project has no record before its first run
            batches = list(_AUTOMATIC_BATCHES)
        for each in batches:
            assert each is not None
            yield EmbeddedAs(precision, dtype, settings.document_ends, each)

    def _candidates(self, packed: bool) -> Iterable[EmbeddedAs]:
        """Every way that fits the flags; the default comes first."""
        automatic: list[Precision] = list(PRECISIONS)
        dtypes: list[StoredType] = ["fp32", "fp16"]
        batches = list(_AUTOMATIC_BATCHES)
        if not packed:
            automatic.sort(key=lambda precision: precision != self.automatic.precision)
            dtypes.reverse()
            batches.sort(key=lambda each: each != self.automatic.batches)
        ends: list[DocumentEnds] = ["detokenized", "line break"]
        return (
            EmbeddedAs(precision, dtype, document_ends, each)
            for precision in ([self.precision] if self.precision else automatic)
            for dtype in ([self.dtype] if self.dtype else dtypes)
            for document_ends in ends
            for each in ([self.batches] if self.batches else batches)
        )


def refuse_unused_batches(name: str, given: Batches | None, known: Batches | None) -> None:
    """Refuse a number of chunks for an embedder that runs no model on batches.

    Args:
        name: Name of the embedder.
        given: What flags ask for.
        known: What the project was run with; older versions recorded any number.

    Raises:
        ConfigurationError: such a number is given.
    """
    unused = given is not None and given.size not in (BATCH_SIZE, known.size if known else None)
    if unused and not takes_batches(name):
        found = f"{name} runs no model on batches"
        raise ConfigurationError("--embed-batch-size", found, "Leave it out")


def explicit_precision(precision: WantedPrecision | None, half: bool) -> Precision | None:
    """The precision that --embed-precision and --embed-fp16 ask for; None: none.

    Raises:
        ConfigurationError: there is no such precision, or they contradict each other.
    """
    if precision not in (None, "auto", *PRECISIONS):
        raise ConfigurationError(FLAG, str(precision), f"Choose auto, {', '.join(PRECISIONS)}")
    if half and precision not in (None, "auto", "fp16"):
        raise ConfigurationError("--embed-fp16", f"with {FLAG} {precision}", "Give one of them")
    if half:
        return "fp16"
    return None if precision is None or precision == "auto" else precision


def recorded_precision(settings: ProjectSettings, options: Mapping[str, Any]) -> Precision:
    """Precision that a project was embedded in.

    Args:
        settings: The project's settings.
        options: Options of its build_index; older versions recorded fp16 only there.
    """
    return settings.embed_precision or ("fp16" if options.get("--embed-fp16") else "fp32")
