"""A recipe: pretraining on a project in Megatron-Bridge."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.utils.common_utils import get_rank_safe

from retro_mcore.bridge.data import RetroDatasetProvider
from retro_mcore.bridge.huggingface import check_export, load_huggingface
from retro_mcore.bridge.model import RetroModelConfig, check_needs_no_trainer, model_config
from retro_mcore.bridge.names import names_of_recipe
from retro_mcore.checkpoint.conversion.model_fields import END_TOKENS
from retro_mcore.checkpoint.files import CONFIG_FILE, existing_checkpoint
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.errors import CheckpointError, ConfigurationError, raise_problems
from retro_mcore.model.option_traits import model_traits
from retro_mcore.model.options import ModelArguments, ModelOptions
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.loop.sample_reader import (
    DOCUMENT_TOKENS,
    check_document_tokens,
    document_tokens,
)
from retro_mcore.training.options.pretrain import TrainingOptions
from retro_mcore.training.setup.plan import TrainingPlan, make_plan
from retro_mcore.training.setup.saved_arguments import saved_arguments

_LOG = logging.getLogger(__name__)
_WEIGHT_DECAY = 0.1


class RetroConfigContainer(ConfigContainer):
    """Bridge's configuration of a run, with checks of what it resumes and writes."""

    def validate(self) -> None:
        """Check and complete the configuration; called by Bridge before anything is built.

        Raises:
            RetroError: the checkpoint to resume from is another model's; a pipeline with FSDP;
                validation under another context parallel size;
                `checkpoint.also_save_hf_checkpoint` with adapters or in a pipeline, or see
                `check_export`.
        """
        super().validate()
        self._check_resumes()
        ranks, divided = self.model.context_parallel_size, self.dist.eval_context_parallel_size
        if divided not in (None, ranks):
            raise ConfigurationError(
                "dist.eval_context_parallel_size",
                f"{divided}, and training divides samples over {ranks} ranks",
                "Leave it out",
            )
        stages = self.model.pipeline_model_parallel_size
        for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
            if stages > 1 and getattr(self.dist, name):
                raise ConfigurationError(
                    f"dist.{name}", f"given in a pipeline of {stages} stages", "Leave it out"
                )
        if not self.checkpoint.also_save_hf_checkpoint:
            return
        if self.peft is not None or stages > 1:
            kind = "with adapters" if stages == 1 else f"in a pipeline of {stages} stages"
            raise ConfigurationError(
                "checkpoint.also_save_hf_checkpoint",
                f"given {kind}, which are not converted",
                "Leave it out",
            )
        source = self.checkpoint.hf_source_path or self.model.hf_model_id
        source = source or self.tokenizer.tokenizer_model
        check_export(str(source), self.model, self.checkpoint.hf_trust_remote_code)

    def _check_resumes(self) -> None:
        """Refuse the checkpoint of another model: Bridge would load what has the same shapes."""
        given = self.checkpoint
        if (checkpoint := _checkpoint_in(given.load, given.ckpt_step)) is not None:
            self._check_same_model(checkpoint, "checkpoint.load", free=given.finetune)
        elif (checkpoint := _checkpoint_in(given.pretrained_checkpoint, None)) is not None:
            self._check_same_model(checkpoint, "checkpoint.pretrained_checkpoint", free=True)

    def _check_same_model(self, checkpoint: Path, name: str, free: bool) -> None:
        traits = model_traits(ModelArguments)
        may_differ = {"padding", "free"} if free else {"padding"}
        before = {field.name: field.default for field in fields(ModelArguments)}
        before |= saved_arguments(checkpoint)
        differing = {
            key: now
            for key, now in self.model.arguments.items()
            if key in traits
            and traits[key].reuse not in may_differ
            and _as_saved(before.get(key)) != _as_saved(now)
        }
        if differing:
            changes = [f"{k} {before.get(k)}, and now it is {now}" for k, now in differing.items()]
            raise CheckpointError(
                str(checkpoint),
                f"was trained with {'; with '.join(changes)}",
                f"Give {', '.join(differing)} as before, or choose another {name}",
            )


def _checkpoint_in(directory: str | None, ckpt_step: int | None) -> Path | None:
    """A checkpoint of Megatron's format that is a directory, or the latest that is in it."""
    if directory is None:
        return None
    if (Path(directory) / CONFIG_FILE).is_file():
        return Path(directory)
    with suppress(CheckpointError):  # of another format: Bridge says what is wrong
        return existing_checkpoint(directory, ckpt_step)
    return None


def _as_saved(value: object) -> object:
    """As a file gives it back: tuples are lists there."""
    return list(value) if isinstance(value, tuple) else value


