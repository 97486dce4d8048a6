"""The flags of checkpoints and of reproducible runs; Megatron's names where it has one."""

from __future__ import annotations

from dataclasses import dataclass

from retro_mcore.errors import ConfigurationError, raise_problems
from retro_mcore.training.options.megatron import flag_of


@dataclass(kw_only=True)
class CheckpointOptions:
    """Where checkpoints are saved and loaded, and what is taken from one."""

    save: str | None = None
    """Directory for checkpoints, metrics and the loss curve. Default: nothing is saved."""
    save_interval: int | None = None
    """Iterations between checkpoints. Default: only the last."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""
    keep_last_n: int | None = None
    """Keep this many of the latest checkpoints. Default: all (with --save-retain-interval: one)."""
    save_retain_interval: int | None = None
    """Keep also the checkpoints at multiples of this many iterations, and remove others."""
    load: str | None = None
    """Directory to resume from, if it holds a checkpoint; usually the same as --save."""
    load_gpt: str | None = None
    """GPT checkpoint (Megatron's, or a Hugging Face directory) whose decoder a new run starts from;
    without --no-retrieval, retrieval's own weights start fresh. The model's flags come from it;
    those given beside it must agree, dropout apart."""
    ckpt_step: int | None = None
    """Iteration of the checkpoint to load. Default: the one that the tracker file names."""
    use_checkpoint_args: bool = False
    """Take the model's options from the checkpoint in --load; contradicting flags are refused."""
    finetune: bool = False
    """Take the weights alone, and start from iteration 0 with a new optimizer and schedule."""
    no_load_optim: bool = False
    """Start with a new optimizer and schedule."""
    no_load_rng: bool = False
    """Start with random states from the seed."""
    verify: bool = False
    """Compare the checksums of all files that are read, however large. Default: a process reads at
    most 8 GiB of the project and of the checkpoint for that, and of larger files compares sizes."""

    def check_checkpoints(self) -> None:
        """Refuse flags that would have no effect.

        Raises:
            ConfigurationError: naming the flag.
            SeveralErrors: naming all of them.
        """
        raise_problems(
            [
                ConfigurationError(flag_of(name), f"given without --{needed}", f"Add --{needed}")
                for needed, names in _NEEDS.items()
                for name in names
                if getattr(self, name) and getattr(self, needed) is None
            ]
        )

    @property
    def needs_checkpoint(self) -> str | None:
        """The flag, if any, that has no meaning where --load holds no checkpoint."""
        names = (name for name in _NEEDS["load"] if getattr(self, name))
        return next(("--" + name.replace("_", "-") for name in names), None)


@dataclass(kw_only=True)
class ReproducibilityOptions:
    """Whether runs repeat bit for bit."""

    deterministic_mode: bool = False
    """Use deterministic kernels only: the same run gives the same bits. Slower on GPUs."""


_NEEDS = {
    "save": ("save_interval", "async_save", "keep_last_n", "save_retain_interval"),
    "load": ("ckpt_step", "use_checkpoint_args", "finetune", "no_load_optim", "no_load_rng"),
}
