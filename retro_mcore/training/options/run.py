"""Options of a pretraining run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from retro_mcore.training.options.pretrain import TrainingOptions


@dataclass(kw_only=True)
class PretrainOptions(TrainingOptions):
    """Configuration of a pretraining run.

    Options have the names of Megatron's flags. Options fixed by the project's config.json may be
    omitted, and are refused if they differ.
    """

    skip_train: bool = False
    """Do not train. Report the loaded model's loss on the first --eval-iters batches of the
    validation and test samples. evaluate_perplexity measures more."""
    world_size: int | None = None
    """Number of processes for --dry-run; a real run with a different number is refused."""
    vocab_size: int | None = None
    """The tokenizer's vocabulary size. Fixed by the project."""


def model_options(options_type: type, options: Mapping[str, object]) -> dict[str, object]:
    """Model options from the checkpoint of --use-checkpoint-args or --load-gpt, by name.

    Args:
        options_type: Dataclass of all options.
        options: Given options, by name. Without these two flags the result is empty.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigurationError: --use-checkpoint-args without --load.
    """
    known = {field.name for field in fields(options_type)}
    load, load_gpt, step = (options.get(name) for name in ("load", "load_gpt", "ckpt_step"))
    of_load = bool(options.get("use_checkpoint_args"))
    if not of_load and not (load_gpt and known.issuperset(("load_gpt", "num_layers"))):
        return {}
    from retro_mcore.training.options import from_checkpoint

    if of_load:
        return from_checkpoint.model_options_of_checkpoint(load, step)  # type: ignore[arg-type]
    if options.get("dry_run") and not Path(str(load_gpt)).exists():
        return {}  # a run may be planned before its GPT exists
    return from_checkpoint.model_options_of_gpt(str(load_gpt), load, step)  # type: ignore[arg-type]
