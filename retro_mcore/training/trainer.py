"""Pretraining: the loop around megatron's forward-backward function, optimizer and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from retro_mcore.distributed import raise_together
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.training.batch import RetroBatch
from retro_mcore.training.checkpoint_files import (
    Retention,
    existing_checkpoint,
    iteration_of,
    latest_iteration,
)
from retro_mcore.training.checkpoint_saver import CheckpointSaver
from retro_mcore.training.checkpoint_state import TrainingParts, TrainingProgress
from retro_mcore.training.checkpointing import LoadScope, load_checkpoint, read_arguments
from retro_mcore.training.data import MicroBatchSampler, NumberedSamples, Samples, read_batches
from retro_mcore.training.initialize import (
    initialize_parallel,
    set_batch_sizes,
    set_seeds,
    use_deterministic_algorithms,
)
from retro_mcore.training.loss import forward_backward, mean_loss, total_loss
from retro_mcore.training.metrics import LOSS_CURVE_FILE, METRICS_FILE, losses, read_metrics
from retro_mcore.training.optimizer import (
    build_optimizer,
    build_scheduler,
    learning_rate,
    share_embeddings,
    wrap_model,
)
from retro_mcore.training.options import TrainingOptions
from retro_mcore.training.plan import TrainingPlan
from retro_mcore.training.progress import TrainingReporter
from retro_mcore.training.provider import build_model_chunks
from retro_mcore.training.retrofit import load_decoder


@dataclass
class TrainingResult:
    """What came of a run.

    Attributes:
        iteration: The last iteration.
        consumed_samples: Training samples seen.
        train_losses: Mean loss of each iteration that this process ran (not of those before it
            resumed), in nats per token.
        valid_losses: (iteration, loss) of each validation.
        checkpoint: The last checkpoint, if any was saved.
        loss_curve: The PNG, if one was drawn (on rank 0).
        seconds: Wall time of this run.
        reused: Whether the run was already finished, and nothing was trained.
        num_parameters: Of the whole model, over all ranks.
    """

    iteration: int
    consumed_samples: int
    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[tuple[int, float]] = field(default_factory=list)
    checkpoint: Path | None = None
    loss_curve: Path | None = None
    seconds: float = 0.0
    reused: bool = False
    num_parameters: int = 0


class Trainer:
    """One run of training.

    Args:
        plan: What to do.
        train_samples: The training split; samples are used in order, once.
        valid_samples: The validation split, or None for no validation. The same first
            eval_iters batches are used each time, so that the points of the curve compare.
        device: Of this process.

    Raises:
        ConfigurationError: flags, project and number of processes do not fit together.
        CheckpointError: the checkpoint to resume from belongs to another configuration.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        train_samples: Samples,
        valid_samples: Samples | None,
        device: torch.device,
    ) -> None:
        options = plan.options
        initialize_parallel(
            options.tensor_model_parallel_size,
            options.pipeline_model_parallel_size,
            options.num_virtual_stages_per_pipeline_rank,
        )
        with raise_together():
            if options.deterministic_mode:
                use_deterministic_algorithms()
            checkpoint = checkpoint_to_resume(plan)
            if checkpoint is not None:
                plan = plan.with_vocabulary_of(read_arguments(checkpoint))
            self._num_microbatches = set_batch_sizes(
                plan.global_batch_size, options.micro_batch_size
            )
            set_seeds(plan.project.retro_gpt_seed)
            models = build_model_chunks(plan.arguments, options, options)
        self._decoder = load_decoder(models, plan) if checkpoint is None else None
        self.plan, self._device = plan, device
        self._train_samples, self._valid_samples = train_samples, valid_samples
        self._parts = _training_parts(models, plan)
        self._progress = TrainingProgress()
        if checkpoint is not None:
            self._progress = load_checkpoint(checkpoint, self._parts, _load_scope(plan))
        self._saver = CheckpointSaver(
            options.save or "",
            options.async_save,
            Retention(options.keep_last_n, options.save_retain_interval),
        )
        self._result = TrainingResult(0, 0, checkpoint=checkpoint)

    def train(self) -> TrainingResult:
        """Train until the last iteration, or the exit interval.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite.
        """
        plan, progress, result = self.plan, self._progress, self._result
        started = time.perf_counter()
        with self._reporter() as reporter, self._saver:
            if result.checkpoint is not None:
                reporter.message(f"loaded {result.checkpoint}, at iteration {progress.iteration}")
            if self._decoder is not None:
                reporter.message(str(self._decoder))
            batches = self._train_batches()
            for chunk in self._parts.chunks:
                chunk.train()
            while progress.iteration < plan.train_iters:
                self._train_step(batches, reporter)
                self._report_saved(self._saver.finish(wait=False), reporter)
                stop = self._stops_here()
                reporter.pause()
                if self._validates_here() or stop:
                    self._validate(reporter)
                if self._saves_here() or stop:
                    self._save(reporter)
                reporter.resume()
                if stop:
                    break
            self._report_saved(self._saver.finish(), reporter)
            with raise_together():
                result.loss_curve = reporter.draw()
        result.iteration, result.consumed_samples = progress.iteration, progress.consumed_samples
        result.seconds = time.perf_counter() - started
        result.num_parameters = num_parameters(self._parts.chunks)
        return result

    def _train_step(self, batches: Iterator[RetroBatch], reporter: TrainingReporter) -> None:
        parts, progress, plan = self._parts, self._progress, self.plan
        for chunk in parts.chunks:
            chunk.zero_grad_buffer()
        parts.optimizer.zero_grad()
        reports = forward_backward(
            parts.chunks,
            batches,
            self._num_microbatches,
            plan.sequence_length,
            plan.options.micro_batch_size,
            not plan.arguments.no_retrieval,
        )
        loss = mean_loss(reports, progress.iteration + 1)
        lr = learning_rate(parts.optimizer)
        updated, grad_norm, _ = parts.optimizer.step()
        if updated:  # not after an overflow in fp16
            parts.scheduler.step(plan.global_batch_size)
        progress.iteration += 1
        progress.consumed_samples += plan.global_batch_size
        self._result.train_losses.append(loss)
        reporter.step(
            progress.iteration, progress.consumed_samples, loss, lr, float(grad_norm or 0.0)
        )

    def _validate(self, reporter: TrainingReporter) -> None:
        if self._valid_samples is None:
            return
        project, iteration = self.plan.project, self._progress.iteration
        sampler = self._sampler(0, project.retro_gpt_eval_iters * self.plan.global_batch_size)
        batches = read_batches(self._numbered(self._valid_samples), sampler, 0, self._device)
        loss_sum, num_tokens = total_loss(self._parts.chunks, batches, self._num_microbatches)
        loss = loss_sum / num_tokens
        self._result.valid_losses.append((iteration, loss))
        reporter.validation(iteration, loss, math.exp(min(loss, 80.0)))

    def _save(self, reporter: TrainingReporter) -> None:
        if self.plan.options.save is None:
            return
        args = self.plan.checkpoint_args()
        self._report_saved(self._saver.finish(), reporter)
        self._report_saved(self._saver.save(self._parts, self._progress, args), reporter)

    def _report_saved(self, checkpoint: Path | None, reporter: TrainingReporter) -> None:
        if checkpoint is not None:
            self._result.checkpoint = checkpoint
            reporter.message(f"saved {checkpoint}")

    def _stops_here(self) -> bool:
        """After this iteration the run ends, for good or to be resumed."""
        interval, iteration = self.plan.options.exit_interval, self._progress.iteration
        return iteration == self.plan.train_iters or bool(interval and iteration % interval == 0)

    def _validates_here(self) -> bool:
        interval = self.plan.project.retro_gpt_eval_interval
        return self._progress.iteration % interval == 0

    def _saves_here(self) -> bool:
        interval = self.plan.options.save_interval
        return bool(interval and self._progress.iteration % interval == 0)

    def _train_batches(self) -> Iterator[RetroBatch]:
        samples = self.plan.train_iters * self.plan.global_batch_size
        sampler = self._sampler(self._progress.consumed_samples, samples)
        workers = self.plan.options.num_workers
        return read_batches(self._numbered(self._train_samples), sampler, workers, self._device)

    def _sampler(self, start: int, stop: int) -> MicroBatchSampler:
        return MicroBatchSampler(
            start,
            stop,
            self.plan.options.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )

    def _numbered(self, samples: Samples) -> NumberedSamples:
        return NumberedSamples(samples, retrieval=not self.plan.arguments.no_retrieval)

    def _reporter(self) -> TrainingReporter:
        return TrainingReporter(
            self.plan.train_iters,
            self._progress.iteration,
            self.plan.global_batch_size * self.plan.sequence_length,
            self.plan.options.log_interval,
            self.plan.options.save,
        )


