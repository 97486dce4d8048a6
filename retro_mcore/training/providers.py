"""Retro inside Megatron-LM's own trainer: what its `pretrain()` is given.

    # pretrain_retro.py, in a checkout of Megatron-LM with retro-mcore installed
    from retro_mcore.training.providers import main
    main()

or, where you call `pretrain()` yourself, `model_provider`, `train_valid_test_datasets_provider`,
`forward_step` and `extra_args_provider` of this module. Retro's flags keep the names that they had
there; those of the project (sequence length, batch size, ...) default to its config.json.

Signatures are those of Megatron-LM 0.15 to 0.19. `pretrain()` takes the functions first up to
0.17, a container of configurations first from 0.18 on, and the model provider by name from 0.19
on; `main` tells them apart.

Not covered, and refused: pipeline parallelism (Megatron-LM's schedules are not told the shape of
what crosses stages; use tools/pretrain_retro.py), context parallelism, and
--reset-position-ids, --reset-attention-mask and --eod-mask-loss (samples are packed without
masking, as their neighbors were queried). Not covered: Megatron-LM's fault injection and rerun
machine, and its FLOPs estimate, which counts a GPT.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from retro_mcore.datasets.retro_dataset import build_retro_datasets
from retro_mcore.errors import ConfigurationError
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.model import RetroModel
from retro_mcore.model.specs import get_gpt_decoder_block_spec, get_retro_decoder_block_spec
from retro_mcore.project.config import SPLITS, ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.batch import RetroBatch, position_ids
from retro_mcore.training.loss import NonFiniteLossError, masked_loss

# Megatron-LM's arguments that the project fixes, and its keys.
_FIXED = {
    "seq_length": "retro_gpt_seq_length",
    "global_batch_size": "retro_gpt_global_batch_size",
    "seed": "retro_gpt_seed",
    "eval_interval": "retro_gpt_eval_interval",
    "eval_iters": "retro_gpt_eval_iters",
    "retro_chunk_length": "retro_gpt_chunk_length",
    "tokenizer_type": "retro_gpt_tokenizer_type",
}
_REFUSED = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Retro's flags, for Megatron-LM's parser.

    With --retro-project-dir on the command line, what the project fixes becomes the default of
    Megatron-LM's own flags.
    """
    group = parser.add_argument_group("retro")
    group.add_argument("--retro-project-dir", required=True, help="Project directory.")
    group.add_argument("--retro-add-retriever", action="store_true",
                       help="Retro; without it, the same GPT on the same samples.")  # fmt: skip
    for flag, kind, default, text in _FLAGS:
        group.add_argument(flag, type=kind, default=default, help=text)
    group.add_argument("--retro-encoder-layers", dest="retro_encoder_num_layers", type=int,
                       default=2, help="Layers of the neighbor encoder.")  # fmt: skip
    group.add_argument("--retro-decoder-layers", type=int, nargs="+", default=None,
                       help="Decoder layers with cross-attention, from 1.")  # fmt: skip
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--retro-project-dir")
    directory = peek.parse_known_args()[0].retro_project_dir
    if directory is not None:
        parser.set_defaults(**project_arguments(directory))
    return parser


_FLAGS: tuple[tuple[str, type, Any, str], ...] = (
    ("--retro-chunk-length", int, None, "Tokens per chunk. Fixed by the project."),
    ("--retro-num-neighbors", int, 2, "Neighbors per chunk."),
    ("--retro-num-retrieved-chunks", int, 2, "Chunks per neighbor."),
    ("--retro-encoder-hidden-dropout", float, 0.1, "Dropout of the encoder's hidden states."),
    ("--retro-encoder-attention-dropout", float, 0.1, "Dropout of the encoder's attention."),
    ("--retro-attention-gate", float, 1.0, "Scale of the cross-attention's output."),
    ("--retro-origin", str, None, "Compute as mcore-0.15, mcore-0.5 or legacy did."),
)


