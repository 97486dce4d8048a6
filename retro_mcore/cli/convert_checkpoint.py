"""`convert_checkpoint`: checkpoints of other implementations into ours, and back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_mcore import distributed
from retro_mcore.checkpoint.conversion.model_fields import Target
from retro_mcore.cli.command import run_command
from retro_mcore.cli.flag_sources import read_yaml
from retro_mcore.cli.output import print_summary
from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.model.options import Origin
from retro_mcore.platform import setup_device

if TYPE_CHECKING:
    from retro_mcore.training.setup.conversion import Conversion


@dataclass(kw_only=True)
class ConvertCheckpointOptions:
    """Convert the weights of a Retro or GPT checkpoint, in one process and without a GPU.

    The format of --load is recognised: ours, Megatron's torch_dist or one file per rank (with the
    names of Megatron-Core or of InstructRetro), a Hugging Face directory, or a GGUF file (Llama
    family), which is dequantized.
    A setting that changes what the model computes is kept, or refused by name.
    """

    load: str
    """Directory of the checkpoint: with its tracker file, or of a single checkpoint. Or a .gguf
    file."""
    save: str
    """Directory to write to; it must not hold a checkpoint."""
    target: Target = "retro-mcore"
    """retro-mcore: ours. megatron: torch_dist of megatron-core up to 0.15. megatron-torch: one file
    per rank, of its names. instructretro: one file per rank, of InstructRetro's names.
    huggingface: a directory for transformers, with its own code (trust_remote_code=True)."""
    decoder_only: bool = False
    """With --target huggingface: leave retrieval out, and write the decoder as a model of the
    family that computes it: GPT-2, Llama, Mistral, Qwen 2 or 3, StableLM, GPT-NeoX."""
    max_shard_size: str = "5GB"
    """With --target huggingface: largest file of weights."""
    target_tensor_parallel_size: int = 1
    """Files to write, with megatron-torch and instructretro."""
    project_dir: str | None = None
    """Project directory that gives chunk length, sequence length and tokenizer."""
    retro_chunk_length: int | None = None
    """Tokens per chunk, if the checkpoint does not state it (InstructRetro's do not)."""
    vocab_size: int | None = None
    """Size of the tokenizer's vocabulary, if the checkpoint does not state it."""
    retro_origin: Origin | None = None
    """Implementation that the model was trained with. Default: by the names of its weights."""
    model_config: str | None = None
    """YAML file of model options, as for pretrain_retro's --config; they win over the
    checkpoint's."""


def convert_checkpoint(options: ConvertCheckpointOptions) -> Conversion:
    """Convert a checkpoint.

    Raises:
        CheckpointError: it cannot be read or does not state enough, or --save holds one.
        ConfigurationError: an option is wrong, or the target would compute something else.
    """
    setup_device("cpu")
    distributed.initialize()
    from retro_mcore.checkpoint.conversion.targets import check_number_of_files
    from retro_mcore.training.setup.conversion import convert
    from retro_mcore.training.setup.huggingface_export import HuggingFaceOptions

    check_number_of_files(options.target, options.target_tensor_parallel_size)
    _check_huggingface(options)
    result = convert(
        options.load,
        options.save,
        options.target,
        _given_flags(options),
        origin_given=options.retro_origin is not None,
        tensor_parallel_size=options.target_tensor_parallel_size,
        project_dir=options.project_dir,
        huggingface=HuggingFaceOptions(options.decoder_only, options.max_shard_size),
    )
    _summarize(options, result)
    return result


def _check_huggingface(options: ConvertCheckpointOptions) -> None:
    """Reject options of transformers' directories with another target."""
    default = ConvertCheckpointOptions(load="", save="")
    for name in ("decoder_only", "max_shard_size"):
        given = getattr(options, name)
        if options.target != "huggingface" and given != getattr(default, name):
            raise ConfigurationError(
                flag_of(name), f"given with --target {options.target}", "Add --target huggingface"
            )


def _given_flags(options: ConvertCheckpointOptions) -> dict[str, Any]:
    """The options of the model that were given."""
    from retro_mcore.checkpoint.conversion.model_file import flags_of_file
    from retro_mcore.training.setup.conversion import flags_of_project

    flags: dict[str, Any] = {}
    if options.project_dir is not None:
        flags |= flags_of_project(options.project_dir)
    if options.model_config is not None:
        path = Path(options.model_config)
        flags |= flags_of_file(f"--model-config {path}", read_yaml("--model-config", path))
    for name in ("retro_chunk_length", "vocab_size", "retro_origin"):
        if getattr(options, name) is not None:
            flags[name] = getattr(options, name)
    return flags


def _summarize(options: ConvertCheckpointOptions, result: Conversion) -> None:
    flags = result.flags
    kind = "GPT" if flags["no_retrieval"] else "Retro"
    rows: dict[str, object] = {
        "from": f"{options.load} ({result.source})",
        "model": f"{kind}, {flags['num_layers']} layers of {flags['hidden_size']}",
        "parameters": f"{result.num_parameters:,}",
    }
    if not flags["no_retrieval"]:
        rows["computes as"] = flags.get("retro_origin") or "the paper"
    if flags.get("sliding_window") is not None:
        layers = flags.get("window_attn_skip_freq")
        where = "all layers" if layers is None else f"layers by window_attn_skip_freq {layers}"
        rows["sliding window"] = f"{flags['sliding_window']} tokens, in {where}"
    for number, note in enumerate(result.notes, start=1):
        rows[f"note {number}"] = note
    print_summary("convert_checkpoint", {**rows, "written": result.path})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(ConvertCheckpointOptions, convert_checkpoint, argv)


if __name__ == "__main__":
    sys.exit(main())
