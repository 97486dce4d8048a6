"""Dry runs: parameters, memory and FLOPs of a training run, without starting it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.conversion.formats import open_checkpoint
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.distributed import get_world_size
from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.options.model_sizes import check_trains
from retro_mcore.training.options.parallel import ParallelOptions
from retro_mcore.training.options.run import PretrainOptions
from retro_mcore.training.reporting.flops import training_flops_per_sample
from retro_mcore.training.setup.build import build_config
from retro_mcore.training.setup.estimate import (
    Memory,
    Parameters,
    context_parallel_bytes,
    count_parameters,
    estimate_memory,
)
from retro_mcore.training.setup.initialize import check_expert_sizes
from retro_mcore.training.setup.plan import TrainingPlan, make_plan
from retro_mcore.training.setup.simulate import Simulation, simulate


@dataclass(frozen=True)
class DryRun:
    """A training run before it is started.

    Attributes:
        plan: Its configuration.
        world_size: Number of processes.
        num_microbatches: Microbatches per process and iteration.
        parameters: Number of parameters of the whole model.
        memory: Bytes on the process that needs the most.
        context_bytes: Bytes that each process sends for context parallelism, for each micro batch.
        flops_per_token: FLOPs per token: forward and backward pass.
        simulation: A simulated step of this run, if it was asked for.
    """

    plan: TrainingPlan
    world_size: int
    num_microbatches: int
    parameters: Parameters
    memory: Memory
    context_bytes: int
    flops_per_token: float
    simulation: Simulation | None = None

    @property
    def copies(self) -> int:
        """Number of model copies on all processes."""
        return self.world_size // _processes_per_copy(self.plan.options)

    def as_json(self) -> dict[str, Any]:
        """The numbers, for JSON: bytes, and FLOPs of a step on each stage's first rank."""
        plan, model = self.plan, self.plan.arguments
        return {
            "model": {
                "num_layers": model.num_layers,
                "hidden_size": model.hidden_size,
                "padded_vocab_size": model.padded_vocab_size,
                "parameters": {**asdict(self.parameters), "total": self.parameters.total},
            },
            "processes": self.world_size,
            "copies": self.copies,
            "batch": {
                "global_batch_size": plan.global_batch_size,
                "micro_batch_size": plan.options.micro_batch_size,
                "micro_batches": self.num_microbatches,
            },
            "iterations": plan.train_iters,
            "estimated_memory": {**asdict(self.memory), "total": self.memory.total},
            "context_parallel_bytes": self.context_bytes,
            "flops_per_token": self.flops_per_token,
            "simulation": self.simulation and self.simulation.as_json(),
        }


def dry_run(options: PretrainOptions, simulated: bool = False) -> DryRun:
    """Plan a run. Call it after `setup_device`.

    Layers and optimizers that the run would refuse on this machine are refused. The project need
    not exist yet. Then the options that it would fix must be given.

    Args:
        options: The run's configuration.
        simulated: Whether to simulate a step of it.

    Raises:
        ConfigurationError: an option is invalid, contradicts the project, or is missing.
    """
    project, vocabulary, used = _project(options)
    plan = make_plan(options, project, vocabulary, used, gpt_may_be_missing=True)
    plan.check_layers()
    plan.check_optimizer()
    check_trains(plan.arguments, options)
    config = build_config(plan.arguments, options, options)
    world_size, copies = _copies(options)
    check_expert_sizes(
        options.expert_model_parallel_size,
        options.expert_tensor_parallel_size or options.tensor_model_parallel_size,
        world_size // options.pipeline_model_parallel_size,
    )
    batch = options.micro_batch_size * copies
    if plan.global_batch_size % batch:
        raise ConfigurationError(
            "--global-batch-size",
            f"{plan.global_batch_size} over {copies} copies of the model with --micro-batch-size "
            f"{options.micro_batch_size}",
            f"Choose a multiple of {batch}, or another number of processes",
        )
    microbatches = plan.global_batch_size // batch
    flops = training_flops_per_sample(
        config, plan.sequence_length, plan.arguments.padded_vocab_size
    )
    return DryRun(
        plan,
        world_size,
        microbatches,
        count_parameters(config, plan.arguments),
        estimate_memory(
            config,
            plan.arguments,
            options.micro_batch_size,
            microbatches,
            copies,
            options.use_distributed_optimizer,
            options.optimizer,
        ),
        context_parallel_bytes(config, plan.arguments, options.micro_batch_size),
        flops / plan.sequence_length,
        simulate(plan, world_size) if simulated else None,
    )


def _project(options: PretrainOptions) -> tuple[ProjectConfig, int, int]:
    """Project configuration, vocabulary size and usable ids, from the project or the options."""
    paths = ProjectPaths(options.project_dir)
    if paths.config.is_file() or paths.legacy_config.is_file():
        project = ProjectConfig.load(options.project_dir)
        tokenizer = load_project_tokenizer(project, paths)
        return project, tokenizer.vocab_size, tokenizer.used_vocab_size
    needed: dict[str, Any] = {
        "seq_length": options.seq_length,
        "global_batch_size": options.global_batch_size,
        "train_samples": options.train_samples or options.train_iters,
        "vocab_size": options.vocab_size or _vocabulary_of_gpt(options),
    }
    for name, value in needed.items():
        if value is None:
            raise ConfigurationError(
                flag_of(name),
                f"not given, and {Path(options.project_dir)} is not a project yet",
                "--dry-run needs it",
            )
    samples = options.train_samples or needed["train_samples"] * needed["global_batch_size"]
    project = ProjectConfig(
        retro_block_size=100_000,
        retro_gpt_chunk_length=options.retro_chunk_length or 64,
        retro_gpt_seq_length=needed["seq_length"],
        retro_gpt_global_batch_size=needed["global_batch_size"],
        retro_gpt_train_samples=samples,
        retro_gpt_eval_interval=options.eval_interval or 1000,
        retro_gpt_eval_iters=options.eval_iters or 100,
        retro_gpt_split=options.split or "98,2,0",
        retro_gpt_seed=options.seed or 1234,
        retro_gpt_data_path=[],
        retro_gpt_tokenizer_type=options.tokenizer_type or "GPTSentencePieceTokenizer",
    )
    return project, needed["vocab_size"], needed["vocab_size"]


def _vocabulary_of_gpt(options: PretrainOptions) -> int | None:
    """Vocabulary size of the GPT in --load-gpt, if it exists."""
    if options.load_gpt is None or not Path(options.load_gpt).exists():
        return None
    flags = open_checkpoint(options.load_gpt, compare=False).flags
    return flags.get("vocab_size") or flags["padded_vocab_size"]


def _processes_per_copy(options: ParallelOptions) -> int:
    """Number of processes that share one copy of the model, or a sample."""
    return (
        options.tensor_model_parallel_size
        * options.pipeline_model_parallel_size
        * options.context_parallel_size
    )


def _copies(options: PretrainOptions) -> tuple[int, int]:
    """Number of processes, and of model copies on them."""
    needed = _processes_per_copy(options)
    processes = options.world_size or max(get_world_size(), needed)
    if processes % needed:
        raise ConfigurationError(
            "--world-size",
            f"{processes}, and one copy of the model takes {needed}",
            f"Choose a multiple of {needed}",
        )
    return processes, processes // needed
