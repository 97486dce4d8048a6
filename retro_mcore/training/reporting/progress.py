"""Progress of a training run: progress bar, log lines and metrics, on rank 0 only."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from retro_mcore.distributed import get_rank, get_world_size
from retro_mcore.errors import MissingDependencyError
from retro_mcore.logs import PRINTED
from retro_mcore.progress import Progress
from retro_mcore.training.loop.stragglers import SlowRank
from retro_mcore.training.reporting.flops import peak_flops, training_flops_per_sample
from retro_mcore.training.reporting.metrics import (
    LOSS_CURVE_FILE,
    METRICS_FILE,
    MetricsFile,
    Record,
    draw_loss_curve,
    read_metrics,
)
from retro_mcore.training.reporting.sinks import Sink, open_sinks
from retro_mcore.training.setup.plan import TrainingPlan

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """Result of an iteration.

    Attributes:
        iteration: Number of the iteration, from 1.
        consumed_samples: Total number of samples after this iteration.
        samples: Number of samples in this iteration.
        counted_tokens: Number of tokens that its loss counts, which padding is not part of.
        loss: Mean loss per token, in nats.
        learning_rate: Learning rate of this iteration.
        grad_norm: Gradient norm before clipping; 0 if the iteration was skipped.
        skipped: Whether the update was skipped because of an fp16 overflow.
        loss_scale: Loss scale, in fp16.
        num_zeros: Number of zeros in the gradient, with --log-num-zeros-in-grad.
        balance: Losses that balance experts, by name, without their coefficients.
    """

    iteration: int
    consumed_samples: int
    samples: int
    counted_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    skipped: bool = False
    loss_scale: float | None = None
    num_zeros: int | None = None
    balance: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> Record:
        """The iteration's metrics, without those that do not apply."""
        record: Record = {
            "kind": "train",
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "batch_size": self.samples,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            **self.balance,
        }
        optional = {"loss_scale": self.loss_scale, "num_zeros": self.num_zeros}
        return record | {name: value for name, value in optional.items() if value is not None}


class _Interval:
    """The iterations since the last log line."""

    def __init__(self) -> None:
        self.since = time.perf_counter()
        self.iterations = self.samples = self.counted_tokens = self.skipped = 0
        self._loss = 0.0

    def add(self, step: StepReport) -> None:
        """Add an iteration. The mean loss excludes skipped iterations."""
        self.iterations += 1
        self.samples += step.samples
        self.counted_tokens += step.counted_tokens
        if step.skipped:
            self.skipped += 1
        else:
            self._loss += step.loss

    @property
    def loss(self) -> float | None:
        """Mean loss, if any iteration was not skipped."""
        counted = self.iterations - self.skipped
        return self._loss / counted if counted else None

    @property
    def seconds(self) -> float:
        """Wall time of the interval so far."""
        return max(time.perf_counter() - self.since, 1e-9)


