"""Lengths of the schedules of learning rate and weight decay, in samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from retro_mcore.errors import ConfigurationError
from retro_mcore.training.options.optimizer import OptimizerOptions


@dataclass(frozen=True)
class ScheduleLengths:
    """What megatron's OptimizerParamScheduler is told; its steps are samples.

    Attributes:
        lr_warmup_samples: Until the highest learning rate.
        lr_decay_samples: Until the lowest.
        lr_wsd_decay_samples: WSD's decay, the last of them; None for other styles.
        wd_incr_samples: Until the last weight decay, if it changes at all.
    """

    lr_warmup_samples: int
    lr_decay_samples: int
    lr_wsd_decay_samples: int | None
    wd_incr_samples: int

    def flags(self) -> dict[str, Any]:
        """The flags that say the same in samples, for a run to resume."""
        lengths = {name: value for name, value in asdict(self).items() if name.startswith("lr_")}
        iterations = {"lr_decay_iters": None, "lr_warmup_iters": 0, "lr_wsd_decay_iters": None}
        return {**lengths, **iterations, "lr_warmup_fraction": None}


def schedule_lengths(
    options: OptimizerOptions, global_batch_size: int, train_samples: int
) -> ScheduleLengths:
    """Resolve iterations and fractions; an iteration counts as a whole global batch, as Megatron's.

    Raises:
        ConfigurationError: the warmup, or WSD's decay, does not fit into the decay's length.
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
