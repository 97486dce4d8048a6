"""A trained model with its tokenizer and what it can retrieve from: what generating needs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron.core.models.gpt import GPTModel

from retro_mcore.checkpoint.arguments import read_arguments
from retro_mcore.checkpoint.files import find_checkpoint
from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import get_rank, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.model.options import ModelArguments
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.training.loop.sample_reader import check_document_tokens, document_tokens
from retro_mcore.training.options.pretrain import ParallelOptions
from retro_mcore.training.setup.fits_project import check_shape, check_tokenizer
from retro_mcore.training.setup.load_model import load_model_from_checkpoint

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProjectModel:
    """A model in evaluation mode, on its device, and the project that it fits.

    Attributes:
        model: This rank's part of it.
        arguments: What its checkpoint says of it, with the attention gate that is in force.
        project: The project's configuration.
    """

    model: GPTModel
    arguments: ModelArguments
    project: ProjectConfig


def load_project_model(
    project_dir: Path | str,
    checkpoints: Path | str,
    layout: ParallelOptions,
    retro_attention_gate: float | None = None,
) -> ProjectModel:
    """The latest checkpoint of a directory; all ranks call it, after `setup_device`.

    Args:
        project_dir: The project with its tokenizer.
        checkpoints: The directory.
        layout: How the model is divided over ranks.
        retro_attention_gate: Scale of what the model reads in its neighbors; None: as it was
            trained.

    Raises:
        RetroError: project and checkpoint do not fit together, one is damaged, or the gate is not
            a number from 0.
    """
    with raise_together():
        project = ProjectConfig.load(project_dir)
        _check_gate_value(retro_attention_gate)
    model, arguments = load_model_from_checkpoint(checkpoints, layout)
    with raise_together():
        check_tokenizer(arguments, project, str(project_dir))
        tokenizer = load_project_tokenizer(project, ProjectPaths(project_dir))
        saved = read_arguments(find_checkpoint(checkpoints))
        note = check_document_tokens(saved, document_tokens(tokenizer), project_dir)
        if note is not None and get_rank() == 0:
            _LOG.warning("%s", note)
        if retro_attention_gate is not None:
            if arguments.no_retrieval:
                raise ConfigurationError(
                    "--retro-attention-gate",
                    f"the model of {checkpoints} was trained without retrieval",
                    "Leave it out",
                )
            arguments = replace(arguments, retro_attention_gate=retro_attention_gate)
            model.config.retro_attention_gate = retro_attention_gate
    return ProjectModel(model, arguments, project)


def _check_gate_value(gate: float | None) -> None:
    if gate is not None and not (math.isfinite(gate) and gate >= 0):
        raise ConfigurationError("--retro-attention-gate", str(gate), "Give a number from 0")


def require_reading(arguments: ModelArguments, subject: str, mend: str = "Use none") -> None:
    """Refuse neighbors that would change nothing: the one rule of every command that gives some.

    Args:
        arguments: The model's.
        subject: What asks for neighbors, as the user wrote it.
        mend: How to do without them.

    Raises:
        ConfigurationError: the model has no retrieval, or its attention gate is 0.
    """
    if arguments.no_retrieval:
        raise ConfigurationError(subject, "the model was trained without retrieval", mend)
    if arguments.retro_attention_gate == 0.0:
        raise ConfigurationError(
            subject,
            "the model was tuned with --retro-attention-gate 0, so neighbors would change nothing",
            f"{mend}, or --retro-attention-gate 1",
        )


def warn_beyond_training(arguments: ModelArguments, num_tokens: int, what: str) -> None:
    """Warn when texts are longer than the model's training samples.

    Args:
        arguments: The model's.
        num_tokens: Length of the longest text.
        what: What these texts are.
    """
    if num_tokens > arguments.seq_length and get_rank() == 0:
        _LOG.warning(
            "warning: %s have up to %d tokens, but the model was trained on %d: quality may drop "
            "at later positions",
            what,
            num_tokens,
            arguments.seq_length,
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, on its device.

    Attributes:
        model: This rank's part of it.
        arguments: What its checkpoint says of it, with the attention gate that is in force.
        tokenizer: The project's.
        retriever: The project's live search; None unless it was asked for.
    """

    model: GPTModel
    arguments: ModelArguments
    tokenizer: Tokenizer
    retriever: Retriever | None

    @property
    def window(self) -> int:
        """Tokens that the model reads at once."""
        return int(self.model.max_sequence_length)

    @property
    def retrieved_length(self) -> int:
        """R."""
        return self.arguments.retro_num_retrieved_chunks * self.arguments.retro_chunk_length

    @classmethod
    def load(
        cls,
        project_dir: Path | str,
        checkpoints: Path | str,
        retrieval: bool,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        retro_attention_gate: float | None = None,
    ) -> LoadedModel:
        """The latest checkpoint of a directory; all ranks call it, after `setup_device`.

        Args:
            project_dir: Its project: tokenizer, database and index.
            checkpoints: The directory.
            retrieval: Open the project's database and index for live retrieval.
            tensor_model_parallel_size: Ranks that share one layer.
            pipeline_model_parallel_size: Ranks that share out the layers.
            device: Where it runs.
            retro_attention_gate: As `load_project_model` takes it.

        Raises:
            RetroError: project and checkpoint do not fit together, one is damaged, or neighbors
                are asked for that the model would not read.
        """
        layout = ParallelOptions(
            device=device,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
        )
        loaded = load_project_model(project_dir, checkpoints, layout, retro_attention_gate)
        model, arguments, project = loaded.model, loaded.arguments, loaded.project
        with raise_together():
            tokenizer = load_project_tokenizer(project, ProjectPaths(project_dir))
            retriever = None
            if retrieval:
                require_reading(arguments, "--retro-neighbors live", "Use --retro-neighbors none")
                check_shape(arguments, project, str(project_dir))
                retriever = Retriever(
                    project_dir,
                    arguments.retro_num_neighbors,
                    arguments.retro_num_retrieved_chunks,
                    next(model.parameters()).device.type,
                )
        return cls(model, arguments, tokenizer, retriever)
