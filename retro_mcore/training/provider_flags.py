"""Retro's flags in Megatron-LM's parser, and checks of Megatron-LM's own flags.

The parser gets every option of our model that it lacks (`provider_options` passes them on). A
Megatron-LM flag that would change the model or its data is honored or refused by name. Unknown
flags are refused too, because new releases add flags. Releases differ in their arguments, so these
are read with a default.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from retro_mcore.checkpoint.conversion.architecture import LACKED
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.errors import ConfigurationError, RetroError, check_all, flag_of, raise_problems
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.expert_options import EXPERT_OPTIONS
from retro_mcore.model.family_options import FamilyOptions
from retro_mcore.model.option_traits import model_traits, names_there, out_of_range, stated
from retro_mcore.model.options import (
    DecoderOptions,
    ModelOptions,
    RetroOptions,
    problems_of_activations,
)
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.loop.sample_reader import document_tokens, tokenizer_fingerprint
from retro_mcore.training.options.model_sizes import padded_vocab_size
from retro_mcore.training.options.noise import NeighborNoiseOptions
from retro_mcore.training.options.pretrain import DataOptions
from retro_mcore.training.setup.model_config import naming_flags

#: Megatron-LM's arguments that the project fixes, and the project's keys for them.
FIXED: dict[str, str] = {
    name: key for name, key in stated("project", DataOptions).items() if name != "tokenizer_type"
}
#: Needs no files, since Megatron-LM's trainer only needs the tokenizer's vocabulary size.
_TOKENIZER = "NullTokenizer"

_OFF = (None, False, 0)
_OTHER_MODEL = "Leave it out: Retro's layers and its GPT's do not have it"
_OTHER_DATA = "Leave it out: the project's samples are read, as their neighbors were searched"
_ELSEWHERE = "Leave it out, or use tools/pretrain_retro.py"

#: Refused arguments, with the values that have no effect, and a hint.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    **{name: ((*_OFF, *neutral), _OTHER_MODEL) for name, neutral in LACKED.items()},
    **dict.fromkeys(
        (
            *("qk_clip", "fp4", "use_kitchen_attention"),
            *("kitchen_config_file", "kitchen_recipe_number", "te_precision_config_file"),
            "use_legacy_models",
        ),
        (_OFF, _OTHER_MODEL),
    ),
    "position_embedding_type": ((None, "learned_absolute", "rope"), "Use one of these"),
    "no_rope_freq": (_OFF, "Give the numbers of the layers: --no-rope-layers"),
    "optimizer": (
        (None, "adam", "sgd"),
        f"{_ELSEWHERE}: Muon would split the encoder's projections at the decoder's heads here",
    ),
    "transformer_impl": ((None, "local", "transformer_engine"), "Use one of these"),
    "context_parallel_size": ((None, 1), "Use tools/pretrain_retro.py, which divides samples"),
    **dict.fromkeys(("num_experts", "num_moe_experts"), (_OFF, _ELSEWHERE)),
    "expert_model_parallel_size": ((None, 1), _ELSEWHERE),
    **dict.fromkeys(
        (
            *("data_path", "train_data_path", "valid_data_path", "test_data_path", "fim_data"),
            *("data_args_path", "per_split_data_args_path", "mock_data", "sft"),
            *("multiple_validation_sets", "phase_transition_iterations"),
            *("reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
            *("dataloader_inter_document_masking", "perform_rl_step"),
        ),
        (_OFF, _OTHER_DATA),
    ),
    "config_logger_dir": ((None, ""), "Leave it out: Retro's model does not log its inputs"),
    "vocab_extra_ids": (_OFF, "Leave it out: the vocabulary is the project's"),
    "pad_vocab_size": ((None, True), "Set --make-vocab-size-divisible-by 1"),
    "logits_load_dir": (_OFF, "Leave it out: the loss has no distillation"),
    "check_for_spiky_loss": (_OFF, "Leave it out: losses are only checked for being finite"),
    "full_validation": (_OFF, "Leave it out: Megatron-LM itself fails with these datasets"),
    "yaml_cfg": (_OFF, "Give flags: the file would overrule Retro's"),
    **{
        name: (_OFF, f"{_ELSEWHERE}: Megatron-LM would give all weights one learning rate")
        for name, traits in model_traits(ModelOptions).items()
        if traits.our_trainer
    },
}

_INTERLEAVED: dict[str, tuple[tuple[Any, ...], str]] = {
    # All boundaries of the interleaved schedule have one shape, which Megatron-LM's trainer sets.
    "virtual_pipeline_model_parallel_size": (
        (None, 1),
        "Leave out --num-virtual-stages-per-pipeline-rank and "
        "--num-layers-per-virtual-pipeline-stage, give --pipeline-model-parallel-layout one stage "
        "per rank, or use tools/pretrain_retro.py, which interleaves",
    ),
}
#: Arguments that Retro in a pipeline refuses, here and in Megatron-Bridge.
REFUSED_IN_PIPELINES: dict[str, tuple[tuple[Any, ...], str]] = {
    # Stages tell each other the shapes of what they send, which a graph cannot hold.
    "cuda_graph_impl": ((None, "none"), "Leave it out, or use one stage"),
    # Copies of the embedding are synchronized and summed as whole tensors.
    **dict.fromkeys(
        ("use_megatron_fsdp", "use_torch_fsdp2", "init_model_with_meta_device"),
        (_OFF, "Leave it out: --use-distributed-optimizer shards what an optimizer keeps"),
    ),
}

#: Fields of Megatron's configurations that do not change what the model computes, but for rounding.
_FREE = {
    *(
        "perform_initialization",
        "use_cpu_initialization",
        "init_model_with_meta_device",
        "fp16",
        "bf16",
    ),
    *("deterministic_mode", "tensor_model_parallel_size", "sequence_parallel"),
    *("fp32_residual_connection", "calculate_per_token_loss", "apply_query_key_layer_scaling"),
    *("attention_softmax_in_fp32", "disable_bf16_reduced_precision_matmul"),
    *("bias_activation_fusion", "moe_permute_fusion", "moe_router_fusion", "moe_grouped_gemm"),
    *(
        "moe_token_dispatcher_type",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion",
        "persist_layer_norm",
    ),
    *("gradient_accumulation_fusion", "distribute_saved_activations", "attention_backend"),
    *("barrier_with_L1_time", "test_mode", "transformer_impl"),
    *("use_te_activation_func", "use_te_rng_tracker", "use_transformer_engine_op_fuser"),
    *("defer_embedding_wgrad_compute", "wgrad_deferral_limit", "use_ring_exchange_p2p"),
    *("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
    *("log_max_attention_logit", "batch_invariant_mode", "cp_comm_type", "flash_decode"),
}
#: Families of such fields.
_FREE_FAMILIES = (
    *("tp_comm_", "pipeline_model_parallel_", "overlap_p2p_", "microbatch_group_size_"),
    *("num_layers_in_first_pipeline_", "num_layers_in_last_pipeline_"),
    *("account_for_", "cross_entropy_", "recompute_", "fp8", "cpu_offloading", "cuda_graph"),
    *("enable_cuda_graph", "external_cuda_graph", "inference_", "offload_"),
    *("nccl_", "symmetric_ar_", "flash_attention_", "activation_offload_"),
)
#: Fields that Retro's layers honor, or that are free.
_HONOURED = {
    *(set(names_there("config", DecoderOptions).values()) - set(EXPERT_OPTIONS)),
    *("num_query_groups", "ffn_hidden_size", "add_bias_linear"),
    *("window_size", "window_attn_skip_freq"),
    *_FREE,
}


def changed_fields(config: TransformerConfig, made: TransformerConfig) -> Iterator[str]:
    """Fields of the model in which a configuration differs from the one that its options make.

    Excludes fields that do not change what the model computes, such as precision and recomputation.
    """
    parallel = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    for field in dataclasses.fields(made):
        free = field.name in _FREE | parallel or field.name.startswith(_FREE_FAMILIES)
        now, value = getattr(config, field.name, None), getattr(made, field.name)
        initializes = field.name.endswith("init_method") and callable(value)  # a new one each time
        if not free and not initializes and now != value:
            yield field.name


#: Our window, which counts a position itself; Megatron's --window-size does not.
WINDOW = "sliding_window"
#: Options of the decoder that Megatron-LM's parser lacks.
OURS = frozenset(
    {name for name, traits in model_traits(DecoderOptions).items() if traits.ours_alone} | {WINDOW}
)

#: Flags given on the command line: flag and default, by the argument's name.
_given: dict[str, tuple[str, Any]] = {}


def is_given(name: str) -> bool:
    """Whether the command line has the flag of an argument."""
    return name in _given


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add Retro's flags: the options of our model that the parser lacks, and of neighbor noise."""
    group = parser.add_argument_group("retro")
    group.add_argument("--retro-project-dir", required=True, help="Project directory.")
    group.add_argument("--retro-add-retriever", action="store_true",
                       help="Retro; without it, the same GPT on the same samples.")  # fmt: skip
    group.add_argument("--retro-chunk-length", type=int, default=None,
                       help="Tokens per chunk. Fixed by the project.")  # fmt: skip
    traits = model_traits(ModelOptions)
    for options in (ModelOptions, NeighborNoiseOptions):
        for field, keywords in _flags_of(options):
            also = traits[field].also if field in traits and field != WINDOW else ()
            flags = [*map(flag_of, also), flag_of(field)]
            there = [parser._option_string_actions.get(flag) for flag in flags]
            if not any(action is not None and action.dest == field for action in there):
                group.add_argument(*flags, dest=field, **keywords)


