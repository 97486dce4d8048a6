"""Logging to TensorBoard and Weights & Biases, with their own libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from retro_mcore.errors import ConfigurationError, MissingDependencyError
from retro_mcore.training.reporting.metrics import Record
from retro_mcore.training.setup.plan import TrainingPlan


class Sink(Protocol):
    """A destination for metrics."""

    def write(self, record: Record) -> None:
        """Take a record with `kind` and `iteration`."""
        ...

    def close(self, failed: bool) -> None:
        """End the run there."""
        ...


def open_sinks(plan: TrainingPlan, iteration: int) -> list[Sink]:
    """Open the sinks that the flags request.

    Args:
        plan: The run.
        iteration: Number of iterations already completed. Later records of an interrupted run are
            dropped.

    Raises:
        MissingDependencyError: a library is not installed.
        ConfigurationError: a directory cannot be written.
    """
    sinks: list[Sink] = []
    if plan.options.tensorboard_dir:
        sinks.append(TensorBoard(plan.options.tensorboard_dir, iteration))
    if plan.options.wandb_project:
        sinks.append(WeightsAndBiases(plan))
    return sinks


def check_sinks(tensorboard_dir: str | None, wandb_project: str) -> None:
    """Check that the libraries of the requested sinks are installed, before anything is built.

    Raises:
        MissingDependencyError: a library is missing. Names the flag.
    """
    if tensorboard_dir:
        _summary_writer()
    if wandb_project:
        _wandb()


def _named(record: Record) -> dict[str, float]:
    names = {key: value for key, value in record.items() if key not in ("kind", "iteration")}
    return {f"{record['kind']}/{key}": value for key, value in names.items()}


class TensorBoard:
    """Scalars by iteration, named `train/loss`, `valid/loss`, …"""

    def __init__(self, directory: str, iteration: int) -> None:
        purge = iteration + 1 if iteration else None
        try:
            self._writer = _summary_writer()(directory, purge_step=purge)
        except OSError as error:
            raise ConfigurationError(
                f"--tensorboard-dir {directory}",
                f"cannot be written ({error.strerror or error})",
                "Name a directory that can be, or free space",
            ) from error

    def write(self, record: Record) -> None:
        """Take a record."""
        for name, value in _named(record).items():
            self._writer.add_scalar(name, value, record["iteration"])

    def close(self, failed: bool) -> None:
        """Flush and close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run with the plan's configuration. WANDB_MODE=offline writes files for a later sync."""

    def __init__(self, plan: TrainingPlan) -> None:
        options = plan.options
        directory = options.wandb_save_dir or str(Path(options.save or ".") / "wandb")
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._run = _wandb().init(
            project=options.wandb_project,
            name=options.wandb_exp_name,
            dir=directory,
            config=plan.resolved_options(),
        )

    def write(self, record: Record) -> None:
        """Take a record."""
        self._run.log({**_named(record), "iteration": record["iteration"]})

    def close(self, failed: bool) -> None:
        """End the run there."""
        self._run.finish(exit_code=int(failed))


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            "--tensorboard-dir", "tensorboard is not installed", "pip install tensorboard"
        ) from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingDependencyError(
            "--wandb-project", "wandb is not installed", "pip install wandb"
        ) from error
    return wandb
