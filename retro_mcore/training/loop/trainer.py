"""The training loop around megatron's forward-backward function, optimizer and checkpoints."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from retro_mcore.checkpoint.conversion.model_fields import END_TOKENS
from retro_mcore.checkpoint.files import Retention
from retro_mcore.checkpoint.loading import load_checkpoint
from retro_mcore.checkpoint.saving import CheckpointSaver
from retro_mcore.checkpoint.state import TrainingParts, TrainingProgress
from retro_mcore.distributed import gather, get_rank, on_first_rank, raise_together
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.pipeline import EmbeddingGroups
from retro_mcore.platform.determinism import use_deterministic_algorithms
from retro_mcore.platform.optimizer_state import InfiniteNormError
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.samples.retro_dataset import note_of_mixed_chunks, note_of_short_neighbors
from retro_mcore.training.loop.balance import reduce_balance
from retro_mcore.training.loop.local_run import LocalRun
from retro_mcore.training.loop.loss import (
    LossReport,
    StepLoss,
    check_finite,
    forward_backward,
    non_finite,
    reduce_losses,
    samples_of,
    samples_of_all_ranks,
)
from retro_mcore.training.loop.optimizer import (
    build_optimizer,
    build_scheduler,
    gathered_weights,
    learning_rate,
    loss_scale,
    release_functions,
    share_embeddings,
    take_step,
    wrap_model,
)
from retro_mcore.training.loop.resume import (
    TrainingResult,
    check_needs_none,
    check_order,
    checkpoint_to_resume,
    finished_run,
    load_scope,
    num_parameters,
    order_of,
    tell_finished,
)
from retro_mcore.training.loop.sample_reader import (
    MicroBatchSampler,
    NumberedSamples,
    Samples,
    check_document_tokens,
    read_batches,
)
from retro_mcore.training.loop.scoring import total_loss
from retro_mcore.training.loop.spikes import SpikeDetector
from retro_mcore.training.loop.stopping import StopConditions
from retro_mcore.training.loop.stragglers import Stopwatch, slow_ranks
from retro_mcore.training.reporting.progress import StepReport, TrainingReporter
from retro_mcore.training.reporting.sinks import check_sinks
from retro_mcore.training.setup.build import build_model_stages
from retro_mcore.training.setup.freezing import freeze_decoder, freeze_retrieval
from retro_mcore.training.setup.gpt_contents import contents_of_gpt
from retro_mcore.training.setup.initialize import (
    initialize_layout,
    set_batch_sizes,
    set_seeds,
)
from retro_mcore.training.setup.matching_start import check_can_match, start_by_matching
from retro_mcore.training.setup.plan import TrainingPlan
from retro_mcore.training.setup.retrofit import load_decoder
from retro_mcore.training.setup.saved_arguments import saved_arguments

__all__ = ["Trainer", "TrainingResult", "checkpoint_to_resume", "finished_run", "num_parameters"]


class Trainer:
    """A training run.

    Args:
        plan: The resolved options of the run.
        train_samples: The training split. Each sample is used once, in order.
        valid_samples: The validation split, or None for no validation. The same first
            eval_iters batches are used each time (docs/decisions/0011-training-entry-point.md).
        device: Device of this process.
        alone: Whether this run holds the lock on --save. Leftovers of earlier runs are then
            removed.

    Raises:
        ConfigurationError: flags, project and number of processes do not match.
        CheckpointError: the checkpoint to resume from belongs to another configuration.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        train_samples: Samples,
        valid_samples: Samples | None,
        device: torch.device,
        alone: bool = True,
    ) -> None:
        options = plan.options
        initialize_layout(options, options.distributed_timeout_minutes)
        with raise_together():
            plan.check_optimizer()
            if options.deterministic_mode:
                use_deterministic_algorithms()
            checkpoint = checkpoint_to_resume(plan)
        local = None if options.non_persistent_ckpt_type is None else LocalRun(plan, checkpoint)
        found = None if local is None else local.found
        start = checkpoint if found is None else found.folder
        with raise_together():
            saved = {} if checkpoint is None else saved_arguments(checkpoint)
            if found is not None:
                saved = found.arguments
                plan.check_resumes(saved, found.folder)
            if start is None:
                check_needs_none(options)
                check_can_match(plan)
            else:
                plan = plan.with_vocabulary_of(saved)
                if load_scope(plan).progress:
                    check_order(saved, train_samples, start)
            self._num_microbatches = set_batch_sizes(plan.batch_sizes, options.micro_batch_size)
            set_seeds(plan.project.retro_gpt_seed)
            models = build_model_stages(plan.arguments, options, options)
            check_sinks(options.tensorboard_dir, options.wandb_project)
            if get_rank() == 0:
                plan.save_options()
        self._decoder = load_decoder(models, plan) if start is None else None
        if start is None:
            start_by_matching(models, plan, train_samples, device)
        self.plan, self._device, self._alone = plan, device, alone
        self._train_samples, self._valid_samples = train_samples, valid_samples
        self._parts = training_parts(models, plan)
        self._progress = TrainingProgress()
        if local is not None and found is not None:
            found = None  # it holds the whole state
            self._progress = local.load(self._parts, load_scope(plan))
        elif checkpoint is not None:
            self._progress = load_checkpoint(checkpoint, self._parts, load_scope(plan))
        self._local, self._start = local, start
        self._saver = CheckpointSaver(
            options.save or "",
            options.async_save,
            Retention(options.keep_last_n, options.save_retain_interval),
            alone,
            None if local is None else local.name,
        )
        self._gpt_contents, self._end_tokens = saved.get("gpt_contents"), saved.get(END_TOKENS)
        if self._decoder is not None:
            self._end_tokens = self._decoder.checkpoint.flags.get(END_TOKENS)
            gpt = self._decoder.checkpoint.path
            self._gpt_contents = on_first_rank(lambda: contents_of_gpt(gpt))
        self._result = TrainingResult(0, 0, checkpoint=checkpoint)
        self._has_other_neighbors = _has_other_neighbors(saved, plan)
        self._other_bos = check_document_tokens(saved, plan.document_tokens, options.project_dir)
        self._spikes = SpikeDetector() if options.check_for_spiky_loss else None
        self._stopwatch = Stopwatch() if options.log_straggler else None

    @property
    def has_loaded(self) -> bool:
        """Whether the weights come from a checkpoint or a GPT model."""
        return self._start is not None or self._decoder is not None

    def train(self) -> TrainingResult:
        """Train until the last iteration, or until the run is stopped early.

        Raises:
            NonFiniteLossError: the loss or gradient became NaN or infinite.
        """
        progress, result = self._progress, self._result
        started = time.perf_counter()
        with StopConditions(self.plan.options) as stop, self._reporter() as reporter, self._saver:
            for local_note in () if self._local is None else self._local.notes:
                reporter.message(local_note)
            if self._start is not None:
                kind = "" if self._start == result.checkpoint else "local checkpoints in "
                reporter.message(f"loaded {kind}{self._start}, at iteration {progress.iteration}")
            if self._has_other_neighbors:
                reporter.message("the samples have other neighbors than before: from now on, these")
            if self._other_bos is not None:
                reporter.message(self._other_bos)
            for split, text in self.plan.repetitions.items():
                reporter.message(f"{split} samples: {text}")
            if not self._alone:
                reporter.message("--save cannot be locked here: see that no other run uses it")
            if self._decoder is not None:
                reporter.message(str(self._decoder))
            if self.plan.with_retrieval:
                for note_of in (note_of_short_neighbors, note_of_mixed_chunks):
                    if note := note_of(self._train_samples):
                        reporter.message(f"train samples: {note}")
            reporter.samples(self._progress.iteration)
            with raise_together():
                tell_finished(self.plan.options.save, None)
            self._loop(stop, reporter)
            self._report_saved(self._saver.finish(), reporter)
            if progress.iteration == self.plan.train_iters:
                with raise_together():
                    tell_finished(self.plan.options.save, progress.iteration)
            if self._local is not None:
                self._local.remove()
            if result.stopped_by is None:  # otherwise every second matters
                with raise_together():
                    result.loss_curve = reporter.draw()
        result.iteration, result.consumed_samples = progress.iteration, progress.consumed_samples
        result.seconds = time.perf_counter() - started
        result.num_parameters = num_parameters(self._parts.stages)
        release_functions(self._parts.stages)
        return result

    def evaluate(self, test_samples: Samples | None) -> TrainingResult:
        """Compute the validation and test loss of the loaded weights, without training or saving.

        Args:
            test_samples: The test split, or None.
        """
        progress, result = self._progress, self._result
        started = time.perf_counter()
        if self._valid_samples is not None:
            result.valid_losses.append((progress.iteration, self._loss_of(self._valid_samples)))
        if test_samples is not None:
            result.test_loss = self._loss_of(test_samples)
        result.iteration, result.consumed_samples = progress.iteration, progress.consumed_samples
        result.seconds = time.perf_counter() - started
        result.num_parameters = num_parameters(self._parts.stages)
        return result

    def _loop(self, stop: StopConditions, reporter: TrainingReporter) -> None:
        batches = self._train_batches()
        for stage in self._parts.stages:
            stage.train()
        while self._progress.iteration < self.plan.train_iters:
            told_to_stop = self._train_step(batches, reporter, stop.wanted)
            self._report_saved(self._saver.finish(wait=False), reporter)
            iteration = self._progress.iteration
            ends = told_to_stop or stop.at_interval(iteration)
            is_last = iteration == self.plan.train_iters
            reporter.pause()
            if self._at(self.plan.project.retro_gpt_eval_interval) or is_last:
                self._validate(reporter)
            if self._at(self.plan.options.save_interval) or is_last or ends:
                self._save(reporter)
            elif self._at(self.plan.options.non_persistent_save_interval):
                self._save_locally(reporter)
            reporter.resume()
            if told_to_stop and not is_last:
                self._result.stopped_by = stop.reason()
                reporter.message(f"stopped by {stop.reason()}, to be resumed")
            if ends:
                return

    def _at(self, interval: int | None) -> bool:
        return bool(interval and self._progress.iteration % interval == 0)

    def _train_step(
        self, batches: Iterator[RetroBatch], reporter: TrainingReporter, stop: bool
    ) -> bool:
        """Run one iteration, and return whether any rank wants to stop after it."""
        parts, progress, plan = self._parts, self._progress, self.plan
        samples = plan.batch_sizes.after(progress.consumed_samples)
        num_microbatches = self._num_microbatches * samples // plan.global_batch_size
        reports = compute_gradients(parts, batches, num_microbatches, plan, self._stopwatch)
        reduced = reduce_losses(reports, stop)
        balance = reduce_balance(parts.stages, num_microbatches)
        step = replace(self._update(reports, reduced, samples), balance=balance)
        self._result.train_losses.append(step.loss)
        self._report_spike(step, reports, reporter)
        reporter.step(step)
        self._report_stragglers(reporter)
        return reduced.stop > 0

    def _update(self, reports: Sequence[LossReport], reduced: StepLoss, samples: int) -> StepReport:
        """Run the optimizer step, unless the loss or gradients are not finite."""
        parts, progress, options = self._parts, self._progress, self.plan.options
        iteration, loss = progress.iteration + 1, reduced.loss
        if options.check_for_nan_in_loss_and_grad and not self._may_overflow():
            check_finite(reports, loss, iteration)
        lr, scale = learning_rate(parts.optimizer), loss_scale(parts.optimizer)
        try:
            updated, grad_norm, zeros = take_step(parts.optimizer)
        except InfiniteNormError as error:
            where = samples_of(reports), iteration
            raise non_finite("gradient norm", error.norm, *where) from error
        if updated:  # not after an overflow in fp16
            parts.scheduler.step(samples)
        progress.iteration = iteration
        progress.consumed_samples += samples
        return StepReport(
            iteration=iteration,
            consumed_samples=progress.consumed_samples,
            samples=samples,
            counted_tokens=reduced.num_tokens,
            loss=loss,
            learning_rate=lr,
            grad_norm=grad_norm,
            skipped=not updated,
            loss_scale=scale if options.fp16 else None,
            num_zeros=zeros,
        )

    def _may_overflow(self) -> bool:
        """Whether an infinite loss may be an fp16 overflow, which a lower loss scale fixes."""
        options = self.plan.options
        lowest = options.loss_scale or options.min_loss_scale
        return options.fp16 and loss_scale(self._parts.optimizer) > lowest

    def _report_spike(
        self, step: StepReport, reports: Sequence[LossReport], reporter: TrainingReporter
    ) -> None:
        if self._spikes is None or step.skipped or not self._spikes.add(step.loss):
            return
        reporter.spike(step, self._spikes.usual, samples_of_all_ranks(samples_of(reports)))

    def _report_stragglers(self, reporter: TrainingReporter) -> None:
        if self._stopwatch is None:
            return
        self._stopwatch.next_iteration()
        if self._at(self.plan.options.log_interval):
            slow = slow_ranks(gather(self._stopwatch.lap()))
            reporter.stragglers(self._progress.iteration, slow)

    def _validate(self, reporter: TrainingReporter) -> None:
        if self._valid_samples is None:
            return
        iteration, loss = self._progress.iteration, self._loss_of(self._valid_samples)
        self._result.valid_losses.append((iteration, loss))
        reporter.validation(iteration, loss, math.exp(min(loss, 80.0)))

    def _loss_of(self, samples: Samples) -> float:
        """Mean loss over a split's first eval_iters batches."""
        stop = self.plan.project.retro_gpt_eval_iters * self.plan.global_batch_size
        batches = read_batches(self._numbered(samples), self._sampler(0, stop), 0, self._device)
        with gathered_weights(self._parts.stages):
            loss_sum, num_tokens = total_loss(
                self._parts.stages,
                batches,
                self._num_microbatches,
                self.plan.arguments.vocab_size,
            )
        return loss_sum / num_tokens if num_tokens else math.nan

    def _save(self, reporter: TrainingReporter) -> None:
        if self.plan.options.save is None:
            return
        self._report_saved(self._saver.finish(), reporter)
        args = self._args_to_save()
        with gathered_weights(self._parts.stages):
            self._report_saved(self._saver.save(self._parts, self._progress, args), reporter)

    def _save_locally(self, reporter: TrainingReporter) -> None:
        assert self._local is not None
        with gathered_weights(self._parts.stages):
            folder = self._local.save(self._parts, self._progress, self._args_to_save())
        reporter.message(f"saved local checkpoints in {folder}")

    def _args_to_save(self) -> Namespace:
        args = self.plan.checkpoint_args()
        vars(args).update(order_of(self._train_samples, self._progress.consumed_samples))
        if self._gpt_contents is not None:
            args.gpt_contents = self._gpt_contents
        if self._end_tokens:
            setattr(args, END_TOKENS, list(self._end_tokens))
        return args

    def _report_saved(self, checkpoint: Path | None, reporter: TrainingReporter) -> None:
        if checkpoint is not None:
            self._result.checkpoint = checkpoint
            reporter.message(f"saved {checkpoint}")

    def _train_batches(self) -> Iterator[RetroBatch]:
        sampler = self._sampler(self._progress.consumed_samples, self.plan.train_samples)
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
        return NumberedSamples(samples, retrieval=self.plan.with_retrieval)

    def _reporter(self) -> TrainingReporter:
        config = self._parts.stages[0].config
        with raise_together():
            return TrainingReporter(self.plan, config, self._progress.iteration, self._device)
        raise AssertionError("unreachable: raise_together does not swallow errors")


