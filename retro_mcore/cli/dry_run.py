"""`pretrain_retro --dry-run`: what a run would be, without starting it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_mcore.cli.command import print_summary
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.distributed import get_world_size
from retro_mcore.errors import ConfigurationError
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.options.pretrain import TrainingOptions

if TYPE_CHECKING:
    from retro_mcore.training.setup.estimate import Memory, Parameters
    from retro_mcore.training.setup.plan import TrainingPlan

_GIB = 2**30


@dataclass(frozen=True)
class DryRun:
    """What a run would be.

    Attributes:
        plan: Its configuration.
        world_size: Processes.
        num_microbatches: Of each process and iteration.
        parameters: Of the whole model.
        memory: Bytes on the process that needs most.
        flops_per_token: Of training: forward and backward pass.
    """

    plan: TrainingPlan
    world_size: int
    num_microbatches: int
    parameters: Parameters
    memory: Memory
    flops_per_token: float


def dry_run(options: TrainingOptions, world_size: int | None, vocab_size: int | None) -> DryRun:
    """Build the configuration, and print parameters, memory and operations.

    The project need not exist yet: then the flags that it would fix must be given.

    Args:
        options: The flags.
        world_size: Processes; None: as started, at least one copy of the model.
        vocab_size: The tokenizer's, where there is no project.

    Raises:
        ConfigurationError: a flag cannot work, contradicts the project, or is missing.
    """
    from retro_mcore.training.reporting.flops import training_flops_per_sample
    from retro_mcore.training.setup.build import build_config
    from retro_mcore.training.setup.estimate import count_parameters, estimate_memory
    from retro_mcore.training.setup.plan import make_plan

    project, vocabulary, used = _project(options, vocab_size)
    plan = make_plan(options, project, vocabulary, used)
    config = build_config(plan.arguments, options, options)
    world_size, copies = _copies(options, world_size)
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
    result = DryRun(
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
        ),
        flops / plan.sequence_length,
    )
    print_summary("pretrain_retro --dry-run", _rows(result, options, copies))
    return result


def _project(options: TrainingOptions, vocab_size: int | None) -> tuple[ProjectConfig, int, int]:
    """The project, its tokenizer's vocabulary and what of it can occur; else as the flags say."""
    paths = ProjectPaths(options.project_dir)
    if paths.config.is_file() or paths.legacy_config.is_file():
        project = ProjectConfig.load(options.project_dir)
        tokenizer = load_project_tokenizer(project, paths)
        return project, tokenizer.vocab_size, tokenizer.used_vocab_size
    needed: dict[str, Any] = {
        "seq_length": options.seq_length,
        "global_batch_size": options.global_batch_size,
        "train_samples": options.train_samples or options.train_iters,
        "vocab_size": vocab_size or _vocabulary_of_gpt(options),
    }
    for name, value in needed.items():
        if value is None:
            raise ConfigurationError(
                f"--{name.replace('_', '-')}",
                f"not given, and {Path(options.project_dir)} is no project yet",
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


def _vocabulary_of_gpt(options: TrainingOptions) -> int | None:
    """Of the GPT that --load-gpt names, if it is there."""
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint

    if options.load_gpt is None or not Path(options.load_gpt).exists():
        return None
    flags = open_checkpoint(options.load_gpt, compare=False).flags
    return flags.get("vocab_size") or flags["padded_vocab_size"]


def _copies(options: TrainingOptions, world_size: int | None) -> tuple[int, int]:
    """Processes, and the copies of the model that they hold."""
    needed = options.tensor_model_parallel_size * options.pipeline_model_parallel_size
    processes = world_size or max(get_world_size(), needed)
    if processes % needed:
        raise ConfigurationError(
            "--world-size",
            f"{processes}, and one copy of the model takes {needed}",
            f"Choose a multiple of {needed}",
        )
    return processes, processes // needed


def _rows(result: DryRun, options: TrainingOptions, copies: int) -> dict[str, object]:
    plan, memory, count = result.plan, result.memory, result.parameters
    tokens = plan.global_batch_size * plan.sequence_length
    layout = f"tensor {options.tensor_model_parallel_size}"
    layout += f" x pipeline {options.pipeline_model_parallel_size} x data {copies}"
    model = plan.arguments
    return {
        "model": f"{model.num_layers} layers of {model.hidden_size}, "
        f"{model.num_attention_heads} heads, vocabulary {model.padded_vocab_size}",
        "parameters": f"{count.total:,} (decoder {count.decoder + count.embedding:,}, retrieval "
        f"{count.retrieval:,})",
        "processes": f"{result.world_size} = {layout}",
        "batch": f"{plan.global_batch_size} samples = {result.num_microbatches} x "
        f"{options.micro_batch_size} x {copies}; {tokens:,} tokens",
        "iterations": f"{plan.train_iters:,}; {plan.train_samples * plan.sequence_length:,} tokens",
        "memory per GPU": f"{memory.total / _GIB:.1f} GiB: weights {memory.weights / _GIB:.1f}, "
        f"gradients {memory.gradients / _GIB:.1f}, optimizer {memory.optimizer / _GIB:.1f}, "
        f"activations about {memory.activations / _GIB:.1f}",
        "FLOPs per token": f"{result.flops_per_token:.3e}",
        "FLOPs of the run": f"{result.flops_per_token * tokens * plan.train_iters:.3e}",
    }