def checkpoint_to_resume(plan: TrainingPlan) -> Path | None:
    """The checkpoint to start from: that of --ckpt-step, else the latest; None if there is none.

    Raises:
        CheckpointError: it is of another configuration, or a flag needs one and there is none.
        ConfigurationError: --save holds a checkpoint that the run would overwrite.
    """
    options = plan.options
    checkpoint = None
    if options.load is not None:
        checkpoint = existing_checkpoint(options.load, options.ckpt_step)
    if checkpoint is not None:
        plan.check_resumes(read_arguments(checkpoint), checkpoint)
    elif options.needs_checkpoint is not None:
        raise CheckpointError(
            f"--load {options.load}",
            f"holds no checkpoint, and {options.needs_checkpoint} was given",
            "Name the --save of a run that has saved one",
        )
    if checkpoint is None or options.finetune:
        _check_overwrites_nothing(options)
    return checkpoint


def _check_overwrites_nothing(options: TrainingOptions) -> None:
    saved = None if options.save is None else latest_iteration(options.save)
    if saved is not None:
        raise ConfigurationError(
            f"--save {options.save}",
            f"holds a checkpoint of iteration {saved}, which training from the start would "
            "overwrite",
            f"Resume it with --load {options.save}, or save to another directory",
        )


def _load_scope(plan: TrainingPlan) -> LoadScope:
    options = plan.options
    return LoadScope(
        optimizer=not (options.finetune or options.no_load_optim),
        random_state=not (options.finetune or options.no_load_rng),
        progress=not options.finetune,
    )


