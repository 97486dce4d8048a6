"""A training step of a rank of each pipeline stage, simulated or measured.

The model, Megatron's wrappers, optimizer and schedule are the real ones. In a simulation their
tensors have no values (`platform.simulation`), so that a layout of any size runs in one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from retro_mcore.checkpoint.state import TrainingParts
from retro_mcore.errors import ConfigurationError
from retro_mcore.platform.experts import routing_evenly
from retro_mcore.platform.optimizer_state import overflow_flags, state_tensors
from retro_mcore.platform.simulation import SimulatedTracker, fake_tensors, simulated_rank
from retro_mcore.platform.tracking import Tracker, marking_forward_passes
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.training.loop.balance import reduce_balance
from retro_mcore.training.loop.loss import reduce_losses
from retro_mcore.training.loop.optimizer import release_functions, take_step
from retro_mcore.training.loop.trainer import compute_gradients, training_parts
from retro_mcore.training.setup.build import build_model_stages, uses_transformer_engine
from retro_mcore.training.setup.initialize import (
    initialize_layout,
    set_batch_sizes,
    set_seeds,
)
from retro_mcore.training.setup.plan import TrainingPlan


@dataclass(frozen=True)
class RankStep:
    """What a training step takes on one rank.

    Attributes:
        memory: Bytes by kind (`tracking.KINDS`), when they are most.
        sent: Bytes that the rank sends, by group (`tracking.group_kind`).
        flops: FLOPs of matrix products, those of recomputation included.
    """

    memory: dict[str, int]
    sent: dict[str, int]
    flops: int

    @property
    def peak(self) -> int:
        """Bytes in memory at the highest point."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Simulation:
    """A training step on the first rank of each pipeline stage.

    Attributes:
        stages: By pipeline stage.
        waiting: Share of the step in which each stage waits for others (the pipeline's bubble), if
            time passes by FLOPs and sending takes none.
    """

    stages: tuple[RankStep, ...]
    waiting: tuple[float, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """The numbers of each stage."""
        return [
            {**asdict(stage), "peak": stage.peak, "waiting": waiting}
            for stage, waiting in zip(self.stages, self.waiting, strict=True)
        ]


def simulate(plan: TrainingPlan, world_size: int) -> Simulation:
    """Simulate a training step under the plan's layout. Call it after `setup_device("cpu")`.

    Layers are local ones (without Transformer Engine), tokens are evenly routed to the experts, and
    all samples are full.

    Args:
        plan: The plan of the run.
        world_size: Number of ranks.

    Raises:
        ConfigurationError: an option cannot be simulated, or the layout does not fit.
    """
    _refuse(plan)
    stages = plan.options.pipeline_model_parallel_size
    steps = tuple(
        _simulate_rank(plan, rank, world_size)
        for rank in range(0, world_size, world_size // stages)
    )
    virtual = plan.options.num_virtual_stages_per_pipeline_rank or 1
    copies = plan.options.micro_batch_size * _copies(plan, world_size)
    return Simulation(steps, _waiting(steps, plan.global_batch_size // copies, virtual))


def measure_step(
    parts: TrainingParts,
    plan: TrainingPlan,
    batches: Iterator[RetroBatch],
    num_microbatches: int,
    tracker: Tracker,
) -> RankStep:
    """Take a training step, and return what it took on this rank. All ranks call it.

    Args:
        parts: What is trained; made, like the batches, with the tracker on.
        plan: The plan of the run.
        batches: This rank's micro batches; `num_microbatches` are consumed.
        num_microbatches: Number of micro batches.
        tracker: Sees the tensors.
    """
    tracker.start()
    with marking_forward_passes(tracker, parts.stages):
        reports = compute_gradients(parts, batches, num_microbatches, plan)
        reduce_losses(reports)
        reduce_balance(parts.stages, num_microbatches)
        take_step(parts.optimizer)
        parts.scheduler.step(plan.global_batch_size)
    return RankStep(tracker.peak(_held(parts)), dict(tracker.sent), tracker.flops)


def _held(parts: TrainingParts) -> dict[str, list[Tensor]]:
    """Tensors that last from step to step."""
    buffers = [
        buffer
        for stage in parts.stages
        for buffer in (*stage.buffers, *stage.expert_parallel_buffers)
    ]
    weights: list[Tensor] = [
        weight
        for stage in parts.stages
        for weight in (*stage.module.parameters(), *stage.module.buffers())
    ]
    return {
        "optimizer": list(state_tensors(parts.optimizer)),
        "weights": weights,
        "gradients": [buffer.grad_data for buffer in buffers],
    }


def _refuse(plan: TrainingPlan) -> None:
    options = plan.options
    if uses_transformer_engine(options):
        raise ConfigurationError(
            "--simulate",
            "with Transformer Engine's layers, which run on CUDA only",
            "Add --transformer-impl local: the simulation is then of those layers",
        )
    if options.cpu_offloading_num_layers:
        raise ConfigurationError(
            "--simulate",
            f"with --cpu-offloading-num-layers {options.cpu_offloading_num_layers}, but a "
            "simulation has one kind of memory",
            "Leave one of them out",
        )


def _copies(plan: TrainingPlan, world_size: int) -> int:
    options = plan.options
    return world_size // (
        options.tensor_model_parallel_size
        * options.pipeline_model_parallel_size
        * options.context_parallel_size
    )


def _simulate_rank(plan: TrainingPlan, rank: int, world_size: int) -> RankStep:
    options = plan.options
    with simulated_rank(rank, world_size) as tracker:
        initialize_layout(options)
        num_microbatches = set_batch_sizes(plan.batch_sizes, options.micro_batch_size)
        set_seeds(plan.project.retro_gpt_seed)
        with fake_tensors(tracker):
            parts = training_parts(build_model_stages(plan.arguments, options, options), plan)
            for stage in parts.stages:
                stage.train()
            with routing_evenly(parts.stages, tracker):
                step = _step_of_many(parts, plan, num_microbatches, tracker)
            release_functions(parts.stages)
    return step


def _step_of_many(
    parts: TrainingParts, plan: TrainingPlan, num_microbatches: int, tracker: SimulatedTracker
) -> RankStep:
    """A step of many micro batches, from steps of few.

    With as many as there are stages, a pipeline is full once; from there on each micro batch adds
    the same FLOPs and bytes, and none adds memory.
    """
    for flag in overflow_flags(parts.optimizer):
        tracker.answer(flag, 0.0)
    stages = plan.options.pipeline_model_parallel_size
    few, more = (min(times * stages, num_microbatches) for times in (1, 2))
    small, step = (
        [measure_step(parts, plan, _batches(plan), number, tracker) for number in (few, few, more)]
    )[1:]  # the first step makes the optimizer's state
    if more == num_microbatches:
        return step

    def scaled(of_few: int, of_more: int) -> int:
        return of_more + (num_microbatches - more) * (of_more - of_few) // (more - few)

    sent = {group: scaled(small.sent[group], step.sent[group]) for group in step.sent}
    return RankStep(step.memory, sent, scaled(small.flops, step.flops))


def _batches(plan: TrainingPlan) -> Iterator[RetroBatch]:
    """Micro batches of a rank, new ones each time."""
    arguments, options = plan.arguments, plan.options
    batch, length = options.micro_batch_size, plan.sequence_length
    retrieved = arguments.retro_num_retrieved_chunks * arguments.retro_chunk_length
    shape = (batch, plan.project.chunks_per_sample, arguments.retro_num_neighbors, retrieved)
    for number in itertools.count():
        text = torch.zeros(batch, length + 1, dtype=torch.long)
        neighbors = None
        if plan.with_retrieval:
            neighbors = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        segments = None
        if options.reset_attention_mask:
            segments = torch.zeros(batch, length, dtype=torch.long)
        yield RetroBatch.from_text(text, neighbors, segments=segments, sample_ids=[number])


def _waiting(steps: tuple[RankStep, ...], num_microbatches: int, virtual: int) -> tuple[float, ...]:
    """Share of the step in which each stage waits.

    The slowest stage works without a pause, once the first micro batch has reached it and until the
    last one has left it. With v virtual stages that way is v times shorter.
    """
    times = [step.flops / num_microbatches for step in steps]
    slowest = max(times)
    whole = num_microbatches * slowest + (sum(times) - slowest) / virtual
    return tuple(1 - num_microbatches * each / whole for each in times)
