"""What a run shows while it trains: a bar, log lines, metrics. Only rank 0 shows and writes."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from retro_mcore.distributed import get_rank
from retro_mcore.training.metrics import (
    LOSS_CURVE_FILE,
    METRICS_FILE,
    MetricsFile,
    Record,
    draw_loss_curve,
    read_metrics,
)


class TrainingReporter:
    """Bar, log lines and metrics of a run; used as a context manager around its loop.

    Args:
        train_iters: Iterations of the whole run.
        iteration: Iterations done before.
        tokens_per_iteration: For tokens/s.
        log_interval: Iterations between log lines and metrics.
        directory: For `metrics.jsonl` and `loss_curve.png`; None writes neither.
    """

    def __init__(
        self,
        train_iters: int,
        iteration: int,
        tokens_per_iteration: int,
        log_interval: int,
        directory: str | None,
    ) -> None:
        self._active = get_rank() == 0
        self._train_iters, self._log_interval = train_iters, log_interval
        self._tokens_per_iteration = tokens_per_iteration
        self._directory = Path(directory) if directory is not None and self._active else None
        self._metrics: MetricsFile | None = None
        if self._directory is not None:
            self._metrics = MetricsFile(self._directory / METRICS_FILE, iteration)
        self._bar = tqdm(
            total=train_iters,
            initial=iteration,
            desc="pretrain_retro",
            unit="it",
            disable=not self._active,
        )
        self._losses: list[float] = []
        self._since = time.perf_counter()

    def __enter__(self) -> TrainingReporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def step(
        self, iteration: int, consumed_samples: int, loss: float, lr: float, grad_norm: float
    ) -> None:
        """Report an iteration."""
        self._losses.append(loss)
        self._bar.update(1)
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", grad_norm=f"{grad_norm:.2f}")
        if iteration % self._log_interval == 0 or iteration == self._train_iters:
            self._log(iteration, consumed_samples, lr, grad_norm)

    def pause(self) -> None:
        """Time until `resume` (validation, saving) does not count as training time."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """End a `pause`."""
        self._since += time.perf_counter() - self._paused

    def validation(self, iteration: int, loss: float, perplexity: float) -> None:
        """Report a validation."""
        self._say(
            f"iteration {iteration}/{self._train_iters} | validation loss {loss:.4f} | "
            f"perplexity {perplexity:.2f}"
        )
        self._write({"kind": "valid", "iteration": iteration, "loss": loss})

    def message(self, text: str) -> None:
        """Show a line."""
        self._say(text)

    def draw(self) -> Path | None:
        """Draw the loss curve of the whole run, interrupted parts included."""
        if self._directory is None:
            return None
        records = read_metrics(self._directory / METRICS_FILE)
        return draw_loss_curve(records, self._directory / LOSS_CURVE_FILE)

    def _log(self, iteration: int, consumed_samples: int, lr: float, grad_norm: float) -> None:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        count = len(self._losses)
        loss = sum(self._losses) / count
        tokens_per_second = self._tokens_per_iteration * count / seconds
        self._say(
            f"iteration {iteration}/{self._train_iters} | consumed samples {consumed_samples} | "
            f"ms per iteration {1000 * seconds / count:.1f} | learning rate {lr:.6E} | "
            f"lm loss {loss:.6E} | grad norm {grad_norm:.3f} | tokens/s {tokens_per_second:.0f}"
        )
        self._write(
            {
                "kind": "train",
                "iteration": iteration,
                "consumed_samples": consumed_samples,
                "loss": loss,
                "learning_rate": lr,
                "grad_norm": grad_norm,
                "seconds_per_iteration": seconds / count,
                "tokens_per_second": tokens_per_second,
            }
        )
        self._losses.clear()
        self._since = time.perf_counter()

    def _say(self, text: str) -> None:
        if self._active:
            self._bar.write(text)

    def _write(self, record: Record) -> None:
        if self._metrics is not None:
            self._metrics.write(record)