def finished_run(plan: TrainingPlan) -> TrainingResult | None:
    """The result of a run that has already reached its last iteration; None if there is work left.

    Raises:
        CheckpointError: the checkpoint in --load is of another configuration.
        ConfigurationError: --save holds a checkpoint that the run would overwrite.
    """
    checkpoint = checkpoint_to_resume(plan)
    if checkpoint is None or plan.options.finetune or iteration_of(checkpoint) < plan.train_iters:
        return None
    iteration = iteration_of(checkpoint)
    curve = checkpoint.parent / LOSS_CURVE_FILE
    return TrainingResult(
        iteration=iteration,
        consumed_samples=iteration * plan.global_batch_size,
        valid_losses=losses(read_metrics(checkpoint.parent / METRICS_FILE), "valid"),
        checkpoint=checkpoint,
        loss_curve=curve if curve.is_file() else None,
        reused=True,
    )


def num_parameters(chunks: Sequence[torch.nn.Module]) -> int:
    """Parameters of the whole model, over tensor and pipeline parallel ranks."""
    sharded = replicated = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            if getattr(parameter, "shared", False):  # a copy of another stage's
                continue
            if getattr(parameter, "tensor_model_parallel", False):
                sharded += parameter.numel()
            else:
                replicated += parameter.numel()
    own = sharded * parallel_state.get_tensor_model_parallel_world_size() + replicated
    total = torch.tensor(own, device=torch.cuda.current_device())
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return int(total)


def _training_parts(models: Sequence[GPTModel], plan: TrainingPlan) -> TrainingParts:
    groups = share_embeddings(models)
    # As Megatron: gradients of the first chunk alone are worth sending early.
    chunks = [wrap_model(model, plan, index > 0) for index, model in enumerate(models)]
    optimizer = build_optimizer(chunks, groups, plan)
    return TrainingParts(chunks, optimizer, build_scheduler(optimizer, plan))