def pretrain_config(
    project_dir: str,
    *,
    micro_batch_size: int = 1,
    lr: float = 3e-4,
    min_lr: float = 3e-5,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    decoder_first_pipeline_num_layers: int | None = None,
    decoder_last_pipeline_num_layers: int | None = None,
    pipeline_model_parallel_layout: str | None = None,
    sequence_parallel: bool = False,
    context_parallel_size: int = 1,
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = None,
    mixed_precision: str | None = "bf16_mixed",
    save: str | None = None,
    huggingface: str | None = None,
    **model: Any,
) -> ConfigContainer:
    """Configuration for `megatron.bridge.training.pretrain.pretrain`, with `forward_step`.

    Batch size, seed, validation and the number of iterations are the project's. Everything else
    can be changed in the result as in any recipe of Bridge's, except the model.

    Args:
        project_dir: The project, after query_neighbors.
        micro_batch_size: Samples per rank and forward pass.
        lr: Largest learning rate, after a linear warmup.
        min_lr: Learning rate at the end of its cosine decay.
        tensor_model_parallel_size: Number of ranks that share a layer.
        pipeline_model_parallel_size: Number of stages that the decoder's layers are divided into.
        decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers: Layers of these stages,
            if other than the rest's.
        pipeline_model_parallel_layout: The layers of each stage, as in Megatron.
        sequence_parallel: Whether the ranks of a layer also divide the activations outside of
            attention and MLP.
        context_parallel_size: Number of ranks that share each sample.
        cp_comm_type: How they exchange keys and values; see `ParallelOptions`.
        mixed_precision: A name of Bridge's mixed precision; None: fp32.
        save: Directory of checkpoints, from which a run also resumes; None: none are written.
        huggingface: Directory of a `RetroForCausalLM` that the run starts from, with its options.
            None: it starts from random weights.
        **model: Options of the model, as fields of `retro_mcore.model.options.ModelOptions`, by
            which tools/pretrain_retro.py's flags are named.

    Raises:
        RetroError: an option is unknown or invalid, the project is incomplete, or the directory's
            model does not fit it.
    """
    start = None if huggingface is None else load_huggingface(huggingface)
    project, paths = ProjectConfig.load(project_dir), ProjectPaths(project_dir)
    tokenizer = load_project_tokenizer(project, paths)
    options = TrainingOptions(
        project_dir=project_dir,
        micro_batch_size=micro_batch_size,
        lr=lr,
        min_lr=min_lr,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        decoder_first_pipeline_num_layers=decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=decoder_last_pipeline_num_layers,
        pipeline_model_parallel_layout=pipeline_model_parallel_layout,
        sequence_parallel=sequence_parallel,
        context_parallel_size=context_parallel_size,
        cp_comm_type=cp_comm_type,
        **_options_of_model(model, start),
    )
    check_needs_no_trainer(options)
    tokens = document_tokens(tokenizer)
    with names_of_recipe():
        plan = make_plan(options, project, tokenizer.vocab_size, tokenizer.used_vocab_size)
        if huggingface is not None and start is not None:
            plan = _from_start(replace(plan, document_tokens=tokens), start, huggingface)
        model_of_plan = _model(plan, tokens, start)
    interval = max(plan.train_iters // 10, 1)
    return RetroConfigContainer(
        model=model_of_plan,
        train=TrainingConfig(
            train_iters=plan.train_iters,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=micro_batch_size,
        ),
        validation=ValidationConfig(
            eval_interval=project.retro_gpt_eval_interval, eval_iters=project.retro_gpt_eval_iters
        ),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=lr,
            min_lr=min_lr,
            weight_decay=_WEIGHT_DECAY,
            adam_beta2=0.95,
            clip_grad=1.0,
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine",
            lr_decay_iters=plan.train_iters,
            lr_warmup_iters=plan.train_iters // 100,
            start_weight_decay=_WEIGHT_DECAY,
            end_weight_decay=_WEIGHT_DECAY,
            override_opt_param_scheduler=True,
        ),
        ddp=DistributedDataParallelConfig(
            check_for_nan_in_grad=True, grad_reduce_in_fp32=True, use_distributed_optimizer=True
        ),
        dataset=_dataset(plan),
        logger=LoggerConfig(log_interval=10),
        # Only the size of the vocabulary is needed.
        tokenizer=TokenizerConfig(
            tokenizer_type="NullTokenizer", vocab_size=plan.arguments.vocab_size
        ),
        checkpoint=CheckpointConfig(
            save=save, load=save, save_interval=interval, ckpt_format="torch_dist"
        ),
        rng=RNGConfig(seed=project.retro_gpt_seed),
        mixed_precision=mixed_precision,
    )


def _options_of_model(model: dict[str, Any], start: RetroModelConfig | None) -> dict[str, Any]:
    """The model's options: those given, and those of the directory that the run starts from."""
    names = [field.name for field in fields(ModelOptions)]
    raise_problems(
        [
            ConfigurationError(
                name, "is no option of the model", "See ModelOptions for their names"
            )
            for name in model
            if name not in names
        ]
    )
    return model if start is None else {name: start.arguments[name] for name in names} | model


def _model(
    plan: TrainingPlan, tokens: dict[str, int | None], start: RetroModelConfig | None
) -> RetroModelConfig:
    recorded = {DOCUMENT_TOKENS: tokens, "seed": plan.project.retro_gpt_seed}
    if start is None:
        return model_config(plan.arguments, plan.options, recorded)
    ends = {name: start.arguments[name] for name in (END_TOKENS,) if name in start.arguments}
    config = model_config(plan.arguments, plan.options, recorded | ends)
    config.take_weights_of(start)
    return config


def _from_start(plan: TrainingPlan, start: RetroModelConfig, directory: str) -> TrainingPlan:
    """The plan with the directory's vocabulary. Warns if documents begin in another way.

    Raises:
        CheckpointError: an option, or what the project fixes, is not the directory's.
    """
    finetuning = replace(plan, options=replace(plan.options, finetune=True))
    finetuning.check_resumes(start.arguments, Path(directory))
    warning = check_document_tokens(start.arguments, plan.document_tokens, plan.options.project_dir)
    if warning is not None and get_rank_safe() == 0:
        _LOG.warning("%s", warning)
    return plan.with_vocabulary_of(start.arguments)


def _dataset(plan: TrainingPlan) -> RetroDatasetProvider:
    arguments = plan.arguments
    return RetroDatasetProvider(
        project_dir=str(plan.options.project_dir),
        seq_length=plan.sequence_length,
        num_neighbors=arguments.retro_num_neighbors,
        num_retrieved_chunks=arguments.retro_num_retrieved_chunks,
        seed=plan.project.retro_gpt_seed,
        dataloader_type="single",
    )
