"""Configuration of a perplexity evaluation. Imports no megatron, so that `--help` is fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from retro_mcore.errors import ConfigurationError, raise_problems, too_small
from retro_mcore.time_limit import InferenceTimeLimit
from retro_mcore.training.options.pretrain import ParallelOptions

#: Options that must be at least 1 if given.
_POSITIVE = (
    "micro_batch_size",
    "eval_iters",
    "eval_documents",
    "leakage_neighbors",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)
_LEAKAGE_NEIGHBORS = 10


@dataclass(kw_only=True)
class EvaluatePerplexityConfig(InferenceTimeLimit):
    """Configuration of a perplexity evaluation."""

    project_dir: str
    """The project directory."""
    load: str
    """Directory of checkpoints; the latest is evaluated."""
    split: Literal["valid", "test", "both"] = "valid"
    """Held-out documents to evaluate."""
    protocol: Literal["samples", "documents", "both"] = "samples"
    """samples: Megatron's validation loss, over the samples that query_neighbors found neighbors
    for. documents: bits per byte of whole documents through overlapping windows, with neighbors
    searched for their own chunks."""
    retro_eval_neighbors: list[Literal["real", "shuffled", "random", "none"]] = field(
        default_factory=list
    )
    """Kinds of neighbors to measure with. Default: real, shuffled and none; only none if the model
    reads no neighbors, and no shuffled if one text has more than half of the chunks."""
    database_fraction: float = 1.0
    """Share of the database's documents to retrieve from (protocol samples). Saved neighbors of the
    others are left out, so one search shows what a smaller database would give. Save many
    neighbors for that (query_neighbors --num-neighbors-save 200)."""
    retro_attention_gate: float | None = None
    """Scale of the cross-attention output. Default: the checkpoint's. A model tuned with 0 needs 1
    to use its neighbors."""
    eval_iters: int | None = None
    """Global batches of samples to evaluate. Default: all samples of the split."""
    eval_documents: int | None = None
    """Number of documents of each corpus to evaluate, from the first. Default: all of the split."""
    overlapping_eval: int | None = None
    """Number of tokens from one window's start to the next. Default: half a window, in whole
    chunks."""
    bootstrap: int = 0
    """Number of resamples of the documents for 95% intervals of bits per byte, and of their
    differences between kinds of neighbors (protocol documents). 0: no intervals."""
    leakage: bool = False
    """Also measure bits per byte by overlap of chunks and neighbors (protocol documents)."""
    leakage_neighbors: int | None = None
    """Number of neighbors per chunk used to measure its overlap (default: 10)."""
    leakage_alphas: list[float] = field(default_factory=list)
    """Maximum overlaps of the leakage curve, each from 0 to 1. Default: 0.125, 0.25, … 1."""
    attribute: bool = False
    """Also measure which neighbors help: the mean loss without the neighbors of each rank minus the
    loss with them. Costs one pass for each rank, and two more."""
    micro_batch_size: int = 4
    """Number of samples or windows per forward pass on each process."""
    num_workers: int = 0
    """Number of data loading workers per process."""
    seed: int = 1234
    """Seed of shuffling and random draws."""
    output: str | None = None
    """JSON file of the samples' measurements. Default: perplexity.json in --load. Other files are
    in the same folder: bits_per_byte.json, attribution.json, leakage.json and leakage.png, or
    NAME.bits_per_byte.json, … for --output NAME.json (NAME_bits_per_byte.json, … for --output
    NAME)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: CUDA if available, else the CPU."""
    tensor_model_parallel_size: int = 1
    """Number of tensor parallel processes; may differ from training."""
    sequence_parallel: bool = False
    """Use sequence parallelism among the tensor parallel processes."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages; may differ from training."""
    context_parallel_size: int = 1
    """Number of processes over which each text's tokens are divided; may differ from training."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the transformer layers."""

    @property
    def num_leakage_neighbors(self) -> int:
        """Neighbors per chunk that its overlap is measured with."""
        return _LEAKAGE_NEIGHBORS if self.leakage_neighbors is None else self.leakage_neighbors

    @property
    def splits(self) -> tuple[Literal["valid", "test"], ...]:
        """The splits selected by --split."""
        return ("valid", "test") if self.split == "both" else (self.split,)

    def parallel(self) -> ParallelOptions:
        """The parallel layout that the model is loaded into."""
        return ParallelOptions(
            device=self.device,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            sequence_parallel=self.sequence_parallel,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            context_parallel_size=self.context_parallel_size,
            transformer_impl=self.transformer_impl,
        )

    def check(self) -> None:
        """Reject values out of range and conflicting options.

        Raises:
            ConfigurationError: a value is invalid. Names the flag.
            SeveralErrors: several values are invalid.
        """
        raise_problems([*too_small(self, dict.fromkeys(_POSITIVE, 1)), *self._problems()])

    def _problems(self) -> Iterator[ConfigurationError]:
        if self.bootstrap < 0:
            yield ConfigurationError("--bootstrap", str(self.bootstrap), "Give 0 or more")
        for alpha in self.leakage_alphas:
            if not 0 <= alpha <= 1:
                yield ConfigurationError("--leakage-alphas", str(alpha), "Give numbers from 0 to 1")
        if not 0 < self.database_fraction <= 1:
            found = str(self.database_fraction)
            yield ConfigurationError(
                "--database-fraction", found, "Give more than 0, and at most 1"
            )
        elif self.database_fraction < 1 and self.protocol != "samples":
            found = f"{self.database_fraction} with --protocol {self.protocol}"
            yield ConfigurationError("--database-fraction", found, "Use --protocol samples")
        elif self.database_fraction < 1 and "random" in self.retro_eval_neighbors:
            found = f"{self.database_fraction} with random neighbors, which are of all documents"
            yield ConfigurationError("--database-fraction", found, "Leave random out")
        of_documents = {
            "--bootstrap": self.bootstrap != 0,
            "--leakage": self.leakage,
            "--overlapping-eval": self.overlapping_eval is not None,
            "--eval-documents": self.eval_documents is not None,
        }
        for flag, given in of_documents.items():
            if given and self.protocol == "samples":
                yield ConfigurationError(
                    flag, "given with --protocol samples", "Add --protocol documents, or both"
                )
        of_leakage = {
            "--leakage-alphas": bool(self.leakage_alphas),
            "--leakage-neighbors": self.leakage_neighbors is not None,
        }
        for flag, given in of_leakage.items():
            if given and not self.leakage:
                yield ConfigurationError(flag, "given without --leakage", "Add --leakage")
        if self.eval_iters is not None and self.protocol == "documents":
            yield ConfigurationError(
                "--eval-iters", "given with --protocol documents", "Give --eval-documents"
            )