def project_arguments(directory: str | Path) -> dict[str, Any]:
    """What a project fixes, under the names of Megatron-LM's arguments.

    Raises:
        ProjectError: it is no project directory.
    """
    project, paths = ProjectConfig.load(directory), ProjectPaths(directory)
    fixed = {name: getattr(project, key) for name, key in _FIXED.items()}
    files = {
        "tokenizer_model": project.retro_gpt_tokenizer_model,
        "vocab_file": project.retro_gpt_vocab_file,
        "merge_file": project.retro_gpt_merge_file,
    }
    found = {name: str(paths.root / file) for name, file in files.items() if file is not None}
    return {**fixed, **found, "max_position_embeddings": project.retro_gpt_seq_length}


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """The model, from Megatron-LM's arguments.

    `--spec retro_mcore.model.specs get_retro_decoder_block_spec` is the default; another function
    of a config, use_transformer_engine and vp_stage may be named.

    Args:
        pre_process: Whether this stage embeds.
        post_process: Whether this stage computes logits.
        vp_stage: Virtual pipeline stage (not covered).
        config: A RetroConfig (or, for the GPT, a TransformerConfig) to use in place of the
            arguments'. Megatron-LM from 0.17 on passes it.
        pg_collection: Process groups; Megatron-LM from 0.17 on passes them.

    Raises:
        ConfigurationError: naming the argument that cannot work.
    """
    args = _megatron().get_args()
    _check(args)
    retrieves = args.retro_add_retriever
    if config is None or (retrieves and not isinstance(config, RetroConfig)):
        config = _config(args)
    engine = getattr(args, "transformer_impl", "local") == "transformer_engine"
    build = get_retro_decoder_block_spec if retrieves else get_gpt_decoder_block_spec
    if getattr(args, "spec", None) is not None:
        from megatron.core.transformer.spec_utils import import_module

        build = import_module(args.spec)
    spec = build(config, use_transformer_engine=engine, vp_stage=vp_stage)
    sizes = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": pre_process,
        "post_process": post_process,
        "fp16_lm_cross_entropy": getattr(args, "fp16_lm_cross_entropy", False),
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": args.rotary_base,
        "rope_scaling": getattr(args, "use_rope_scaling", False),
        "vp_stage": vp_stage,
        "pg_collection": pg_collection,
    }
    return (RetroModel if retrieves else GPTModel)(config, spec, **sizes)


def _config(args: argparse.Namespace) -> Any:
    from megatron.training.arguments import core_transformer_config_from_args

    if not args.retro_add_retriever:
        return core_transformer_config_from_args(args)
    if args.retro_origin is None:
        return core_transformer_config_from_args(args, RetroConfig)
    # Megatron-LM takes the arguments that are called as fields of the configuration.
    sizes: dict[str, int] = {"num_layers": 6, "hidden_size": 8, "num_attention_heads": 1}
    origin = RetroConfig.from_upstream(args.retro_origin, **sizes)
    for name in _ORIGIN_FIELDS:
        setattr(args, name, getattr(origin, name))
    args.retro_encoder_cross_attention_dropout = args.attention_dropout
    return core_transformer_config_from_args(args, RetroConfig)


_ORIGIN_FIELDS = (
    "retro_chunk_alignment",
    "retro_encoder_positions",
    "retro_mask_padding",
    "retro_encoder_residual",
    "retro_final_layernorm",
)


def _check(args: argparse.Namespace) -> None:
    """Refuse what is not covered, and what contradicts the project."""
    if getattr(args, "pipeline_model_parallel_size", 1) > 1 and args.retro_add_retriever:
        raise ConfigurationError(
            "--pipeline-model-parallel-size",
            f"{args.pipeline_model_parallel_size} in Megatron-LM's trainer",
            "Use tensor parallelism, or tools/pretrain_retro.py, which runs Retro in pipelines",
        )
    for name in _REFUSED:
        if getattr(args, name, False):
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(flag, "given", "Retro's samples are packed: leave it out")
    project = ProjectConfig.load(args.retro_project_dir)
    for name, key in _FIXED.items():
        given, fixed = getattr(args, name, None), getattr(project, key)
        if given is not None and given != fixed:
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(
                flag, f"{given}, and the project was built with {fixed}", "Leave it out"
            )


