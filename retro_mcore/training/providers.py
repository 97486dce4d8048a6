"""Retro for Megatron-LM's own trainer: the functions to pass to its `pretrain()`.

    # pretrain_retro.py, where `megatron.training` can be imported: megatron-core's wheels from 0.17
    # on contain it; for earlier releases use a checkout of Megatron-LM
    from retro_mcore.training.providers import main

    if __name__ == "__main__":
        main()

or, where you call `pretrain()` yourself, `model_provider`, `train_valid_test_datasets_provider`,
`forward_step` and `extra_args_provider` of this module. Retro's flags keep the names that they had
there; those fixed by the project (sequence length, batch size, vocabulary size, ...) default to its
config.json. `provider_flags` lists which of Megatron-LM's own flags are honored, and refuses
others.

Signatures are those of Megatron-LM 0.16 to 0.19. `pretrain()` takes the functions first up to
0.17, a container of configurations first from 0.18 on, and the model provider by name from 0.19
on; `main` tells them apart.

In a pipeline stages tell each other the shapes of what they send (`variable_seq_lengths`), because
Megatron-LM's trainer expects hidden states alone; see docs/decisions/0005.

Not supported, and refused: the interleaved schedule (use tools/pretrain_retro.py), context
parallelism, other kinds of layers (experts, latent attention, multi-token prediction, ...), and
data other than the project's.
Not supported: Megatron-LM's fault injection and rerun state machine, and its FLOPs estimate, which
counts only a GPT.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.transformer.spec_utils import import_module
from torch import Tensor

from retro_mcore.distributed import print_error
from retro_mcore.errors import EXIT_CODE, ConfigurationError, MissingDependencyError, RetroError
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.decoder_config import DecoderConfig
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.model import RetroModel
from retro_mcore.model.option_traits import passed_to
from retro_mcore.model.options import DecoderOptions
from retro_mcore.model.pipeline import share_embedding
from retro_mcore.model.specs import get_gpt_decoder_block_spec, get_retro_decoder_block_spec
from retro_mcore.platform.compatibility import results_through_a_file, takes_configurations
from retro_mcore.project.config import SPLITS
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.samples.neighbor_noise import NeighborNoise
from retro_mcore.samples.retro_dataset import build_retro_datasets
from retro_mcore.training.loop.loss import NonFiniteLossError, masked_loss
from retro_mcore.training.provider_flags import (
    add_flags,
    check_arguments,
    project_arguments,
    remember_given,
    set_tokenizer,
)
from retro_mcore.training.provider_options import configuration, settle_options
from retro_mcore.training.setup.model_config import naming_flags


def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Retro's flags, for Megatron-LM's parser.

    With --retro-project-dir on the command line, Megatron-LM's own flags default to the project's
    values.
    """
    end_refusals_in_one_line()
    add_flags(parser)
    remember_given(parser)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--retro-project-dir")
    directory = peek.parse_known_args()[0].retro_project_dir
    if directory is not None:
        parser.set_defaults(**project_arguments(directory))
    return parser


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> DecoderModel:
    """Build the model from Megatron-LM's arguments.

    `--spec retro_mcore.model.specs get_retro_decoder_block_spec` is the default. Another function
    of config, use_transformer_engine and vp_stage may be given.

    Args:
        pre_process: Whether this stage embeds.
        post_process: Whether this stage computes logits.
        vp_stage: Virtual pipeline stage (the GPT's alone).
        config: A RetroConfig (for the GPT, a DecoderConfig) to use instead of the arguments.
            Others, such as Megatron-LM's own from 0.17 on, are not used.
        pg_collection: Process groups, passed by Megatron-LM from 0.17 on.

    In a pipeline all ranks must call this together.

    Raises:
        ConfigurationError: an argument is invalid. Names it.
    """
    args = _megatron().get_args()
    check_arguments(args)
    set_tokenizer(args)
    settle_options(args)
    retrieves = args.retro_add_retriever
    with naming_flags():
        if not isinstance(config, RetroConfig if retrieves else DecoderConfig):
            config = configuration(args)
        return _build(args, config, pre_process, post_process, vp_stage, pg_collection)


def _build(
    args: argparse.Namespace,
    config: DecoderConfig,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    pg_collection: Any,
) -> DecoderModel:
    retrieves = args.retro_add_retriever
    pipelined = retrieves and config.pipeline_model_parallel_size > 1
    if pipelined:
        config.variable_seq_lengths = True
    engine = getattr(args, "transformer_impl", "local") == "transformer_engine"
    build = get_retro_decoder_block_spec if retrieves else get_gpt_decoder_block_spec
    if getattr(args, "spec", None) is not None:
        build = import_module(args.spec)
    spec = build(config, use_transformer_engine=engine, vp_stage=vp_stage)
    sizes = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": pre_process,
        "post_process": post_process,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        **passed_to("model", DecoderOptions, args),
        "vp_stage": vp_stage,
        "pg_collection": pg_collection,
    }
    if not pipelined:
        return (RetroModel if retrieves else DecoderModel)(config, spec, **sizes)
    model = RetroModel(config, spec, **sizes)
    pipeline = getattr(pg_collection, "pp", None)
    share_embedding(model, pipeline or parallel_state.get_pipeline_model_parallel_group())
    return model


