"""Flags that `generate` and `serve` share, and the model that they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from retro_mcore.distributed import initialize
from retro_mcore.errors import ConfigurationError, RetroError, flag_of, raise_problems
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.time_limit import InferenceTimeLimit
from retro_mcore.training.options.parallel import divided_texts

if TYPE_CHECKING:
    from retro_mcore.session import GenerationModel


@dataclass(kw_only=True)
class GenerationModelOptions(InferenceTimeLimit):
    """The model to generate with, and its neighbors."""

    project_dir: str
    """Project directory: its tokenizer, database and index."""
    load: str
    """Directory of the checkpoint, as pretrain_retro was given with --save."""
    retro_neighbors: Literal["live", "none"] = "live"
    """live: retrieve the neighbors of each chunk from the project's index as soon as the chunk is
    complete. none: retrieval off, but for neighbors that are given."""
    retro_attention_gate: float | None = None
    """Scale of what the model reads in its neighbors. Default: the checkpoint's; a model that was
    tuned with 0 needs 1 here to read any."""
    retrieval_interval: int = 1
    """Search for every n-th chunk; those between keep what was found last."""
    retrieval_lead: int = 0
    """Search with a chunk's tokens but for the last so many, in the background while they are
    generated. 0: with the whole chunk, as in training."""
    two_chunks: bool = False
    """The prompt is the first chunk and the answer the second, whatever their lengths, as
    instruction-tuned models are used."""
    add_bos: bool = False
    """Begin prompts with the tokenizer's BOS, or with EOD where it has none, also if the project's
    documents do not (default: prompts begin as they do)."""
    tensor_model_parallel_size: int = 1
    """Ranks that share one layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share out the layers."""
    context_parallel_size: int = 1
    """Not supported: generation reads whole texts on every rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one, else the CPU."""
    verify: bool = False
    """Compare the checksums of all files that are read, however large; else of 8 GiB a process."""


def check_generation_flags(options: GenerationModelOptions, neighbors_given: bool = False) -> None:
    """Reject flags of layout or live retrieval that cannot work, or that nothing would use.

    Args:
        options: The flags.
        neighbors_given: The user's own neighbors take the place of retrieved ones.

    Raises:
        ConfigurationError: naming the flag.
        SeveralErrors: more than one.
    """
    problems: list[RetroError] = [*divided_texts(options.context_parallel_size)]
    instead = "--neighbors" if neighbors_given else f"--retro-neighbors {options.retro_neighbors}"
    searches = options.retro_neighbors == "live" and not neighbors_given
    for name, least, default in (("retrieval_interval", 1, 1), ("retrieval_lead", 0, 0)):
        value, flag = getattr(options, name), flag_of(name)
        if value < least:
            problems.append(ConfigurationError(flag, str(value), f"Give {least} or more"))
        elif value != default and not searches:
            found = f"{value} with {instead}: nothing is searched"
            problems.append(ConfigurationError(flag, found, "Leave it out"))
    raise_problems(problems)


def load_generation_model(options: GenerationModelOptions) -> GenerationModel:
    """Load the model that the options name, on every rank.

    Raises:
        RetroError: a flag, the project or the checkpoint is at fault.
    """
    setup_device(options.device)
    from retro_mcore import session
    from retro_mcore.training.options.pretrain import ParallelOptions

    initialize(distributed_backend(), options.distributed_timeout_minutes)
    return session.load_generation_model(
        options.project_dir,
        options.load,
        retrieval=options.retro_neighbors == "live",
        layout=ParallelOptions(
            device=options.device,
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        ),
        retro_attention_gate=options.retro_attention_gate,
        retrieval_interval=options.retrieval_interval,
        retrieval_lead=options.retrieval_lead,
        add_bos=options.add_bos,
        two_chunks=options.two_chunks,
    )