def train_valid_test_datasets_provider(
    train_val_test_num_samples: Any, vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """The project's datasets. Every rank reads its samples itself.

    Args:
        train_val_test_num_samples: Samples that Megatron-LM is going to take of each.
        vp_stage: Megatron-LM passes it in the interleaved schedule.

    Raises:
        ConfigurationError: more samples are wanted than the project has neighbors for.
        ProjectError: a stage of the project is missing.
    """
    args = _megatron().get_args()
    _check(args)
    datasets = build_retro_datasets(
        args.retro_project_dir, args.retro_num_neighbors, args.retro_num_retrieved_chunks
    )
    flags = ("--train-iters or --train-samples", "--eval-iters", "--eval-iters")
    for split, wanted, flag in zip(SPLITS, train_val_test_num_samples, flags, strict=True):
        dataset = datasets.get(split)
        if dataset is not None and wanted is not None and wanted > len(dataset):
            raise ConfigurationError(
                flag, f"{wanted} samples of {split}, and the project has {len(dataset)}", "Fewer"
            )
    train, valid, test = (datasets.get(split) for split in SPLITS)
    return train, valid, test


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def forward_step(
    data_iterator: Iterator[Mapping[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """One forward pass: the losses, and the function that Megatron's schedules reduce them by."""
    args, timers = _megatron().get_args(), _megatron().get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, args.retro_add_retriever)
    timers("batch-generator").stop()
    losses_BS = model(**batch.model_inputs(), labels=batch.labels)
    return losses_BS, partial(_loss, batch)


def get_batch(data_iterator: Iterator[Mapping[str, Tensor]], retrieval: bool) -> RetroBatch:
    """A micro batch on this process's device, from samples that torch's default collate stacked.

    Args:
        data_iterator: Gives `text` [B, S+1], `neighbor_tokens` and `neighbor_mask` [B, L, K, R].
        retrieval: Whether neighbors are wanted.
    """
    data, device = next(data_iterator), torch.device(torch.cuda.current_device())
    text = data["text"].to(device).long()
    tokens = text[:, :-1].contiguous()
    return RetroBatch(
        tokens=tokens,
        labels=text[:, 1:].contiguous(),
        loss_mask=torch.ones(tokens.shape, device=device),
        position_ids=position_ids(tokens),
        retrieved_tokens=data["neighbor_tokens"].to(device).flatten(0, 2) if retrieval else None,
        retrieved_mask=data["neighbor_mask"].to(device).flatten(0, 2) if retrieval else None,
        sample_ids=[],
    )


def _loss(batch: RetroBatch, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, num_tokens, report = masked_loss(batch, losses_BS)
    check = getattr(_megatron().get_args(), "check_for_nan_in_loss_and_grad", False)
    if check and not torch.isfinite(loss):
        raise NonFiniteLossError("loss", f"{loss.item()}", "Lower the learning rate")
    return loss, num_tokens, {"lm loss": report["sums"].clone()}


def _megatron() -> Any:
    """Megatron-LM's training package.

    Raises:
        MissingDependencyError: this is not a checkout of Megatron-LM.
    """
    try:
        import megatron.training
    except ImportError as error:
        from retro_mcore.errors import MissingDependencyError

        raise MissingDependencyError(
            "megatron.training",
            f"cannot be imported ({error})",
            "Run in a checkout of Megatron-LM (PYTHONPATH), or use tools/pretrain_retro.py",
        ) from error
    return megatron.training


def main() -> None:
    """Call the `pretrain()` of the Megatron-LM that is installed, whatever its signature."""
    from megatron.core.enums import ModelType

    pretrain = _megatron().pretrain
    named: dict[str, Any] = {
        "train_valid_test_dataset_provider": train_valid_test_datasets_provider,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    if "cfg_container" not in inspect.signature(pretrain).parameters:
        pretrain(**named, extra_args_provider=extra_args_provider)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=extra_args_provider)
    pretrain(pretrain_cfg_container_from_args(args), **named)


if __name__ == "__main__":
    main()