class TrainingReporter:
    """Progress bar, log lines and metrics of a run. Use as a context manager around its loop.

    Args:
        plan: The run.
        config: The model's configuration, to count its FLOPs.
        iteration: Number of iterations already completed.
        device: The device, for model FLOPs utilization.
    """

    def __init__(
        self, plan: TrainingPlan, config: TransformerConfig, iteration: int, device: torch.device
    ) -> None:
        self._plan, options = plan, plan.options
        self._active = get_rank() == 0
        directory = options.save
        self._directory = Path(directory) if directory is not None and self._active else None
        self._metrics: MetricsFile | None = None
        self._lost = 0
        if self._directory is not None:
            self._metrics = MetricsFile(self._directory / METRICS_FILE, iteration)
        self._sinks: list[Sink] = open_sinks(plan, iteration) if self._active else []
        self._flops_per_sample = training_flops_per_sample(
            config, plan.sequence_length, plan.arguments.padded_vocab_size
        )
        peak = peak_flops(device, options.device_peak_tflops)
        self._peak_flops = None if peak is None else peak * get_world_size()
        hidden = not self._active
        self._progress = Progress("training", plan.train_iters, iteration, hidden)
        self._interval = _Interval()

    def __enter__(self) -> TrainingReporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.close()
        for sink in self._sinks:
            try:
                sink.close(failed=error is not None)
            except OSError as failure:
                self._warn(f"{type(sink).__name__} was not closed ({failure})")
        if self._lost:
            self._warn(f"{METRICS_FILE} lacks {self._lost} records that could not be written")

    def step(self, step: StepReport) -> None:
        """Report an iteration."""
        self._interval.add(step)
        self._progress.details(
            loss=f"{step.loss:.4f}",
            lr=f"{step.learning_rate:.2e}",
            grad_norm=f"{step.grad_norm:.2f}",
        )
        self._progress.update()
        if step.skipped:
            self._print(
                f"iteration {step.iteration}/{self._plan.train_iters} | skipped: the gradients "
                f"overflowed fp16 at loss scale {step.loss_scale or 1:g}"
            )
        is_last = step.iteration == self._plan.train_iters
        if step.iteration % self._plan.options.tensorboard_log_interval == 0 or is_last:
            self._to_sinks(step.record())
        if step.iteration % self._plan.options.log_interval == 0 or is_last:
            self._log(step)

    def pause(self) -> None:
        """Exclude the time until `resume` (validation, saving) from training time."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """End a `pause`."""
        self._interval.since += time.perf_counter() - self._paused

    def validation(self, iteration: int, loss: float, perplexity: float) -> None:
        """Report a validation."""
        self._print(
            f"iteration {iteration}/{self._plan.train_iters} | validation loss {loss:.4f} | "
            f"perplexity {perplexity:.2f}"
        )
        record = {"kind": "valid", "iteration": iteration, "loss": loss, "perplexity": perplexity}
        self._write(record)
        self._to_sinks(record)

    def spike(self, step: StepReport, usual: float, samples: list[int]) -> None:
        """Report a loss spike and the samples of its batch."""
        self._print(
            f"iteration {step.iteration}/{self._plan.train_iters} | loss spike: {step.loss:.4f}, "
            f"usually {usual:.4f} | grad norm {step.grad_norm:.3f} | samples {samples}"
        )
        self._write(
            {
                "kind": "spike",
                "iteration": step.iteration,
                "loss": step.loss,
                "usual": usual,
                "samples": samples,
            }
        )

    def stragglers(self, iteration: int, ranks: Sequence[SlowRank]) -> None:
        """Report ranks that work for longer than others."""
        for slow in ranks:
            self._print(f"iteration {iteration}/{self._plan.train_iters} | {slow}")
            self._write(slow.record(iteration))

    def samples(self, iteration: int) -> None:
        """Record notes on each split's samples, such as how often they repeat."""
        for split in self._plan.passes:
            if split.warning:
                where = {"kind": "data", "iteration": iteration, "split": split.name}
                self._write({**where, **split.report})

    def message(self, text: str) -> None:
        """Show a line."""
        self._print(text)

    def draw(self) -> Path | None:
        """Plot the loss curve of the whole run, including interrupted parts."""
        if self._directory is None:
            return None
        records = read_metrics(self._directory / METRICS_FILE)
        try:
            return draw_loss_curve(records, self._directory / LOSS_CURVE_FILE)
        except (OSError, MissingDependencyError) as error:  # neither ends a trained run
            self._warn(f"the loss curve could not be written ({error})")
            return None

    def _log(self, step: StepReport) -> None:
        interval, self._interval = self._interval, _Interval()
        record = step.record() | self._speed(interval)
        loss = interval.loss
        if loss is None:
            del record["loss"]
        else:
            record["loss"] = loss
        if step.loss_scale is not None:
            record["skipped_iterations"] = interval.skipped
        self._print(self._line(step, record))
        self._write(record)
        self._to_sinks({key: value for key, value in record.items() if key in _SPEED}, step)

    def _speed(self, interval: _Interval) -> Record:
        seconds = interval.seconds
        samples_per_second = interval.samples / seconds
        flops = samples_per_second * self._flops_per_sample
        tokens = interval.samples * self._plan.sequence_length
        speed: Record = {
            "seconds_per_iteration": seconds / interval.iterations,
            "tokens_per_second": samples_per_second * self._plan.sequence_length,
            "tflops_per_device": flops / get_world_size() / 1e12,
        }
        if interval.counted_tokens < tokens:  # the loss leaves out padding, or prompts
            speed["counted_tokens_per_second"] = interval.counted_tokens / seconds
        if self._peak_flops is not None:
            speed["model_flops_utilisation"] = flops / self._peak_flops
        return speed

    def _line(self, step: StepReport, record: Record) -> str:
        left = self._plan.train_samples - step.consumed_samples
        seconds_left = left * self._plan.sequence_length / record["tokens_per_second"]
        parts = [
            f"iteration {step.iteration}/{self._plan.train_iters}",
            f"consumed samples {step.consumed_samples}",
            f"ms per iteration {1000 * record['seconds_per_iteration']:.1f}",
            f"batch {step.samples}" if self._plan.options.rampup_batch_size else "",
            f"learning rate {step.learning_rate:.6E}",
            f"lm loss {record['loss']:.6E}" if "loss" in record else "lm loss skipped",
            *(f"{name.replace('_', ' ')} {loss:.6E}" for name, loss in step.balance.items()),
            f"grad norm {step.grad_norm:.3f}",
            f"loss scale {step.loss_scale:g}" if step.loss_scale is not None else "",
            f"skipped {record['skipped_iterations']}" if "skipped_iterations" in record else "",
            f"zeros {step.num_zeros}" if step.num_zeros is not None else "",
            f"tokens/s {record['tokens_per_second']:.0f}",
            _counted(record.get("counted_tokens_per_second")),
            f"TFLOP/s per device {record['tflops_per_device']:.3g}",
            _utilisation(record.get("model_flops_utilisation")),
            f"left {timedelta(seconds=round(seconds_left))}",
        ]
        return " | ".join(filter(None, parts))

    def _print(self, text: str, level: int = logging.INFO) -> None:
        """Print a line and write it to the log file."""
        if self._active:
            self._progress.write(text)
            _LOG.log(level, "%s", text, extra=PRINTED)

    def _warn(self, text: str) -> None:
        self._print(text, logging.WARNING)

    def _write(self, record: Record) -> None:
        """Write to metrics.jsonl. A full disk only loses metrics; failed checkpoints end a run."""
        if self._metrics is None:
            return
        try:
            self._metrics.write(record)
        except OSError as error:
            if not self._lost:
                self._warn(f"{self._metrics.path} cannot be written ({error.strerror}): going on")
            self._lost += 1

    def _to_sinks(self, record: Record, step: StepReport | None = None) -> None:
        if step is not None:
            record = {"kind": "speed", "iteration": step.iteration, **record}
        for sink in list(self._sinks):
            try:
                sink.write(record)
            except OSError as error:
                self._warn(f"{type(sink).__name__} cannot be written ({error}): going on without")
                self._sinks.remove(sink)


_SPEED = (
    "seconds_per_iteration",
    "tokens_per_second",
    "counted_tokens_per_second",
    "tflops_per_device",
    "model_flops_utilisation",
)


def _counted(rate: float | None) -> str:
    return "" if rate is None else f"counted tokens/s {rate:.0f}"


def _utilisation(share: float | None) -> str:
    return "" if share is None else f"MFU {100 * share:.1f}%"