def _flags_of(options: type) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields of a dataclass that Megatron-LM lacks, with the keywords of `add_argument`."""
    kinds, texts = typing.get_type_hints(options), _docstrings(options)
    for field in dataclasses.fields(options):
        if field.name in OURS or field.name.startswith("retro_"):
            keywords = _keywords(kinds[field.name])
            text = texts.get(field.name, "").replace("%", "%%")
            yield field.name, {**keywords, "default": field.default, "help": text}


def _keywords(kind: Any) -> dict[str, Any]:
    if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union:
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        return {"action": "store_true"}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is list:
        return {"nargs": "+", "type": typing.get_args(kind)[0]}
    return {"type": kind}


def _docstrings(options: type) -> dict[str, str]:
    """Docstrings of all fields, including those of base classes."""
    texts: dict[str, str] = {}
    for part in reversed([each for each in options.__mro__ if dataclasses.is_dataclass(each)]):
        texts |= _own_docstrings(part)
    return texts


def _own_docstrings(options: type) -> dict[str, str]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def remember_given(parser: argparse.ArgumentParser) -> None:
    """Record which of the parser's flags are on the command line, for `check_arguments`."""
    words = {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    _given.clear()
    for action in parser._actions:
        for flag in words.intersection(action.option_strings):
            _given[action.dest] = (flag, parser.get_default(action.dest))


def project_arguments(directory: str | Path) -> dict[str, Any]:
    """Values that a project fixes, under the names of Megatron-LM's arguments.

    The vocabulary size is the project's. Megatron-LM's own tokenizers would need files, which they
    may try to download, and count differently.

    Raises:
        ProjectError: it is not a project directory.
        TokenizerError: its tokenizer cannot be loaded.
    """
    project, paths = ProjectConfig.load(directory), ProjectPaths(directory)
    fixed = {name: getattr(project, key) for name, key in FIXED.items()}
    return {
        **fixed,
        "tokenizer_type": _TOKENIZER,
        "use_tokenizer_model_from_checkpoint_args": False,  # ours name the project's
        "vocab_size": load_project_tokenizer(project, paths).vocab_size,
        "max_position_embeddings": project.retro_gpt_seq_length,
    }


def set_tokenizer(args: argparse.Namespace) -> None:
    """Set `padded_vocab_size` for the project's tokenizer, as in our own trainer, and record it.

    Megatron-LM has set the size for the tokenizer that it built. A value from a flag, or from a
    checkpoint whose arguments are used, is kept if the vocabulary fits. Checkpoints hold the
    arguments, so commands that read one find the tokenizer's type, fingerprint and document tokens.

    Raises:
        ConfigurationError: it does not.
    """
    project, paths = (
        ProjectConfig.load(args.retro_project_dir),
        ProjectPaths(args.retro_project_dir),
    )
    tokenizer = load_project_tokenizer(project, paths)
    vocab_size = tokenizer.vocab_size
    args.retro_tokenizer_type = project.retro_gpt_tokenizer_type
    args.tokenizer_fingerprint = tokenizer_fingerprint(project, args.retro_project_dir)
    args.document_tokens = document_tokens(tokenizer)
    size = padded_vocab_size(
        vocab_size,
        getattr(args, "make_vocab_size_divisible_by", 128),
        getattr(args, "tensor_model_parallel_size", 1),
    )
    if "vocab_size" in _given and args.vocab_size != vocab_size:
        found = f"{args.vocab_size}, but the tokenizer of {args.retro_project_dir} has {vocab_size}"
        raise ConfigurationError("--vocab-size", found, "Leave it out")
    chosen = "padded_vocab_size" in _given or getattr(args, "use_checkpoint_args", False)
    if not chosen:
        args.padded_vocab_size = size
    elif args.padded_vocab_size < vocab_size:
        raise ConfigurationError(
            "--padded-vocab-size",
            f"{args.padded_vocab_size}, for the {vocab_size} tokens of {args.retro_project_dir}",
            f"Leave it out (it becomes {size})",
        )


def check_arguments(args: argparse.Namespace) -> None:
    """Reject flags that contradict the project or that Retro's layers would ignore.

    Raises:
        ConfigurationError: a flag is invalid. Names all such flags.
    """
    problems: list[RetroError] = [*_contradictions(args), *_refusals(args), *_unknown(args)]
    if getattr(args, "pipeline_model_parallel_size", 1) > 1 and args.retro_add_retriever:
        problems += _refusals(args, _INTERLEAVED | REFUSED_IN_PIPELINES)
    problems += _too_small(args)
    problems += _of_model(args)
    noise = {f.name: getattr(args, f.name, 0.0) for f in dataclasses.fields(NeighborNoiseOptions)}
    if not args.retro_add_retriever:
        problems += [
            ConfigurationError(flag_of(name), "given without --retro-add-retriever", "Add it")
            for name, share in noise.items()
            if share
        ]
    options = NeighborNoiseOptions(**noise)
    with naming_flags():
        check_all(
            partial(raise_problems, problems),
            partial(options.check_neighbor_noise, no_retrieval=False),
        )


def _of_model(args: argparse.Namespace) -> Iterator[RetroError]:
    """Errors of our model's options."""
    yield from out_of_range(args, FamilyOptions)
    yield from problems_of_activations(args)
    if args.retro_add_retriever:
        yield from out_of_range(args, RetroOptions)
    else:
        for name, traits in model_traits(RetroOptions).items():
            if traits.gpt == "same" and not traits.our_trainer and getattr(args, name):
                found = f"{getattr(args, name)}, without --retro-add-retriever"
                yield ConfigurationError(flag_of(name), found, "Add it, or leave this one out")
    window, size = getattr(args, WINDOW), getattr(args, "window_size", None)
    if window is not None and size is not None and tuple(size) != (window - 1, 0):
        found = f"{window}, and --window-size {size}"
        yield ConfigurationError(flag_of(WINDOW), found, "Give one of them")
    without = window is None and size is None and not getattr(args, "use_checkpoint_args", False)
    if without and getattr(args, "window_attn_skip_freq", None):
        found = f"{args.window_attn_skip_freq} without --sliding-window"
        yield ConfigurationError("--window-attn-skip-freq", found, "Add the window")


def _contradictions(args: argparse.Namespace) -> Iterator[RetroError]:
    project = ProjectConfig.load(args.retro_project_dir)
    fixed = {name: getattr(project, key) for name, key in FIXED.items()}
    if getattr(args, "tokenizer_type", None) != _TOKENIZER:
        fixed["tokenizer_type"] = project.retro_gpt_tokenizer_type
    for name, value in fixed.items():
        given = getattr(args, name, None)
        if given is not None and given != value:
            yield ConfigurationError(
                flag_of(name), f"{given}, and the project was built with {value}", "Leave it out"
            )


def _too_small(args: argparse.Namespace) -> Iterator[RetroError]:
    """Errors for encoder sizes and numbers of neighbors below 1, where 0 would mean the default."""
    for field, keywords in _flags_of(ModelOptions):
        value = getattr(args, field, None)
        is_number = keywords.get("type") is int and "nargs" not in keywords
        if is_number and value is not None and value < 1:
            yield ConfigurationError(flag_of(field), str(value), "Give at least 1")


def _refusals(
    args: argparse.Namespace, refused: Mapping[str, tuple[tuple[Any, ...], str]] = _REFUSED
) -> Iterator[RetroError]:
    for name, (neutral, hint) in refused.items():
        value = getattr(args, name, None)
        if value not in neutral:
            found = "given" if value is True else str(value)
            yield ConfigurationError(_given.get(name, (flag_of(name), None))[0], found, hint)


def _unknown(args: argparse.Namespace) -> Iterator[RetroError]:
    """Flags on the command line that set an unknown field of the model."""
    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    honoured = _HONOURED | {field.name for field in dataclasses.fields(RetroConfig)} - fields
    for name, (flag, default) in _given.items():
        known = name in honoured or name in _REFUSED or name.startswith((*_FREE_FAMILIES, "retro_"))
        value = getattr(args, name, default)
        if name in fields and not known and value != default:
            yield ConfigurationError(flag, str(value), _OTHER_MODEL)
