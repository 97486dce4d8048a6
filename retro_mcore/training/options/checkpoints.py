"""Flags of checkpoints and of reproducible runs, with Megatron's names if it has the flag."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from retro_mcore.errors import ConfigurationError, flag_of, raise_problems
from retro_mcore.model.option_traits import at_least, needs, stated
from retro_mcore.training.options.local_checkpoints import LocalCheckpointOptions


@dataclass(kw_only=True)
class CheckpointOptions(LocalCheckpointOptions):
    """Checkpoints: where they are saved and loaded, and which parts are loaded."""

    save: str | None = None
    """Directory for checkpoints, metrics and the loss curve. Default: nothing is saved."""
    save_interval: int | None = field(default=None, metadata=at_least(1) | needs("save"))
    """Iterations between checkpoints. Default: only the last."""
    async_save: bool = field(default=False, metadata=needs("save"))
    """Write checkpoints in the background while training continues."""
    keep_last_n: int | None = field(default=None, metadata=at_least(1) | needs("save"))
    """Number of latest checkpoints to keep. Default: all (with --save-retain-interval: one)."""
    save_retain_interval: int | None = field(default=None, metadata=at_least(1) | needs("save"))
    """Also keep checkpoints at multiples of this number of iterations; remove all others."""
    load: str | None = None
    """Directory to resume from, if it holds a checkpoint; usually the same as --save."""
    load_gpt: str | None = None
    """GPT checkpoint (Megatron's, a Hugging Face directory or a .gguf file) that provides a new
    run's decoder. Unless --no-retrieval is given, encoder and cross-attention are newly
    initialized. The model flags are also taken from it; those given explicitly must agree, except
    dropout."""
    retro_matching_start: bool = field(default=False, metadata=needs("load_gpt"))
    """Fit the initial weights of encoder and cross-attention to the GPT, so that retrieved tokens
    are found and read from the first iteration on; takes a few forward passes over the first
    samples, in one process of model parallelism."""
    ckpt_step: int | None = field(default=None, metadata=needs("load"))
    """Iteration of the checkpoint to load. Default: the one named in the tracker file."""
    use_checkpoint_args: bool = field(default=False, metadata=needs("load"))
    """Take the model options from the checkpoint in --load; contradicting flags are refused."""
    finetune: bool = field(default=False, metadata=needs("load"))
    """Load only the weights, and start from iteration 0 with a new optimizer and schedule."""
    no_load_optim: bool = field(default=False, metadata=needs("load"))
    """Start with a new optimizer and schedule instead of the checkpoint's."""
    override_opt_param_scheduler: bool = field(default=False, metadata=needs("load"))
    """Continue with the schedule of learning rate and weight decay that the flags give, not with
    the checkpoint's."""
    use_checkpoint_opt_param_scheduler: bool = field(default=False, metadata=needs("load"))
    """Continue with the checkpoint's schedule, whatever the flags give."""
    no_load_rng: bool = field(default=False, metadata=needs("load"))
    """Initialize the random states from the seed instead of the checkpoint."""
    verify: bool = False
    """Verify the checksums of all files that are read, however large. Default: each process reads
    at most 8 GiB of the project and 8 GiB of the checkpoint, and compares only the sizes of the
    other files."""

    def check_checkpoints(self) -> None:
        """Reject flags that would have no effect.

        Raises:
            ConfigurationError: an option is invalid. Names the flag.
            SeveralErrors: several options are invalid. Names all of them.
        """
        problems = [
            ConfigurationError(
                flag_of(name), f"given without {flag_of(needed)}", f"Add {flag_of(needed)}"
            )
            for name, needed in stated("needs", CheckpointOptions).items()
            if getattr(self, name) and getattr(self, needed) is None
        ]
        problems += self._schedules_without_effect()
        problems += self.refused_local_checkpoints()
        problems += self._local_ones_never_due()
        raise_problems(problems)

    def _schedules_without_effect(self) -> Iterator[ConfigurationError]:
        override, use = "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"
        others = {
            override: (use, "finetune", "no_load_optim"),
            use: ("finetune", "no_load_optim"),
        }
        for name, names in others.items():
            for other in names:
                if getattr(self, name) and getattr(self, other):
                    yield ConfigurationError(
                        flag_of(name), f"given together with {flag_of(other)}", "Choose one"
                    )

    def _local_ones_never_due(self) -> Iterator[ConfigurationError]:
        local, interval = self.non_persistent_save_interval, self.save_interval
        if local and interval and local % interval == 0:
            yield ConfigurationError(
                "--non-persistent-save-interval",
                f"{local}, with --save-interval {interval}, which is due at all of these "
                "iterations, and then no local checkpoint is saved",
                f"Give less than {interval}" if interval > 1 else "Give a larger --save-interval",
            )

    @property
    def needs_checkpoint(self) -> str | None:
        """The flag, if any, that makes no sense if --load contains no checkpoint."""
        for name, needed in stated("needs", CheckpointOptions).items():
            if needed == "load" and getattr(self, name) and "opt_param_scheduler" not in name:
                return flag_of(name)
        return None


@dataclass(kw_only=True)
class ReproducibilityOptions:
    """Bitwise reproducibility."""

    deterministic_mode: bool = False
    """Use only deterministic kernels, so repeated runs are bitwise identical. Slower on GPUs."""
