"""Loading a trained model with its tokenizer and retriever, after checking that all fit together.

Every command that uses a trained model loads it here, so all apply the same checks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.conversion.model_fields import END_TOKENS
from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import get_rank, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.options import ModelArguments
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.training.loop.sample_reader import check_document_tokens, document_tokens
from retro_mcore.training.options.pretrain import ParallelOptions
from retro_mcore.training.setup.fits_project import check_chunk_length, check_tokenizer
from retro_mcore.training.setup.initialize import initialize_parallel
from retro_mcore.training.setup.load_model import SavedModel, require_whole_experts

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, on its device.

    Attributes:
        model: This rank's part of it.
        arguments: What it was built from: its checkpoint's arguments, with the attention gate that
            was asked for.
        tokenizer: The project's.
        retriever: The project's live search; None unless it was asked for.
        checkpoint: Where the weights come from; None if they were not loaded.
        training: What the checkpoint records about its run, by the names of flags.
    """

    model: DecoderModel
    arguments: ModelArguments
    tokenizer: Tokenizer
    retriever: Retriever | None
    checkpoint: Path | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """Most tokens that the model reads at once."""
        return int(self.model.max_sequence_length)

    @property
    def retrieved_length(self) -> int:
        """R: tokens of a neighbor and its continuation."""
        return self.arguments.retro_num_retrieved_chunks * self.arguments.retro_chunk_length


def load_model(
    project_dir: Path | str,
    checkpoints: Path | str,
    *,
    retrieval: bool = False,
    layout: ParallelOptions | None = None,
    retro_attention_gate: float | None = None,
) -> LoadedModel:
    """Load the latest checkpoint of a directory. All ranks call it, after `setup_device`.

    The project must have the model's tokenizer, end of documents and chunk length. Documents that
    begin otherwise than in training are logged as a warning.

    Args:
        project_dir: The project: tokenizer, database and index.
        checkpoints: The --save directory of a run.
        retrieval: Open the project's database and index for live retrieval.
        layout: How the model is divided over ranks; default: one process. The precision is the
            checkpoint's.
        retro_attention_gate: Factor on what the model reads in its neighbors; None: as trained.

    Raises:
        RetroError: project and checkpoint do not fit together, one is damaged, the gate is not a
            number from 0, or retrieval is asked for that the model would not read.
    """
    layout = layout or ParallelOptions()
    with raise_together():
        project = ProjectConfig.load(project_dir)
        _check_gate(retro_attention_gate)
        require_whole_experts(layout)
    initialize_parallel(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
    )
    with raise_together():
        saved = SavedModel.find(checkpoints).with_attention_gate(retro_attention_gate)
        tokenizer = _fitting_tokenizer(saved, project, project_dir)
        if retrieval:
            require_reading(saved.arguments, "--retro-neighbors live", "Use --retro-neighbors none")
    tokenizer.end_tokens = _end_tokens(saved, tokenizer)
    model = saved.load(layout)
    retriever = None
    with raise_together():
        if retrieval:
            retriever = Retriever(
                project_dir,
                saved.arguments.retro_num_neighbors,
                saved.arguments.retro_num_retrieved_chunks,
                next(model.parameters()).device.type,
            )
    return LoadedModel(
        model, saved.arguments, tokenizer, retriever, saved.path, dict(saved.entries)
    )


def _check_gate(gate: float | None) -> None:
    if gate is not None and not (math.isfinite(gate) and gate >= 0):
        raise ConfigurationError("--retro-attention-gate", str(gate), "Give a number from 0")


def _fitting_tokenizer(
    saved: SavedModel, project: ProjectConfig, project_dir: Path | str
) -> Tokenizer:
    """The project's tokenizer, if the project fits the model."""
    check_tokenizer(saved.arguments, project, str(project_dir))
    check_chunk_length(saved.arguments, project, str(project_dir))
    tokenizer = load_project_tokenizer(project, ProjectPaths(project_dir))
    warning = check_document_tokens(saved.entries, document_tokens(tokenizer), project_dir)
    if warning is not None and get_rank() == 0:
        _LOG.warning("%s", warning)
    return tokenizer


def _end_tokens(saved: SavedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Recorded tokens that end a text, besides EOD. Those beyond the tokenizer cannot occur."""
    recorded = saved.entries.get(END_TOKENS) or ()
    return tuple(t for t in recorded if t != tokenizer.eod and t < tokenizer.vocab_size)


def warn_beyond_training(arguments: ModelArguments, num_tokens: int, what: str) -> None:
    """Warn of texts that are longer than the model's training samples.

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


def require_reading(arguments: ModelArguments, subject: str, fix: str = "Use none") -> None:
    """Reject neighbors that would change nothing.

    Args:
        arguments: The model's.
        subject: What asks for neighbors, as the user wrote it.
        fix: How to do without them.

    Raises:
        ConfigurationError: the model has no retrieval, or its attention gate is 0.
    """
    if arguments.no_retrieval:
        raise ConfigurationError(subject, "the model was trained without retrieval", fix)
    if arguments.retro_attention_gate == 0.0:
        raise ConfigurationError(
            subject,
            "the model was tuned with --retro-attention-gate 0, so neighbors would change nothing",
            f"{fix}, or --retro-attention-gate 1",
        )
