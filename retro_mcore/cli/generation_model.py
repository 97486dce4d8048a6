"""What `generate` and `serve` share: a model, its tokenizer, and where neighbors come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import initialize, raise_together
from retro_mcore.errors import ConfigurationError, RetroError, raise_problems
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project import ProjectPaths
from retro_mcore.retrieval.background import BackgroundRetrieval
from retro_mcore.retrieval.neighbors import SameNeighbors, neighbors_from_texts, num_longer
from retro_mcore.retrieval.retriever import Retriever

if TYPE_CHECKING:
    from retro_mcore.model.model import RetroModel
    from retro_mcore.model.options import ModelArguments


@dataclass(kw_only=True)
class GenerationModelOptions:
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one, else the CPU."""
    verify: bool = False
    """Compare the checksums of all files that are read, however large; else of 8 GiB a process."""


def check_retrieval_flags(options: GenerationModelOptions, neighbors_given: bool = False) -> None:
    """Refuse flags of live retrieval that cannot work, or that nothing would use.

    Args:
        options: The flags.
        neighbors_given: The user's own neighbors take the place of retrieved ones.

    Raises:
        ConfigurationError: naming the flag.
        SeveralErrors: more than one.
    """
    problems: list[RetroError] = []
    instead = "--neighbors" if neighbors_given else f"--retro-neighbors {options.retro_neighbors}"
    searches = options.retro_neighbors == "live" and not neighbors_given
    for name, least, default in (("retrieval_interval", 1, 1), ("retrieval_lead", 0, 0)):
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value < least:
            problems.append(ConfigurationError(flag, str(value), f"Give {least} or more"))
        elif value != default and not searches:
            found = f"{value} with {instead}: nothing is searched"
            problems.append(ConfigurationError(flag, found, "Leave it out"))
    raise_problems(problems)


@dataclass
class GenerationModel:
    """What has been loaded.

    Attributes:
        model: This rank's part of the model.
        arguments: What the model was built from.
        tokenizer: The project's.
        retriever: The project's database and index; None without live retrieval.
        search: The retriever in its thread; None without live retrieval.
        add_bos: Whether prompts begin with BOS even if the project's documents do not.
    """

    model: RetroModel
    arguments: ModelArguments
    tokenizer: Tokenizer
    retriever: Retriever | None
    search: BackgroundRetrieval | None
    add_bos: bool

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Prompts to tokens, with BOS where documents have it, or if asked for."""
        tokens = self.tokenizer.tokenize_batch(prompts)
        if not self.add_bos:
            return [self.tokenizer.with_bos(ids) for ids in tokens]
        bos = self.tokenizer.bos
        return [[self.tokenizer.eod if bos is None else bos, *ids] for ids in tokens]

    def given(self, texts: Sequence[str]) -> SameNeighbors:
        """The user's own neighbors, for every chunk.

        Raises:
            ConfigurationError: more than the model reads, or the model reads none.
        """
        from retro_mcore.session import require_reading

        require_reading(self.arguments, "neighbors", "Leave them out")
        sizes = (self.arguments.retro_num_neighbors, self.retrieved_length)
        neighbors = neighbors_from_texts(texts, self.tokenizer, *sizes)
        return SameNeighbors(neighbors, num_longer(texts, self.tokenizer, self.retrieved_length))

    @property
    def window(self) -> int:
        """Most tokens of a text."""
        return int(self.model.max_sequence_length)

    @property
    def retrieved_length(self) -> int:
        """R: tokens of a neighbor and its continuation."""
        return self.arguments.retro_num_retrieved_chunks * self.arguments.retro_chunk_length


def load_generation_model(options: GenerationModelOptions) -> GenerationModel:
    """Load what the options name, on every rank.

    Raises:
        RetroError: a flag, the project or the checkpoint is at fault.
    """
    device = setup_device(options.device)
    # Only now: megatron is imported after the device is chosen.
    from retro_mcore.session import load_project_model
    from retro_mcore.training.options.pretrain import ParallelOptions

    initialize(distributed_backend())
    parallel = ParallelOptions(
        device=options.device,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    loaded = load_project_model(
        options.project_dir, options.load, parallel, options.retro_attention_gate
    )
    model, arguments, project = loaded.model, loaded.arguments, loaded.project
    retriever = search = None
    with raise_together():
        tokenizer = load_project_tokenizer(project, ProjectPaths(options.project_dir))
        _refuse_other_chunks(options, arguments.retro_chunk_length, project.retro_gpt_chunk_length)
        if options.retro_neighbors == "live":
            retriever = _retriever(options, arguments, device)
            search = BackgroundRetrieval(
                retriever, options.retrieval_interval, options.retrieval_lead
            )
    return GenerationModel(model, arguments, tokenizer, retriever, search, options.add_bos)


def _retriever(
    options: GenerationModelOptions, arguments: ModelArguments, device: torch.device
) -> Retriever:
    from retro_mcore.session import require_reading

    require_reading(arguments, "--retro-neighbors live", "Use --retro-neighbors none")
    return Retriever(
        options.project_dir,
        arguments.retro_num_neighbors,
        arguments.retro_num_retrieved_chunks,
        device.type,
    )


def _refuse_other_chunks(options: GenerationModelOptions, of_model: int, of_project: int) -> None:
    if of_model != of_project:
        raise ConfigurationError(
            f"--load {options.load}",
            f"a model of chunk length {of_model}, but {options.project_dir} has {of_project}",
            "Use the project that the model was trained on",
        )
