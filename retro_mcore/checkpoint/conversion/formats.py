"""Checkpoints on disk, of any format that is read here: what they are, and their weights.

retro-mcore     ours, in Megatron's torch_dist format
megatron        Megatron-Core's names: torch_dist, or one file per rank
instructretro   the names before Megatron-Core: one file per rank
huggingface     a directory of a GPT (huggingface_families), or of RetroForCausalLM
gguf            a file of llama.cpp, of the Llama family
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from retro_mcore.checkpoint.arguments import is_own
from retro_mcore.checkpoint.checksums import verify_checkpoint
from retro_mcore.checkpoint.contents import is_torch_dist
from retro_mcore.checkpoint.conversion.architecture import flags_of_arguments, flags_of_weights
from retro_mcore.checkpoint.conversion.gguf_model import read_gguf
from retro_mcore.checkpoint.conversion.huggingface import is_huggingface, read_huggingface
from retro_mcore.checkpoint.conversion.model_fields import MODEL_FIELDS, OURS_ALONE, Flags
from retro_mcore.checkpoint.conversion.names import from_upstream_name, local_name
from retro_mcore.checkpoint.conversion.retro_huggingface import is_retro, read_retro_huggingface
from retro_mcore.checkpoint.conversion.weights import Weight
from retro_mcore.checkpoint.torch_dist import read_torch_dist
from retro_mcore.checkpoint.torch_format import is_torch_format, read_torch_format
from retro_mcore.checkpoint.tracker import tracked_checkpoint
from retro_mcore.errors import CheckpointError
from retro_mcore.gguf_file import is_gguf

Source = Literal["retro-mcore", "megatron", "instructretro", "huggingface", "gguf"]

_UPSTREAM_ENCODER = re.compile(r"^decoder\.layers\.(\d+)\.cross_attention\.encoder\.")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, its weights still unread.

    Attributes:
        path: The directory that holds its files, or its only file.
        source: Whose format and names it has.
        flags: Options of its model, as far as they are known, by the names of our flags.
        weights: By our names, as an unsharded model with local layers has them.
        common: Arguments and counters, as they were saved.
        notes: Remarks for the user.
        has_other_names: Whether it is a Retro with other names than ours, of other origin.
    """

    path: Path
    source: Source
    flags: Flags
    weights: dict[str, Weight]
    common: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    has_other_names: bool = False

    @property
    def has_retrieval(self) -> bool:
        """Whether it is a Retro model."""
        return not self.flags["no_retrieval"]


def open_checkpoint(directory: str | Path, compare: bool = True) -> Checkpoint:
    """Look at a checkpoint; its weights are read when they are wanted.

    All ranks call it, inside `raise_together`: each compares a share of the files with their
    checksums.

    Args:
        directory: With a tracker file, its latest checkpoint is taken; else itself. Or a GGUF file.
        compare: Whether to; not where the weights are left alone.

    Raises:
        CheckpointError: there is none, it is damaged, of an unknown format, or holds more than
            plain data.
    """
    path = latest_checkpoint(Path(directory))
    if path.is_file():
        flags, weights, notes = read_gguf(path)
        flags = {**OURS_ALONE, **flags_of_weights(weights), **flags}
        return Checkpoint(path, "gguf", flags, weights, notes=notes)
    if is_torch_dist(path):
        common, weights = read_torch_dist(path)
        older = False
    elif is_torch_format(path):
        common, weights, older = read_torch_format(path)
    elif is_huggingface(path):
        read = read_retro_huggingface if is_retro(path) else read_huggingface
        flags, weights, notes = read(path)
        flags = {**OURS_ALONE, **flags_of_weights(weights), **flags}
        return Checkpoint(path, "huggingface", flags, weights, notes=notes)
    else:
        raise CheckpointError(
            directory,
            "is not a known kind of checkpoint",
            _known_kinds(path),
        )
    if compare:
        verify_checkpoint(path)
    args = common.get("args") or Namespace()
    ours = is_own(vars(args))
    # Our model, whoever trained it: Megatron-LM does, with our providers.
    our_model = not older and any(name.startswith("neighbor_encoder.") for name in weights)
    if not older:
        weights = _our_names(weights)
    of_arguments = flags_of_arguments(args, path)
    no_window = {"sliding_window": None, "window_attn_skip_freq": None}
    flags = {**OURS_ALONE, **no_window, **of_arguments, **flags_of_weights(weights)}
    flags["swiglu"] = flags["swiglu"] and not flags["geglu"]  # the weights show a gate alone
    source: Source = "retro-mcore" if ours else "instructretro" if older else "megatron"
    if not ours and not flags["no_retrieval"]:
        theirs = _origin(source, weights)
        flags["retro_origin"] = getattr(args, "retro_origin", None) if our_model else theirs
    upstreams = source != "retro-mcore" and not our_model and not flags["no_retrieval"]
    notes = _drop_unread(flags) if upstreams and source == "megatron" else []
    return Checkpoint(path, source, flags, weights, common, notes, upstreams)


def _drop_unread(flags: Flags) -> list[str]:
    """Replace arguments that Megatron-core's Retro accepts but does not read by the value that it
    computes with; returns a note for each."""
    notes = []
    for name, option in MODEL_FIELDS.items():
        # (Of the decoder's options, the weights decide.)
        unread = option.form == "same" and "megatron-retro" not in option.computed_by
        if unread and option.gpt is None and flags.get(name, option.absent) != option.absent:
            notes.append(
                f"its {name} {flags[name]} is left out: Megatron-core's Retro computes with "
                f"{option.absent:g}"
            )
            flags[name] = option.absent
    return notes


def _known_kinds(directory: Path) -> str:
    if files := sorted(directory.glob("*.gguf")):
        return f"Name the GGUF file itself: {files[0]}"
    return (
        "Name a directory of a Megatron checkpoint (torch_dist, or mp_rank_* files) or of a "
        "Hugging Face model (config.json and *.safetensors), or a GGUF file"
    )


def latest_checkpoint(path: Path) -> Path:
    """The checkpoint that a directory's tracker file names; else the directory or GGUF file itself.

    Raises:
        CheckpointError: the path does not exist, is another kind of file, or its tracker file is
            malformed.
    """
    if is_gguf(path) and path.is_file():
        return path
    if not path.is_dir():
        kind = "file" if is_gguf(path) else "directory"
        raise CheckpointError(path, f"no such {kind}", "Name a checkpoint's directory")
    return tracked_checkpoint(path) or path


def _our_names(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    found = (match for name in weights if (match := _UPSTREAM_ENCODER.match(name)))
    match = next(found, None)
    first = int(match[1]) + 1 if match else 0
    return {local_name(from_upstream_name(name, first)): w for name, w in weights.items()}


def _origin(source: Source, weights: Mapping[str, Weight]) -> str:
    if source == "instructretro":
        return "legacy"
    return "mcore-0.5" if "decoder.final_layernorm.weight" in weights else "mcore-0.15"
