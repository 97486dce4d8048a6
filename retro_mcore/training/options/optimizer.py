"""Flags of the optimizer and its schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.model.option_traits import at_least
from retro_mcore.training.options.megatron import OptimizerFlags
from retro_mcore.training.options.other_optimizers import OtherOptimizerOptions

#: Flags of the schedules of learning rate and weight decay.
SCHEDULE = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_init"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
    *("decoupled_lr", "decoupled_min_lr"),
)


@dataclass(kw_only=True)
class OptimizerOptions(OtherOptimizerOptions, OptimizerFlags):
    """The optimizer, schedules of learning rate and weight decay, and gradient clipping."""

    optimizer: str = "adam"
    """Optimizer: adam (AdamW), sgd, muon, dist_muon, adaptive_muon, lion or soap. The last five
    train the layers' matrices, and AdamW all other weights."""
    lr: float
    """Maximum learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay; WSD stays at --lr until its decay at the end."""
    lr_decay_iters: int | None = field(default=None, metadata=at_least(1))
    """Iterations until --min-lr is reached. Default: all iterations."""
    lr_decay_samples: int | None = field(default=None, metadata=at_least(1))
    """Samples until --min-lr is reached (instead of iterations)."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of WSD's decay."""
    lr_wsd_decay_iters: int | None = field(default=None, metadata=at_least(1))
    """Iterations of WSD's decay, at the end of --lr-decay-iters."""
    lr_wsd_decay_samples: int | None = field(default=None, metadata=at_least(1))
    """Samples of WSD's decay (instead of iterations)."""
    lr_warmup_fraction: float | None = None
    """Length of the linear warmup, as a fraction of the decay length."""
    lr_warmup_iters: int = 0
    """Length of the linear warmup in iterations (instead of the fraction)."""
    lr_warmup_samples: int = 0
    """Length of the linear warmup in samples (instead of the fraction)."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warmup."""
    weight_decay: float = 0.01
    """Weight decay (not applied to biases and norms). SGD adds it to the gradient; the other
    optimizers decay the weights themselves."""
    start_weight_decay: float | None = None
    """Weight decay at the start, with --weight-decay-incr-style linear or cosine."""
    end_weight_decay: float | None = None
    """Weight decay at the end, with --weight-decay-incr-style linear or cosine."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the change from --start-weight-decay to --end-weight-decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Maximum norm of the whole gradient; 0 disables clipping."""
    use_distributed_optimizer: bool = False
    """Divide the optimizer state among the data parallel processes."""
    accumulate_allreduce_grads_in_fp32: bool = False
    """Accumulate gradients in fp32 with --fp16 too. Always on with --bf16."""
    freeze_decoder: bool = False
    """Train only the neighbor encoder, the cross-attentions and their norms."""

    def check_schedule(self) -> None:
        """Reject learning rates, warmups and weight decays that contradict each other.

        Raises:
            ConfigurationError: an option is invalid. Names the flag.
        """
        if not self.lr >= self.min_lr >= 0 or self.lr == 0:
            raise ConfigurationError(
                "--lr", f"{self.lr} with --min-lr {self.min_lr}", "Choose lr >= min_lr >= 0, lr > 0"
            )
        if not 0 <= self.lr_warmup_init <= self.lr:
            raise ConfigurationError(
                "--lr-warmup-init", str(self.lr_warmup_init), f"Choose from 0 to --lr {self.lr}"
            )
        self._check_one_of("lr_decay_iters", "lr_decay_samples")
        self._check_one_of("lr_warmup_iters", "lr_warmup_samples")
        self._check_warmup_fraction()
        self._check_wsd()
        self._check_weight_decay()

    def _check_one_of(self, name: str, other: str) -> None:
        if getattr(self, name) and getattr(self, other):
            raise ConfigurationError(
                flag_of(name), f"given together with {flag_of(other)}", "Choose one"
            )

    def _check_warmup_fraction(self) -> None:
        if self.lr_warmup_fraction is None:
            return
        self._check_one_of("lr_warmup_iters", "lr_warmup_fraction")
        self._check_one_of("lr_warmup_samples", "lr_warmup_fraction")
        if not 0 <= self.lr_warmup_fraction < 1:
            raise ConfigurationError(
                "--lr-warmup-fraction", str(self.lr_warmup_fraction), "Choose from 0 to below 1"
            )

    def _check_wsd(self) -> None:
        given = self.lr_wsd_decay_iters or self.lr_wsd_decay_samples
        self._check_one_of("lr_wsd_decay_iters", "lr_wsd_decay_samples")
        if self.lr_decay_style == "WSD" and not given:
            raise ConfigurationError(
                "--lr-decay-style", "WSD without a decay", "Add --lr-wsd-decay-iters or -samples"
            )
        if self.lr_decay_style != "WSD" and given:
            raise ConfigurationError(
                "--lr-wsd-decay-iters" if self.lr_wsd_decay_iters else "--lr-wsd-decay-samples",
                f"given with --lr-decay-style {self.lr_decay_style}",
                "Add --lr-decay-style WSD",
            )

    def _check_weight_decay(self) -> None:
        ends = (self.start_weight_decay, self.end_weight_decay)
        if self.weight_decay_incr_style == "constant":
            if ends != (None, None):
                raise ConfigurationError(
                    "--weight-decay-incr-style",
                    "constant, with --start-weight-decay or --end-weight-decay",
                    "Choose linear or cosine, or give --weight-decay alone",
                )
        elif None in ends or not 0 <= ends[0] <= ends[1]:  # type: ignore[operator]
            raise ConfigurationError(
                "--start-weight-decay",
                f"{ends[0]} with --end-weight-decay {ends[1]}",
                "Give both, 0 <= start <= end",
            )
