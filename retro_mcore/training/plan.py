"""What a training run will do: its flags, resolved with its project, and compared with a run to
resume."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.project.config import ProjectConfig
from retro_mcore.training.data import (
    check_data_options,
    number_of_iterations,
    tokenizer_fingerprint,
)
from retro_mcore.training.options import ModelOptions, OptimizerOptions, TrainingOptions
from retro_mcore.training.provider import ModelArguments, number_of_positions, padded_vocab_size

# May differ when a run is resumed: the checkpoint's padding is kept.
_PADDING = {"padded_vocab_size", "make_vocab_size_divisible_by"}

# The position in the data has a meaning for these alone.
_DATA = ("global_batch_size", "rampup_batch_size", "seed", "split", "data_path")

# Options of the model that its weights do not depend on.
_FREE = {
    "hidden_dropout",
    "attention_dropout",
    "retro_encoder_hidden_dropout",
    "retro_encoder_attention_dropout",
    "init_method_std",
}


@dataclass(frozen=True)
class TrainingPlan:
    """Flags and project, resolved.

    Attributes:
        options: The flags.
        project: config.json.
        arguments: The model.
        train_iters: Iterations of the whole run.
        lr_decay_iters: Iterations until the lowest learning rate.
        lr_warmup_samples: Samples until the highest learning rate.
    """

    options: TrainingOptions
    project: ProjectConfig
    arguments: ModelArguments
    train_iters: int
    lr_decay_iters: int
    lr_warmup_samples: int

    @property
    def global_batch_size(self) -> int:
        """Samples per iteration."""
        return self.project.retro_gpt_global_batch_size

    @property
    def sequence_length(self) -> int:
        """S."""
        return self.project.retro_gpt_seq_length

    def configuration(self) -> dict[str, Any]:
        """Everything that a run must share with the run that it resumes, by flag name."""
        trained = {
            field.name: getattr(self.options, field.name) for field in fields(OptimizerOptions)
        }
        return {
            **asdict(self.arguments),
            **trained,
            "lr_decay_iters": self.lr_decay_iters,
            "lr_warmup_fraction": None,
            "lr_warmup_samples": self.lr_warmup_samples,
            "lr_warmup_iters": 0,
            "bf16": self.options.bf16,
            "fp16": self.options.fp16,
            "global_batch_size": self.global_batch_size,
            "seed": self.project.retro_gpt_seed,
            "split": self.project.retro_gpt_split,
            "data_path": list(self.project.retro_gpt_data_path),
        }

    def checkpoint_args(self) -> Namespace:
        """What a checkpoint says of itself, under Megatron's names."""
        return Namespace(
            **self.configuration(),
            train_iters=self.train_iters,
            micro_batch_size=self.options.micro_batch_size,
            tensor_model_parallel_size=self.options.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.options.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.options.num_virtual_stages_per_pipeline_rank,
            sequence_parallel=self.options.sequence_parallel,
        )

    def check_resumes(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Refuse a checkpoint of another configuration.

        Raises:
            CheckpointError: naming the first flag that differs, and both values.
        """
        defaults = {field.name: field.default for field in fields(ModelOptions)}
        for name, mine in self._must_agree().items():
            # A checkpoint written before an option existed has its default.
            if name in _PADDING or saved.get(name, defaults.get(name)) == mine:
                continue
            raise CheckpointError(
                str(checkpoint),
                f"was trained with {name} {saved.get(name)}, and now it is {mine}",
                f"Give --{name.replace('_', '-')} as it was, or choose another --load and --save",
            )

    def _must_agree(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this run, by what is taken from it."""
        configuration = self.configuration()
        model = asdict(self.arguments)
        if self.options.finetune:
            return {name: value for name, value in model.items() if name not in _FREE}
        if self.options.no_load_optim:
            return {name: configuration[name] for name in (*model, *_DATA) if name in configuration}
        return configuration

    def with_vocabulary_of(self, saved: Mapping[str, Any]) -> TrainingPlan:
        """This plan with a checkpoint's padded vocabulary, whatever layout padded it."""
        padded = saved["padded_vocab_size"]
        if padded % self.options.tensor_model_parallel_size:
            raise ConfigurationError(
                "--tensor-model-parallel-size",
                f"{self.options.tensor_model_parallel_size} does not divide the checkpoint's "
                f"padded vocabulary of {padded}",
                "Choose a divisor",
            )
        return replace(self, arguments=replace(self.arguments, padded_vocab_size=padded))


def make_plan(options: TrainingOptions, project: ProjectConfig, vocab_size: int) -> TrainingPlan:
    """Resolve the flags.

    Args:
        options: The flags.
        project: config.json of `options.project_dir`.
        vocab_size: Of the project's tokenizer.

    Raises:
        ConfigurationError: a flag cannot work, or contradicts the project.
    """
    options.check()
    check_data_options(options, project)
    train_iters = number_of_iterations(options, project)
    decay_iters = options.lr_decay_iters or train_iters
    return TrainingPlan(
        options=options,
        project=project,
        arguments=_model_arguments(options, project, vocab_size),
        train_iters=train_iters,
        lr_decay_iters=decay_iters,
        lr_warmup_samples=_warmup_samples(options, decay_iters, project),
    )


def _model_arguments(
    options: TrainingOptions, project: ProjectConfig, vocab_size: int
) -> ModelArguments:
    arguments = ModelArguments(
        **{field.name: getattr(options, field.name) for field in fields(ModelOptions)},
        seq_length=project.retro_gpt_seq_length,
        retro_chunk_length=project.retro_gpt_chunk_length,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size(
            vocab_size, options.make_vocab_size_divisible_by, options.tensor_model_parallel_size
        ),
        tokenizer_type=project.retro_gpt_tokenizer_type,
        tokenizer_fingerprint=tokenizer_fingerprint(project, options.project_dir),
    )
    return replace(arguments, max_position_embeddings=number_of_positions(arguments))


def _warmup_samples(options: TrainingOptions, decay_iters: int, project: ProjectConfig) -> int:
    batch = project.retro_gpt_global_batch_size
    samples = options.lr_warmup_iters * batch
    if options.lr_warmup_fraction is not None:
        samples = int(options.lr_warmup_fraction * decay_iters * batch)
    if samples >= decay_iters * batch:
        raise ConfigurationError(
            "--lr-warmup-iters",
            f"{options.lr_warmup_iters}, but the learning rate decays over {decay_iters}",
            "Warm up for fewer iterations than --lr-decay-iters",
        )
    return samples
