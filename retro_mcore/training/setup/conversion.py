"""Convert a checkpoint: complete and check the model options, and write the weights.

`retro_mcore.checkpoint.conversion` defines formats and names.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.conversion.architecture import flags_of_weights
from retro_mcore.checkpoint.conversion.formats import Checkpoint, open_checkpoint
from retro_mcore.checkpoint.conversion.model_fields import (
    DECODER_FLAGS,
    END_TOKENS,
    MODEL_FIELDS,
    Flags,
    Target,
)
from retro_mcore.checkpoint.conversion.targets import (
    check_origin,
    check_window,
    megatron_arguments,
    notes_on_target,
    write_checkpoint,
)
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.errors import CheckpointError
from retro_mcore.model.expert_options import EXPERT_OPTIONS
from retro_mcore.model.options import changed_defaults
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.lock import directory_lock
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.loop.sample_reader import (
    DOCUMENT_TOKENS,
    document_tokens,
    tokenizer_fingerprint,
)
from retro_mcore.training.setup.huggingface_export import HuggingFaceOptions, write_huggingface
from retro_mcore.training.setup.retrofit import bos_notes
from retro_mcore.training.setup.saved_arguments import complete_arguments


@dataclass
class Conversion:
    """The result of a conversion.

    Attributes:
        source: Format of the original.
        path: The checkpoint that was written.
        num_parameters: Parameters of the whole model.
        flags: Options of the model, and facts about its checkpoint.
        notes: Notes for the user.
    """

    source: str
    path: Path
    num_parameters: int
    flags: Flags
    notes: tuple[str, ...] = ()


def convert(
    load: str,
    save: str,
    target: Target,
    given: Flags,
    *,
    origin_given: bool = False,
    tensor_parallel_size: int = 1,
    project_dir: str | None = None,
    huggingface: HuggingFaceOptions | None = None,
) -> Conversion:
    """Write a checkpoint of any known format in another one.

    Args:
        load: Directory of the original.
        save: Directory to write to.
        target: Format to write.
        given: Flags from the user, which override the checkpoint's.
        origin_given: Whether the user named the origin, and so accepts different numerics.
        tensor_parallel_size: Number of files to write, in formats with one file per rank.
        project_dir: Project whose documents are compared with the model's.
        huggingface: How to write for transformers; None: the defaults.

    Raises:
        CheckpointError: the original cannot be read, does not state enough about its model, or
            there is a checkpoint in `save`.
        ProjectError: another run writes into `save`.
        ConfigurationError: the target would compute something else.
    """
    checkpoint = open_checkpoint(load)
    flags = {**checkpoint.flags, **given}
    if origin_given and flags["retro_origin"] != checkpoint.flags.get("retro_origin"):
        flags = {**flags, **changed_defaults(flags["retro_origin"]), **given}
    _check_vocabulary(load, flags, given, project_dir)
    check_window(target, flags)
    arguments = complete_arguments(flags, load)
    # Keep resolved sizes, because Megatron's arguments have no defaults for them.
    flags |= {name: value for name, value in arguments.items() if value is not None}
    check_origin(target, flags, origin_given)
    dtype = next(iter(checkpoint.weights.values())).dtype
    flags |= {"bf16": str(dtype) == "torch.bfloat16", "fp16": str(dtype) == "torch.float16"}
    notes = [
        *checkpoint.notes,
        *_notes_on_defaults(checkpoint, flags, given),
        *notes_on_target(target, flags),
    ]
    with directory_lock(Path(save), "convert_checkpoint"):
        if target == "huggingface":
            how = huggingface or HuggingFaceOptions()
            path = Path(save)
            notes += write_huggingface(path, checkpoint, flags, how, project_dir)
        else:
            path = _write(Path(save), target, checkpoint, flags, arguments, tensor_parallel_size)
    number = sum(weight.numel for weight in checkpoint.weights.values())
    if project_dir is not None:
        notes += bos_notes(load, project_dir)
    return Conversion(checkpoint.source, path, number, flags, tuple(notes))


def _notes_on_defaults(checkpoint: Checkpoint, flags: Flags, given: Flags) -> list[str]:
    """A note on options that a checkpoint without arguments leaves open."""
    states_all = checkpoint.source in ("huggingface", "gguf")
    if states_all or vars(checkpoint.common.get("args") or Namespace()):
        return []
    shown = {*flags_of_weights(checkpoint.weights), *given, *EXPERT_OPTIONS}
    assumed = [
        f"{name} {flags[name]}"
        for name in DECODER_FLAGS
        if name not in shown and not MODEL_FIELDS[name].ours_alone and flags.get(name) is not None
    ]
    if not {"swiglu", "geglu", "openai_gelu", "squared_relu"} & given.keys():
        assumed.append("the activation SiLU" if flags["swiglu"] else "the activation GELU")
    if not assumed:
        return []
    return [f"no arguments are recorded: took {', '.join(assumed)} (else give --model-config)"]


def _write(
    directory: Path,
    target: Target,
    checkpoint: Checkpoint,
    flags: Flags,
    arguments: Flags,
    tensor_parallel_size: int,
) -> Path:
    """Write a checkpoint of ours or Megatron's."""
    args = megatron_arguments(flags, tensor_parallel_size)
    if target == "retro-mcore":
        args = Namespace(**_our_arguments(flags, arguments))
    iteration = checkpoint.common.get("iteration")
    return write_checkpoint(
        directory,
        target,
        args=args,
        flags=flags,
        weights=checkpoint.weights,
        tensor_parallel_size=tensor_parallel_size,
        iteration=iteration if isinstance(iteration, int) else 0,  # "release", or none
    )


def flags_of_project(directory: str) -> Flags:
    """Flags that a project fixes for the models trained on it.

    Raises:
        ProjectError: it is not a project directory.
        TokenizerError: its tokenizer cannot be loaded.
    """
    project = ProjectConfig.load(directory)
    tokenizer = load_project_tokenizer(project, ProjectPaths(directory))
    return {
        "seq_length": project.retro_gpt_seq_length,
        "retro_chunk_length": project.retro_gpt_chunk_length,
        "tokenizer_type": project.retro_gpt_tokenizer_type,
        "tokenizer_fingerprint": tokenizer_fingerprint(project, directory),
        "vocab_size": tokenizer.vocab_size,
        DOCUMENT_TOKENS: document_tokens(tokenizer),
    }


def _check_vocabulary(load: str, flags: Flags, given: Flags, project_dir: str | None) -> None:
    """Reject a vocabulary with token ids that the model has no embedding for."""
    rows, needed, source = flags["padded_vocab_size"], given.get("vocab_size", 0), "--vocab-size"
    if project_dir is not None:
        project = ProjectConfig.load(project_dir)
        needed = load_project_tokenizer(project, ProjectPaths(project_dir)).used_vocab_size
        source = f"the tokenizer of {project_dir}"
    if rows < needed:
        raise CheckpointError(
            load,
            f"has {rows} embedding rows, and {source} needs {needed}",
            "Give the tokenizer that the model was trained with, without tokens added later",
        )


def _our_arguments(flags: Flags, arguments: Flags) -> dict[str, Any]:
    """Arguments in the form that our trainer saves."""
    tokens = {name: flags[name] for name in (DOCUMENT_TOKENS, END_TOKENS) if name in flags}
    return {
        **arguments,
        **tokens,
        "seed": flags.get("seed", 1234),
        "bf16": flags["bf16"],
        "fp16": flags["fp16"],
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
