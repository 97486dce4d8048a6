"""`convert_checkpoint`: checkpoints of other implementations into ours, and back."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from retro_mcore import distributed
from retro_mcore.cli.command import print_summary, run_command
from retro_mcore.cli.flags import read_yaml
from retro_mcore.errors import ConfigurationError, raise_problems
from retro_mcore.platform import setup_device
from retro_mcore.project.config import ProjectConfig

if TYPE_CHECKING:
    from retro_mcore.training.setup.build import ModelArguments


@dataclass(kw_only=True)
class ConvertCheckpointOptions:
    """Convert a Retro or GPT checkpoint; weights only, from one process, without a GPU.

    What --load holds is recognised: ours, Megatron's torch_dist or one file per rank (of
    Megatron-Core's names, or of InstructRetro's), a Hugging Face directory (GPT-2, Llama family).
    A setting that changes what the model computes is kept, or refused by name.
    """

    load: str
    """Directory of the checkpoint: with its tracker file, or a single checkpoint in it."""
    save: str
    """Directory to write to; it must hold no checkpoint."""
    target: Literal["retro-mcore", "megatron", "megatron-torch", "instructretro"] = "retro-mcore"
    """retro-mcore: ours. megatron: torch_dist of megatron-core up to 0.15. megatron-torch: one file
    per rank, of its names. instructretro: one file per rank, of InstructRetro's names."""
    target_tensor_parallel_size: int = 1
    """Files to write, with megatron-torch and instructretro."""
    project_dir: str | None = None
    """Project directory to take chunk length, sequence length and tokenizer from."""
    retro_chunk_length: int | None = None
    """Tokens per chunk, where the checkpoint does not say (InstructRetro's do not)."""
    vocab_size: int | None = None
    """The tokenizer's vocabulary, where the checkpoint does not say."""
    retro_origin: Literal["mcore-0.15", "mcore-0.5", "legacy"] | None = None
    """Which implementation the model was trained with. Default: by the names of its weights."""
    model_config: str | None = None
    """YAML file of model options, as pretrain_retro's --config takes them; they win over what the
    checkpoint says."""


@dataclass
class Conversion:
    """What was converted.

    Attributes:
        source: The format that was found.
        path: The checkpoint that was written.
        num_parameters: Of the whole model.
        flags: What the checkpoint says of its model.
        notes: What its owner may want to know of it.
    """

    source: str
    path: Path
    num_parameters: int
    flags: dict[str, Any]
    notes: tuple[str, ...] = ()


def convert_checkpoint(options: ConvertCheckpointOptions) -> Conversion:
    """Convert a checkpoint.

    Raises:
        CheckpointError: it cannot be read, does not say enough of its model, or --save holds one.
        ConfigurationError: an option is wrong, or the target would compute something else.
    """
    setup_device("cpu")
    distributed.initialize()
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint
    from retro_mcore.checkpoint.conversion.targets import (
        check_origin,
        check_window,
        megatron_arguments,
        write_checkpoint,
    )
    from retro_mcore.training.setup.retrofit import bos_notes

    _check(options)
    checkpoint = open_checkpoint(options.load)
    given = _given_flags(options)
    flags = {**checkpoint.flags, **given}
    if options.target == "retro-mcore" and "seq_length" not in given:
        flags |= _within_window(flags)
    check_window(options.target, flags)
    arguments = _model_arguments(flags, options.load)
    # Sizes stay worked out for Megatron's arguments, which have no defaults.
    flags |= {name: value for name, value in arguments.items() if value is not None}
    size = options.target_tensor_parallel_size
    check_origin(options.target, flags, options.retro_origin is not None)
    dtype = next(iter(checkpoint.weights.values())).dtype
    flags |= {"bf16": str(dtype) == "torch.bfloat16", "fp16": str(dtype) == "torch.float16"}
    args = megatron_arguments(flags, size)
    if options.target == "retro-mcore":
        args = Namespace(**_our_arguments(flags, arguments))
    iteration = checkpoint.common.get("iteration")
    if not isinstance(iteration, int):  # "release", or none
        iteration = 0
    path = write_checkpoint(
        Path(options.save), options.target, args, flags, checkpoint.weights, size, iteration
    )
    number = sum(weight.numel for weight in checkpoint.weights.values())
    notes = [*checkpoint.notes]
    if options.project_dir is not None:
        notes += bos_notes(options.load, options.project_dir)
    result = Conversion(checkpoint.source, path, number, flags, tuple(notes))
    _summarize(options, result)
    return result


def _check(options: ConvertCheckpointOptions) -> None:
    size, target = options.target_tensor_parallel_size, options.target
    one_file = target in ("retro-mcore", "megatron")
    if size < 1 or (one_file and size > 1):
        raise ConfigurationError(
            "--target-tensor-parallel-size",
            f"{size} with --target {target}",
            "torch_dist checkpoints load into any layout: leave it out"
            if one_file
            else "1 or more",
        )


def _given_flags(options: ConvertCheckpointOptions) -> dict[str, Any]:
    """What the options say of the model."""
    flags: dict[str, Any] = {}
    if options.project_dir is not None:
        flags |= _project_flags(options.project_dir)
    if options.model_config is not None:
        flags |= _file_flags(Path(options.model_config))
    for name in ("retro_chunk_length", "vocab_size", "retro_origin"):
        if getattr(options, name) is not None:
            flags[name] = getattr(options, name)
    return flags