def train_valid_test_datasets_provider(
    train_val_test_num_samples: Any, vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the project's datasets. Every rank reads its samples itself.

    Args:
        train_val_test_num_samples: Number of samples that Megatron-LM will read from each.
        vp_stage: Virtual pipeline stage, passed by Megatron-LM in the interleaved schedule.

    Raises:
        ConfigurationError: more samples are requested than the project has neighbors for.
        ProjectError: a stage of the project is missing.
    """
    args = _megatron().get_args()
    check_arguments(args)
    noise = NeighborNoise.from_options(args, args.seed)
    datasets = build_retro_datasets(
        args.retro_project_dir, args.retro_num_neighbors, args.retro_num_retrieved_chunks, noise
    )
    flags = ("--train-iters or --train-samples", "--eval-iters", "--eval-iters")
    return check_number_of_samples(datasets, train_val_test_num_samples, flags)


def check_number_of_samples(
    datasets: Mapping[Any, Any], wanted: Sequence[int | None], settings: Sequence[str]
) -> tuple[Any, Any, Any]:
    """The datasets of all splits, if each has as many samples as the trainer will read.

    Args:
        datasets: By split.
        wanted: Number of samples of each split; None: any.
        settings: The setting that determines each number, for the error.

    Raises:
        ConfigurationError: a split has too few.
    """
    for split, number, setting in zip(SPLITS, wanted, settings, strict=True):
        dataset = datasets.get(split)
        if dataset is not None and number is not None and number > len(dataset):
            raise ConfigurationError(
                setting,
                f"{number} samples of {split}, and the project has {len(dataset)}",
                "Give fewer",
            )
    train, valid, test = (datasets.get(split) for split in SPLITS)
    return train, valid, test


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def forward_step(
    data_iterator: Iterator[Mapping[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """Run a forward pass. Returns the losses, and the function with which Megatron reduces them."""
    args, timers = _megatron().get_args(), _megatron().get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, args.retro_add_retriever)
    timers("batch-generator").stop()
    losses_BS = model(**batch.model_inputs(), labels=batch.labels)
    return losses_BS, partial(_loss, batch)


def get_batch(data_iterator: Iterator[Mapping[str, Tensor]], retrieval: bool) -> RetroBatch:
    """Build a micro batch on this process's device, from samples stacked by torch's collate.

    Args:
        data_iterator: Yields `text` [B, S+1], `neighbor_tokens` and `neighbor_mask` [B, L, K, R],
            and in an aligned project `loss_mask` [B, S].
        retrieval: Whether to include neighbors.
    """
    data, device = next(data_iterator), torch.device(torch.cuda.current_device())
    neighbors = None
    if retrieval:
        neighbors = (data["neighbor_tokens"].to(device), data["neighbor_mask"].to(device))
    loss_mask = data["loss_mask"].to(device) if "loss_mask" in data else None
    return RetroBatch.from_text(data["text"].to(device).long(), neighbors, loss_mask)


def _loss(batch: RetroBatch, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    check = getattr(_megatron().get_args(), "check_for_nan_in_loss_and_grad", False)
    return loss_of_batch(check, batch, losses_BS)


def loss_of_batch(
    check: bool, batch: RetroBatch, losses_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses, number of tokens, and both for the report, as Megatron's trainers expect.

    Args:
        check: Whether to reject a loss that is not finite.
        batch: The micro batch.
        losses_BS: The model's output.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite.
    """
    loss, num_tokens, report = masked_loss(batch, losses_BS)
    if check and not torch.isfinite(loss):
        raise NonFiniteLossError("loss", f"{loss.item()}", "Lower the learning rate")
    return loss, num_tokens, {"lm loss": report["sums"].clone()}


def _megatron() -> Any:
    """Megatron-LM's training package.

    Raises:
        MissingDependencyError: `megatron.training` is not installed.
    """
    try:
        import megatron.training
    except ImportError as error:
        raise MissingDependencyError(
            "megatron.training",
            f"cannot be imported ({error})",
            "Run in a checkout of Megatron-LM (PYTHONPATH), or use tools/pretrain_retro.py",
        ) from error
    return megatron.training


def end_refusals_in_one_line() -> None:
    """Make an uncaught `RetroError` end this process as in our commands.

    Its message is printed without a traceback, and the exit code is 2. Other errors go to the
    previous hook.
    """
    if not isinstance(sys.excepthook, _RefusalHook):
        sys.excepthook = _RefusalHook(sys.excepthook)


class _RefusalHook:
    """Handles our errors, and passes others to the previous excepthook."""

    def __init__(self, others: Callable[..., Any]) -> None:
        self._others = others

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, RetroError):
            self._others(kind, error, trace)
            return
        # With process groups, torch's hook calls this one, collects what it prints in a buffer, and
        # loses that when this one exits.
        collected = isinstance(sys.stderr, io.StringIO)
        with contextlib.redirect_stderr(sys.__stderr__ if collected else sys.stderr):
            print_error(error)
        raise SystemExit(EXIT_CODE)


def main() -> None:
    """Call `pretrain()` of the installed Megatron-LM, whatever its signature.

    Raises:
        RetroError: a flag, the project or the installation is invalid.
    """
    end_refusals_in_one_line()
    pretrain = _megatron().pretrain
    named: dict[str, Any] = {
        "train_valid_test_dataset_provider": train_valid_test_datasets_provider,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    # Saving does not rerun the script, so it needs no `__main__` guard.
    with results_through_a_file():
        if not takes_configurations(pretrain):
            pretrain(**named, extra_args_provider=extra_args_provider)
            return
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        args = parse_and_validate_args(extra_args_provider=extra_args_provider)
        check_arguments(args)  # before any part of the model is built
        pretrain(pretrain_cfg_container_from_args(args), **named)


if __name__ == "__main__":
    main()
