"""Flags of logs and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from retro_mcore.errors import ConfigurationError
from retro_mcore.model.option_traits import at_least


@dataclass(kw_only=True)
class LoggingOptions:
    """Logs and metrics. metrics.jsonl and the loss curve are in --save."""

    log_interval: int = field(default=100, metadata=at_least(1))
    """Iterations between log lines and metrics."""
    check_for_nan_in_loss_and_grad: bool = True
    """Stop if the loss or gradient is NaN or infinite, before the weights are updated."""
    check_for_spiky_loss: bool = True
    """Report losses far above the recent ones, with the batch's samples."""
    log_num_zeros_in_grad: bool = False
    """Log the number of zeros in the gradient."""
    log_straggler: bool = False
    """Log ranks whose own work (reading samples, forward pass) takes at least half as long again as
    that of most ranks of their pipeline stage."""
    device_peak_tflops: float | None = None
    """Peak TFLOP/s of the device, for model FLOPs utilization. Default: from a table of GPUs."""
    tensorboard_dir: str | None = None
    """Directory for TensorBoard."""
    tensorboard_log_interval: int = field(default=1, metadata=at_least(1))
    """Iterations between entries in TensorBoard and Weights & Biases."""
    wandb_project: str = ""
    """Project in Weights & Biases."""
    wandb_exp_name: str = ""
    """Name of the run in Weights & Biases."""
    wandb_save_dir: str = ""
    """Directory for the files of Weights & Biases. Default: `wandb` in --save."""

    def check_logging(self) -> None:
        """Reject an incomplete configuration of Weights & Biases.

        Raises:
            ConfigurationError: an option is invalid. Names the flag.
        """
        if self.wandb_project and not self.wandb_exp_name:
            raise ConfigurationError(
                "--wandb-exp-name", "not given with --wandb-project", "Name the run"
            )
        if not self.wandb_project and (self.wandb_exp_name or self.wandb_save_dir):
            raise ConfigurationError(
                "--wandb-project", "not given, but other options of wandb are", "Name the project"
            )
        if self.device_peak_tflops is not None and self.device_peak_tflops <= 0:
            raise ConfigurationError(
                "--device-peak-tflops", str(self.device_peak_tflops), "Choose above 0"
            )