def _within_window(flags: dict[str, Any]) -> dict[str, Any]:
    """The longest texts of a model with a sliding window: those that fit it."""
    window, length = flags.get("sliding_window"), flags.get("seq_length")
    return {"seq_length": window} if window and length and length > window else {}


def _project_flags(directory: str) -> dict[str, Any]:
    from retro_mcore.data.tokenizers.loading import load_project_tokenizer
    from retro_mcore.project.paths import ProjectPaths
    from retro_mcore.training.loop.sample_reader import (
        DOCUMENT_TOKENS,
        document_tokens,
        tokenizer_fingerprint,
    )

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


def _file_flags(path: Path) -> dict[str, Any]:
    from retro_mcore.training.setup.build import ModelArguments

    values = read_yaml("--model-config", path)
    unknown = values.keys() - {field.name for field in fields(ModelArguments)}
    if unknown:
        raise ConfigurationError(
            f"--model-config {path}",
            f"holds what is no option of a model: {', '.join(sorted(unknown))}",
            "See the options of the model in pretrain_retro --help",
        )
    kinds = get_type_hints(ModelArguments)
    wrong = [
        ConfigurationError(f"--model-config {path}", f"{name} {value!r}", f"Expected {kinds[name]}")
        for name, value in values.items()
        if not _fits(kinds[name], value)
    ]
    raise_problems(wrong)
    return {name: _whole(kinds[name], value) for name, value in values.items()}


def _fits(kind: Any, value: object) -> bool:
    """Whether a value of a YAML file is of an option's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(get_args(kind)[0], each) for each in value)
    if get_args(kind):
        return any(_fits(each, value) for each in get_args(kind))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is int and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)


def _whole(kind: Any, value: Any) -> Any:
    """500000 for 500000.0, where the option is a whole number."""
    whole = float not in (kind, *get_args(kind)) and isinstance(value, float)
    return int(value) if whole else value


# Sizes that a wrong default would silently change.
_NEEDED = ("num_attention_heads", "seq_length", "norm_epsilon")
_NEEDED_BY_ROTARY = ("rotary_percent",)
_NEEDED_BY_RETRO = ("retro_chunk_length", "retro_num_neighbors", "retro_num_retrieved_chunks")


def _model_arguments(flags: dict[str, Any], load: str) -> dict[str, Any]:
    """All arguments of the model; defaults only for what does not change what it computes."""
    from retro_mcore.errors import CheckpointError
    from retro_mcore.training.setup.build import ModelArguments

    needed = list(_NEEDED)
    needed += _NEEDED_BY_ROTARY if flags["position_embedding_type"] == "rope" else ()
    needed += () if flags["no_retrieval"] else _NEEDED_BY_RETRO
    missing = [name for name in needed if flags.get(name) is None]
    if missing:
        raise CheckpointError(
            load,
            f"does not say {', '.join(missing)}",
            "Give them in a YAML file: --model-config FILE (or --project-dir)",
        )
    values: dict[str, Any] = {
        "retro_chunk_length": 64,  # of a GPT: not used
        "vocab_size": flags["padded_vocab_size"],
        "tokenizer_type": "unknown",
        "tokenizer_fingerprint": "",
        **flags,
    }
    arguments: dict[str, Any] = {}
    for field in fields(ModelArguments):
        if field.name in values:
            arguments[field.name] = values[field.name]
        elif field.default is not MISSING:
            arguments[field.name] = field.default
    return asdict(_as_trained(ModelArguments(**arguments)))


def _as_trained(arguments: ModelArguments) -> ModelArguments:
    """Sizes that are the defaults as defaults: so a run with the usual flags takes the model up."""
    from retro_mcore.training.setup.build import default_ffn_hidden_size, number_of_positions

    heads = arguments.num_attention_heads
    usual = {
        "num_query_groups": heads,
        "kv_channels": arguments.hidden_size // heads,
        "ffn_hidden_size": default_ffn_hidden_size(replace(arguments, ffn_hidden_size=None)),
    }
    left_out: dict[str, Any] = {
        name: None for name, size in usual.items() if getattr(arguments, name) == size
    }
    positions = arguments.max_position_embeddings or number_of_positions(arguments)
    return replace(arguments, **left_out, max_position_embeddings=positions)


def _our_arguments(flags: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """As our trainer saves them."""
    from retro_mcore.training.loop.sample_reader import DOCUMENT_TOKENS

    told = {DOCUMENT_TOKENS: flags[DOCUMENT_TOKENS]} if DOCUMENT_TOKENS in flags else {}
    return {
        **arguments,
        **told,
        "seed": flags.get("seed", 1234),
        "bf16": flags["bf16"],
        "fp16": flags["fp16"],
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


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
        rows["sliding window"] = f"{flags['sliding_window']} tokens; longer texts are refused"
    for number, note in enumerate(result.notes, start=1):
        rows[f"note {number}"] = note
    print_summary("convert_checkpoint", {**rows, "written": result.path})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(ConvertCheckpointOptions, convert_checkpoint, argv)


if __name__ == "__main__":
    sys.exit(main())
