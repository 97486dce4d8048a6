"""Retro-fitting: a Retro model's decoder from a GPT checkpoint (Borgeaud et al. 2022, section 4.2;
InstructRetro's continued pretraining)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from retro_mcore.checkpoint.conversion.architecture import check_decoder
from retro_mcore.checkpoint.conversion.formats import Checkpoint, open_checkpoint
from retro_mcore.checkpoint.conversion.model_weights import put_weights
from retro_mcore.distributed import raise_together
from retro_mcore.errors import CheckpointError, check_all
from retro_mcore.model.decoder_model import DecoderModel

# Retrieval's own parameters, which a GPT does not have.
_FRESH = (r"^neighbor_encoder\.", r"\.cross_attention\.", r"\.pre_cross_attn_layernorm\.")
# More rows than this beyond the tokenizer's vocabulary are no padding (128 x TP 8 pads by 1,023).
_LARGEST_PADDING = 2048


@dataclass(frozen=True)
class LoadedDecoder:
    """The result of loading a decoder.

    Attributes:
        checkpoint: Where from.
        taken: Weights of the decoder that came across: all of them.
        fresh: Names of retrieval's own parameters, which keep their initial values.
        notes: Remarks for the user.
    """

    checkpoint: Checkpoint
    taken: int
    fresh: list[str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        path, source = self.checkpoint.path, self.checkpoint.source
        text = f"decoder from {path} ({source}): all {self.taken} weights taken"
        text += f", {len(self.fresh)} of retrieval start fresh" if self.fresh else ""
        return "; ".join((text, *self.checkpoint.notes, *self.notes))


def load_gpt(
    models: Sequence[DecoderModel], directory: str, wanted: Mapping[str, Any], vocab_size: int
) -> LoadedDecoder:
    """Take every weight of a GPT's decoder; retrieval's own parameters stay as they are.

    All ranks call it together; each reads what it needs. No optimizer state is taken.

    Args:
        models: This rank's stages of a RetroModel, or of its GPT twin.
        directory: A Megatron checkpoint (torch_dist, or one file per rank), a Hugging Face
            directory or a GGUF file.
        wanted: The model's flags, resolved (`architecture.DECODER_FLAGS` and seq_length).
        vocab_size: Rows that the tokenizer needs: its ids, except special ones at the end that
            nothing writes.

    Raises:
        CheckpointError: it cannot be read, is no GPT, contradicts the flags, or lacks a weight.
    """
    with raise_together():
        checkpoint = open_checkpoint(directory)
        check_gpt(checkpoint, wanted, vocab_size, directory)
    fresh = put_weights(
        models, checkpoint.weights, vocab_size, _FRESH, f"--load-gpt {directory}",
        "Give the flags of the checkpoint's own model",
    )  # fmt: skip
    notes = _vocabulary_notes(checkpoint, vocab_size)
    return LoadedDecoder(checkpoint, len(checkpoint.weights), fresh, notes)


def check_gpt(
    checkpoint: Checkpoint, wanted: Mapping[str, Any], vocab_size: int, source: object
) -> None:
    """Reject a checkpoint that a model cannot take its decoder from.

    Args:
        checkpoint: As --load-gpt names it.
        wanted: The model's flags, as for `load_gpt`.
        vocab_size: As for `load_gpt`.
        source: What the user named, for the error.

    Raises:
        CheckpointError: it is no GPT, or contradicts the flags or the project.
        SeveralErrors: more than one of these.
    """
    _check_is_gpt(checkpoint)
    check_all(
        partial(check_decoder, checkpoint.flags, wanted, source),
        partial(_check_rotary_limit, checkpoint, wanted),
        partial(_check_vocabulary, checkpoint, vocab_size),
    )


def _check_is_gpt(checkpoint: Checkpoint) -> None:
    if checkpoint.has_retrieval:
        raise CheckpointError(
            f"--load-gpt {checkpoint.path}",
            "is a Retro model already",
            "Continue it with --load, after convert_checkpoint.py if another program wrote it",
        )


def _check_rotary_limit(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> None:
    theirs = checkpoint.source in ("huggingface", "gguf")
    rope = theirs and wanted["position_embedding_type"] == "rope"
    limit = checkpoint.flags.get("max_position_embeddings") if rope else None
    if limit is not None and limit < wanted["seq_length"]:
        raise CheckpointError(
            f"--load-gpt {checkpoint.path}",
            f"rotates texts of more than {limit} tokens by other angles (dynamic or longrope), and "
            f"samples have {wanted['seq_length']}",
            "Build the project with shorter samples",
        )


def _check_vocabulary(checkpoint: Checkpoint, vocab_size: int) -> None:
    rows = checkpoint.flags["padded_vocab_size"]
    if rows < vocab_size:
        raise CheckpointError(
            f"--load-gpt {checkpoint.path}",
            f"has a vocabulary of {_named_vocabulary(checkpoint)} ({rows} rows), and the project's "
            f"tokenizer writes token ids up to {vocab_size - 1}",
            "Build the project with the tokenizer that the checkpoint was trained with, without "
            "tokens that were added to it later",
        )


def _vocabulary_notes(checkpoint: Checkpoint, vocab_size: int) -> tuple[str, ...]:
    """Rows that are no padding: the model may have spare ones, or be another tokenizer's."""
    named = _named_vocabulary(checkpoint)
    if named - vocab_size <= _LARGEST_PADDING:
        return ()
    return (
        f"warning: {named - vocab_size} of its {named} embedding rows have no token in the "
        f"project's tokenizer ({vocab_size}), which must be the checkpoint's own",
    )


def _named_vocabulary(checkpoint: Checkpoint) -> int:
    return int(checkpoint.flags.get("vocab_size") or checkpoint.flags["padded_vocab_size"])
