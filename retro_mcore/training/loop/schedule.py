"""Lengths of the learning rate and weight decay schedules, in samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from retro_mcore.errors import ConfigurationError
from retro_mcore.training.options.optimizer import OptimizerOptions


@dataclass(frozen=True)
class ScheduleLengths:
    """Lengths for megatron's OptimizerParamScheduler, with samples as steps.

    Attributes:
        lr_warmup_samples: Samples until the maximum learning rate.
        lr_decay_samples: Samples until the minimum learning rate.
        lr_wsd_decay_samples: Samples of the final WSD decay; None for other styles.
        wd_incr_samples: Samples until the final weight decay, if it changes.
    """

    lr_warmup_samples: int
    lr_decay_samples: int
    lr_wsd_decay_samples: int | None
    wd_incr_samples: int

    def flags(self) -> dict[str, Any]:
        """Equivalent flags in samples, for resuming a run."""
        lengths = {name: value for name, value in asdict(self).items() if name.startswith("lr_")}
        iterations = {"lr_decay_iters": None, "lr_warmup_iters": 0, "lr_wsd_decay_iters": None}
        return {**lengths, **iterations, "lr_warmup_fraction": None}


def schedule_lengths(
    options: OptimizerOptions, global_batch_size: int, train_samples: int
) -> ScheduleLengths:
    """Convert iterations and fractions to samples. As in Megatron, an iteration is a global batch.

    Raises:
        ConfigurationError: the warmup or WSD decay does not fit into the length of the decay.
    """
    batch = global_batch_size
    decay = options.lr_decay_samples or (options.lr_decay_iters or 0) * batch or train_samples
    warmup = options.lr_warmup_samples or options.lr_warmup_iters * batch
    if options.lr_warmup_fraction is not None:
        warmup = int(options.lr_warmup_fraction * decay)
    if warmup >= decay:
        given = "--lr-warmup-samples" if options.lr_warmup_samples else "--lr-warmup-iters"
        raise ConfigurationError(
            given,
            f"{options.lr_warmup_samples or options.lr_warmup_iters}, that is {warmup} samples, "
            f"but the learning rate decays over {decay}",
            "Warm up for less than --lr-decay-iters",
        )
    wsd = options.lr_wsd_decay_samples or (options.lr_wsd_decay_iters or 0) * batch or None
    if wsd is not None and warmup + wsd > decay:
        raise ConfigurationError(
            "--lr-wsd-decay-iters" if options.lr_wsd_decay_iters else "--lr-wsd-decay-samples",
            f"{wsd} samples after a warmup of {warmup}, but the whole decay has {decay}",
            "Choose a shorter one",
        )
    constant = options.weight_decay_incr_style == "constant"
    return ScheduleLengths(warmup, decay, wsd, decay if constant else train_samples)
