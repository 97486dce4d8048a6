"""`--load-gpt`: load the decoder from a GPT checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_mcore.checkpoint.conversion.formats import Checkpoint, open_checkpoint
from retro_mcore.checkpoint.conversion.gpt import LoadedDecoder, check_gpt, load_gpt
from retro_mcore.checkpoint.files import existing_checkpoint
from retro_mcore.data.tokenizers.gguf import gguf_bos_habit
from retro_mcore.data.tokenizers.loading import bos_habit
from retro_mcore.distributed import raise_together
from retro_mcore.errors import ConfigurationError, TokenizerError, check_all
from retro_mcore.gguf_file import is_gguf
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.options import ModelArguments
from retro_mcore.project.config import ProjectSettings
from retro_mcore.training.loop.sample_reader import check_document_tokens
from retro_mcore.training.options.model_sizes import expert_width
from retro_mcore.training.options.pretrain import TrainingOptions
from retro_mcore.training.setup.build import (
    default_ffn_hidden_size,
    number_of_positions,
    padded_vocab_size,
)

if TYPE_CHECKING:
    from retro_mcore.training.setup.plan import TrainingPlan


def load_decoder(models: Sequence[DecoderModel], plan: TrainingPlan) -> LoadedDecoder | None:
    """Load the GPT of --load-gpt into the model's decoder; None without --load-gpt.

    Raises:
        CheckpointError: see `retro_mcore.checkpoint.conversion.gpt.load_gpt`.
        TokenizerError: the project's documents end with a different token from the GPT's.
    """
    directory = plan.options.load_gpt
    if directory is None:
        return None
    loaded = load_gpt(models, directory, resolved_flags(plan.arguments), plan.used_vocab_size)
    project_dir, flags = plan.options.project_dir, loaded.checkpoint.flags
    with raise_together():
        note = check_document_tokens(flags, plan.document_tokens, project_dir)
    notes = (*loaded.notes, *bos_notes(directory, project_dir), *([note] if note else []))
    return replace(loaded, notes=notes)


def bos_notes(directory: str, project_dir: str) -> list[str]:
    """Compare BOS in a project's documents with the GPT's own tokenizer, on all ranks."""
    with raise_together():
        habit = None
        with suppress(TokenizerError):  # the project's tokenizer is used
            path = Path(directory)
            habit = gguf_bos_habit(path) if is_gguf(path) else bos_habit(path)
        adds_bos = ProjectSettings.load(project_dir).add_bos
    if habit is None or habit == adds_bos:
        return []
    begins = "begin with BOS" if adds_bos else "do not begin with BOS"
    return [
        f"warning: documents of {project_dir} {begins}, and the tokenizer of {directory} "
        f"{'adds it' if habit else 'adds none'}: see preprocess_corpus --add-bos-token"
    ]


def gpt_arguments(
    arguments: ModelArguments, options: TrainingOptions, used_vocab_size: int
) -> ModelArguments:
    """Complete a model's arguments from the GPT of --load-gpt: all rows of its vocabulary, and the
    window of its layers.

    Unchanged without --load-gpt, or if the run resumes from its own checkpoint.

    Raises:
        CheckpointError: it cannot be read, is not a GPT, or contradicts the arguments. Names all
            such flags.
    """
    checkpoint = _gpt_to_load(options)
    if checkpoint is None:
        return arguments
    windows: dict[str, Any] = {
        name: getattr(arguments, name) or checkpoint.flags.get(name)
        for name in ("sliding_window", "window_attn_skip_freq")
    }
    taken = replace(arguments, **windows)
    positions = arguments.max_position_embeddings or arguments.seq_length
    with suppress(ConfigurationError):  # reported below with everything else
        positions = number_of_positions(arguments)
    wanted = _resolved_flags(arguments, positions)
    check_all(
        partial(number_of_positions, arguments),
        partial(check_gpt, checkpoint, wanted, used_vocab_size, options.load_gpt),
    )
    rows = padded_vocab_size(
        checkpoint.flags["padded_vocab_size"],
        options.make_vocab_size_divisible_by,
        options.tensor_model_parallel_size,
    )
    return replace(taken, padded_vocab_size=max(rows, arguments.padded_vocab_size))


def _gpt_to_load(options: TrainingOptions) -> Checkpoint | None:
    resumes = options.load is not None and existing_checkpoint(options.load, options.ckpt_step)
    if options.load_gpt is None or resumes:
        return None
    return open_checkpoint(options.load_gpt, compare=False)


def resolved_flags(arguments: ModelArguments) -> dict[str, Any]:
    """The model's flags with resolved defaults, in the form that checkpoints use."""
    return _resolved_flags(arguments, number_of_positions(arguments))


def _resolved_flags(arguments: ModelArguments, positions: int) -> dict[str, Any]:
    heads = arguments.num_attention_heads
    return {
        **asdict(arguments),
        "num_query_groups": arguments.num_query_groups or heads,
        "kv_channels": arguments.kv_channels or arguments.hidden_size // heads,
        "ffn_hidden_size": default_ffn_hidden_size(arguments),
        "moe_ffn_hidden_size": expert_width(arguments),
        "max_position_embeddings": positions,
        # Only if other layers have no biases; otherwise these biases exist anyway.
        "add_qkv_bias": arguments.add_qkv_bias and arguments.disable_bias_linear,
    }
