"""Check that a model and a project match."""

from __future__ import annotations

import logging

from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.distributed import get_rank
from retro_mcore.errors import ConfigurationError, TokenizerError
from retro_mcore.model.options import ModelArguments
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.loop.sample_reader import tokenizer_fingerprint

_LOG = logging.getLogger(__name__)
#: Megatron pads to multiples of 128 · tensor parallel size.
_MOST_PADDING = 128 * 64


def check_tokenizer(arguments: ModelArguments, project: ProjectConfig, project_dir: str) -> None:
    """Reject a model trained with a different tokenizer from the project's.

    Of a model whose checkpoint does not record its tokenizer, the size of the vocabulary is
    compared, and a warning is logged.

    Raises:
        TokenizerError: the tokenizers differ. Names both.
    """
    theirs = tokenizer_fingerprint(project, project_dir)
    if lacks_tokenizer(arguments.tokenizer_fingerprint):
        _check_vocabulary(arguments, project, project_dir)
    elif arguments.tokenizer_fingerprint != theirs:
        raise TokenizerError(
            f"tokenizer of {project_dir}",
            f"{project.retro_gpt_tokenizer_type} with fingerprint {theirs[:12]}, but the "
            f"checkpoint was trained with {arguments.tokenizer_type} (vocabulary "
            f"{arguments.vocab_size}, fingerprint {arguments.tokenizer_fingerprint[:12]})",
            "Evaluate on the project that the model was trained on, or on one with its tokenizer",
        )


def lacks_tokenizer(fingerprint: str | None) -> bool:
    """Whether another trainer did not record its tokenizer; logged on the first rank.

    Megatron-LM's own trainer does not; with our providers it does. A checkpoint of ours that was
    converted without a project has an empty fingerprint, which no tokenizer has.
    """
    if fingerprint is None and get_rank() == 0:
        _LOG.warning(
            "warning: the checkpoint does not record its tokenizer's fingerprint: only the size of "
            "the vocabulary is compared with the project's"
        )
    return fingerprint is None


def _check_vocabulary(arguments: ModelArguments, project: ProjectConfig, project_dir: str) -> None:
    here = load_project_tokenizer(project, ProjectPaths(project_dir)).vocab_size
    padding = arguments.padded_vocab_size - here
    # Megatron-LM may record the padded size alone.
    unstated = arguments.vocab_size == arguments.padded_vocab_size
    if arguments.vocab_size != here and not (unstated and 0 <= padding < _MOST_PADDING):
        raise TokenizerError(
            f"tokenizer of {project_dir}",
            f"{project.retro_gpt_tokenizer_type} with a vocabulary of {here}, but the checkpoint "
            f"was trained with {arguments.vocab_size}",
            "Use the project that the model was trained on, or one with its tokenizer",
        )


def check_chunk_length(arguments: ModelArguments, project: ProjectConfig, project_dir: str) -> None:
    """Reject a project with a different chunk length from the model's.

    Raises:
        ConfigurationError: the lengths differ. Names both.
    """
    if project.retro_gpt_chunk_length != arguments.retro_chunk_length:
        raise ConfigurationError(
            "retro_gpt_chunk_length",
            f"{project.retro_gpt_chunk_length} in {project_dir}, but the checkpoint was trained "
            f"with {arguments.retro_chunk_length}",
            "Use a project with the model's chunk length",
        )


def check_sample_length(
    arguments: ModelArguments, project: ProjectConfig, project_dir: str
) -> None:
    """Reject a project whose samples are longer than the model can read.

    Raises:
        ConfigurationError: samples are longer than the model's positions.
    """
    longer = project.retro_gpt_seq_length > arguments.seq_length
    if longer and arguments.position_embedding_type == "learned_absolute":
        raise ConfigurationError(
            "retro_gpt_seq_length",
            f"{project.retro_gpt_seq_length} in {project_dir}, but the checkpoint has "
            f"{arguments.seq_length} positions",
            "Evaluate on a project with shorter samples",
        )
