"""How long ranks wait for one another: --distributed-timeout-minutes.

This module does not import torch, so that `--help` is fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from retro_mcore.errors import ConfigurationError

#: In stages of the data pipeline, one rank may train an index or merge files for hours.
DATA_MINUTES = 24 * 60.0
#: There, a rank that does nothing for so long ends the job.
STALL_MINUTES = 60.0
#: In evaluation and generation.
INFERENCE_MINUTES = 60.0
#: In training, as in Megatron.
TRAINING_MINUTES = 10.0


def check_minutes(minutes: float) -> None:
    """Reject a limit that is not positive.

    Raises:
        ConfigurationError: it is not.
    """
    if not (minutes > 0 and math.isfinite(minutes)):
        raise ConfigurationError(
            "--distributed-timeout-minutes", f"{minutes:g}", "Give a positive number"
        )


def check_stall(minutes: float | None) -> None:
    """Reject a limit that is negative; 0 and None are none.

    Raises:
        ConfigurationError: it is.
    """
    if minutes is not None and not 0 <= minutes < math.inf:
        raise ConfigurationError(
            "--stall-timeout-minutes", f"{minutes:g}", "Give a positive number, or 0 for no limit"
        )


@dataclass(kw_only=True)
class DataTimeLimit:
    """The limits in a stage of the data pipeline."""

    distributed_timeout_minutes: float = DATA_MINUTES
    """Minutes that ranks wait for one of them, before the job ends with its name. Some steps are
    the work of one rank alone, for hours. A rank that is gone is noticed sooner."""
    stall_timeout_minutes: float = STALL_MINUTES
    """Minutes after which the job ends with the name of a rank that lives and does nothing: no
    processor time, no bytes moved, no step counted. 0: never."""


@dataclass(kw_only=True)
class TrainingTimeLimit:
    """The limit in training."""

    distributed_timeout_minutes: float = TRAINING_MINUTES
    """Minutes that ranks wait for one of them, before the job ends with its name. Raise it if one
    rank reads, converts or saves for longer. A rank that is gone is noticed sooner."""


@dataclass(kw_only=True)
class InferenceTimeLimit:
    """The limit in evaluation and generation."""

    distributed_timeout_minutes: float = INFERENCE_MINUTES
    """Minutes that ranks wait for one of them, before the job ends with its name. A rank that is
    gone is noticed sooner."""
