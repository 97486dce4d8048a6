"""Training flags, grouped by topic, with Megatron's names, and its defaults if it has one.

This module imports neither torch nor megatron, so that `--help` is fast and a command can choose
its device before megatron is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from retro_mcore.errors import ConfigurationError, check_all, flag_of, raise_problems
from retro_mcore.model.option_traits import at_least, below_minimum, of_project
from retro_mcore.model.options import ModelOptions
from retro_mcore.time_limit import TrainingTimeLimit
from retro_mcore.training.options.checkpoints import CheckpointOptions, ReproducibilityOptions
from retro_mcore.training.options.documents import DocumentOptions
from retro_mcore.training.options.logging import LoggingOptions
from retro_mcore.training.options.megatron import DataParallelFlags
from retro_mcore.training.options.noise import NeighborNoiseOptions
from retro_mcore.training.options.optimizer import OptimizerOptions
from retro_mcore.training.options.parallel import ParallelOptions, RecomputeOptions

__all__ = [
    "CheckpointOptions",
    "DataOptions",
    "ExitOptions",
    "LoggingOptions",
    "OptimizerOptions",
    "ParallelOptions",
    "RecomputeOptions",
    "ReproducibilityOptions",
    "TrainingOptions",
]


@dataclass(kw_only=True)
class DataOptions:
    """Samples. Options fixed by the project may be repeated here; other values are refused."""

    project_dir: str
    """The project directory."""
    micro_batch_size: int = field(metadata=at_least(1))
    """Samples per process and forward pass."""
    train_iters: int | None = field(default=None, metadata=at_least(1))
    """Iterations to train. Default: as many as the project's samples allow."""
    train_samples: int | None = field(default=None, metadata=at_least(1))
    """Samples to train on (instead of --train-iters), at most the number in the project."""
    num_workers: int = field(default=2, metadata=at_least(0))
    """Number of processes that read samples, per training process; 0: it reads them itself."""
    seq_length: int | None = field(default=None, metadata=of_project("retro_gpt_seq_length"))
    """Tokens per sample. Fixed by the project."""
    retro_chunk_length: int | None = field(
        default=None, metadata=of_project("retro_gpt_chunk_length")
    )
    """Tokens per chunk. Fixed by the project."""
    global_batch_size: int | None = field(
        default=None, metadata=of_project("retro_gpt_global_batch_size")
    )
    """Samples per iteration. Fixed by the project."""
    rampup_batch_size: list[int] | None = None
    """START INCREMENT SAMPLES: start with a batch size of START, and increase it in steps of
    INCREMENT to the global batch size over SAMPLES samples."""
    eval_interval: int | None = field(default=None, metadata=of_project("retro_gpt_eval_interval"))
    """Iterations between validations. Fixed by the project."""
    eval_iters: int | None = field(default=None, metadata=of_project("retro_gpt_eval_iters"))
    """Batches per validation. Fixed by the project."""
    seed: int | None = field(default=None, metadata=of_project("retro_gpt_seed"))
    """Seed for weights, dropout and data order. Fixed by the project."""
    split: str | None = field(default=None, metadata=of_project("retro_gpt_split"))
    """Percentages of training, validation and test documents. Fixed by the project."""
    tokenizer_type: str | None = field(
        default=None, metadata=of_project("retro_gpt_tokenizer_type")
    )
    """Type of the tokenizer. Fixed by the project."""


@dataclass(kw_only=True)
class ExitOptions:
    """Conditions under which a run saves and stops early, so that it can be resumed."""

    exit_interval: int | None = field(default=None, metadata=at_least(1))
    """Save and stop at the next iteration that is a multiple of this; rerun to resume."""
    exit_duration_in_mins: float | None = field(default=None, metadata=at_least(0))
    """Save and stop after this many minutes."""
    exit_signal_handler: bool = True
    """Save and stop with exit code 0 on SIGTERM (preemption, time limit)."""


@dataclass(kw_only=True)
class TrainingOptions(
    TrainingTimeLimit,
    LoggingOptions,
    ExitOptions,
    NeighborNoiseOptions,
    DocumentOptions,
    CheckpointOptions,
    ReproducibilityOptions,
    DataParallelFlags,
    OptimizerOptions,
    RecomputeOptions,
    ParallelOptions,
    ModelOptions,
    DataOptions,
):
    """All options of a training run."""

    def check(self) -> None:
        """Reject options that are invalid for any project, all together.

        Raises:
            ConfigurationError: an option is invalid. Names the flag.
        """
        check_all(
            self.check_checkpoints,
            self.check_precision,
            self.check_unsupported,
            self.check_model,
            self.check_recompute,
            self.check_optimizer,
            self.check_schedule,
            self.check_logging,
            partial(self.check_neighbor_noise, self.no_retrieval),
            partial(self.check_documents, self.position_embedding_type),
            self._check_data_parallel,
            self._check_batches,
            lambda: raise_problems([*below_minimum(self)]),
        )

    def _check_batches(self) -> None:
        if self.train_iters is not None and self.train_samples is not None:
            raise ConfigurationError("--train-iters", "given with --train-samples", "Choose one")
        if self.rampup_batch_size is None:
            return
        for name in ("train_iters", "lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters"):
            if getattr(self, name):
                raise ConfigurationError(
                    flag_of(name),
                    "given with --rampup-batch-size, under which iterations differ in size",
                    f"Give {flag_of(name.replace('iters', 'samples'))}",
                )

    def _check_data_parallel(self) -> None:
        in_pipeline = self.pipeline_model_parallel_size > 1 and (self.bf16 or self.fp16)
        divided = self.use_distributed_optimizer or self.optimizer == "dist_muon"
        if self.freeze_decoder and in_pipeline and not divided:
            # Stages then train different numbers of weights, whose saved states do not merge.
            raise ConfigurationError(
                "--freeze-decoder",
                f"given with --{'bf16' if self.bf16 else 'fp16'} in a pipeline, whose "
                "checkpoints could not be loaded",
                "Add --use-distributed-optimizer",
            )
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ConfigurationError(
                "--overlap-param-gather",
                "given without --use-distributed-optimizer",
                "Add --use-distributed-optimizer",
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigurationError(
                "--overlap-param-gather",
                "given without --overlap-grad-reduce",
                "Add --overlap-grad-reduce",
            )