def _has_other_neighbors(saved: Mapping[str, Any], plan: TrainingPlan) -> bool:
    """Whether the resumed run used neighbors of another search, for example before update_db."""
    before = (saved.get("data_contents") or {}).get("neighbors")
    now = plan.contents and plan.contents.neighbors
    resumes = plan.with_retrieval and not plan.options.finetune
    return resumes and None not in (before, now) and before != now


def compute_gradients(
    parts: TrainingParts,
    batches: Iterator[RetroBatch],
    num_microbatches: int,
    plan: TrainingPlan,
    stopwatch: Stopwatch | None = None,
) -> list[LossReport]:
    """Run an iteration up to the optimizer's step.

    Args:
        parts: What is trained.
        batches: This rank's micro batches; `num_microbatches` are consumed.
        num_microbatches: Number of micro batches.
        plan: The plan of the run.
        stopwatch: Times reading and forward passes.

    Returns:
        As `forward_backward`.
    """
    for stage in parts.stages:
        stage.zero_grad_buffer()
    parts.optimizer.zero_grad()
    return forward_backward(
        parts.stages,
        batches,
        num_microbatches,
        plan.sequence_length,
        plan.options.micro_batch_size,
        plan.with_retrieval,
        stopwatch,
    )


def training_parts(models: Sequence[DecoderModel], plan: TrainingPlan) -> TrainingParts:
    """Wrap the stages, and build their optimizer and its schedule. All ranks call it."""
    groups = share_embeddings(models)
    if plan.options.freeze_decoder:
        freeze_decoder(models, plan)
        groups = EmbeddingGroups()  # frozen copies have no gradients to sum
    if plan.freeze_retrieval:
        freeze_retrieval(models)
    # As in Megatron, only gradients of the first virtual stage are worth reducing early.
    stages = [wrap_model(model, plan, index > 0) for index, model in enumerate(models)]
    optimizer = build_optimizer(stages, groups, plan)
    return TrainingParts(stages, optimizer, build_scheduler(optimizer, plan))
