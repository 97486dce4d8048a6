"""The plan of a training run: flags resolved with the project, and compared with a run to
resume."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from retro_mcore.checkpoint.arguments import read_arguments
from retro_mcore.checkpoint.files import existing_checkpoint
from retro_mcore.errors import (
    CheckpointError,
    ConfigurationError,
    check_all,
    flag_of,
    raise_problems,
)
from retro_mcore.model.option_traits import model_traits
from retro_mcore.model.options import ModelArguments, ModelOptions
from retro_mcore.platform.other_optimizers import check_available
from retro_mcore.project.atomic import atomic_write
from retro_mcore.project.config import ProjectConfig
from retro_mcore.training.loop.batch_sizes import BatchSizes
from retro_mcore.training.loop.sample_reader import (
    DOCUMENT_TOKENS,
    check_data_options,
    check_document_tokens,
    number_of_iterations,
    project_flags,
    tokenizer_fingerprint,
)
from retro_mcore.training.loop.schedule import ScheduleLengths, schedule_lengths
from retro_mcore.training.options.documents import DocumentOptions
from retro_mcore.training.options.megatron import PRECISION_FLAGS, has_option
from retro_mcore.training.options.model_sizes import check_context_parallel
from retro_mcore.training.options.noise import NeighborNoiseOptions
from retro_mcore.training.options.optimizer import SCHEDULE
from retro_mcore.training.options.other_optimizers import MUON
from retro_mcore.training.options.pretrain import OptimizerOptions, TrainingOptions
from retro_mcore.training.setup.build import (
    number_of_positions,
    padded_vocab_size,
    uses_transformer_engine,
)
from retro_mcore.training.setup.data_contents import DataContents
from retro_mcore.training.setup.fits_project import lacks_tokenizer
from retro_mcore.training.setup.gpt_contents import check_same_gpt
from retro_mcore.training.setup.retrofit import gpt_arguments

#: The file of resolved flags, in the folder of the checkpoints.
OPTIONS_FILE = "config.yaml"

# Facts about the model that are determined by the project, not by a flag.
_WITHOUT_FLAG = {field.name for field in fields(ModelArguments)} - {
    field.name for field in fields(TrainingOptions)
}


_TOKENIZER = ("tokenizer_type", "tokenizer_fingerprint")


class SplitReport(Protocol):
    """Report on a split's samples."""

    @property
    def name(self) -> str:
        """The split."""
        ...

    @property
    def warning(self) -> str:
        """One line for the user, or an empty string."""
        ...

    @property
    def report(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        ...


@dataclass(frozen=True)
class TrainingPlan:
    """Resolved flags and project.

    Attributes:
        options: The flags.
        project: config.json.
        arguments: The model.
        batch_sizes: Samples of each iteration.
        train_iters: Iterations of the whole run.
        train_samples: Number of samples in these iterations.
        schedule: Lengths of the schedules, in samples.
        used_vocab_size: Number of the tokenizer's ids that can occur; see `Tokenizer`.
        contents: Contents of the samples; None without training.
        passes: How often each split's documents are read, or how much of its examples is cut.
        document_tokens: Tokens that begin and end the project's documents; None: not compared.
    """

    options: TrainingOptions
    project: ProjectConfig
    arguments: ModelArguments
    batch_sizes: BatchSizes
    train_iters: int
    train_samples: int
    schedule: ScheduleLengths
    used_vocab_size: int
    contents: DataContents | None = field(default=None, kw_only=True)
    passes: tuple[SplitReport, ...] = field(default=(), kw_only=True)
    document_tokens: Mapping[str, int | None] | None = field(default=None, kw_only=True)

    @property
    def global_batch_size(self) -> int:
        """Samples per iteration, after the ramp."""
        return self.project.retro_gpt_global_batch_size

    @property
    def sequence_length(self) -> int:
        """S."""
        return self.project.retro_gpt_seq_length

    @property
    def with_retrieval(self) -> bool:
        """Whether the samples have neighbors."""
        return not self.arguments.no_retrieval

    @property
    def freeze_retrieval(self) -> bool:
        """Whether encoder and cross-attention are not trained."""
        return False

    @property
    def documents(self) -> dict[str, bool]:
        """How the documents of a sample are kept apart, by the names of `DocumentOptions`."""
        return {each.name: getattr(self.options, each.name) for each in fields(DocumentOptions)}

    def check_layers(self) -> None:
        """Reject documents that are kept apart, if attention cannot do that.

        Raises:
            ConfigurationError: --reset-attention-mask with Transformer Engine layers.
        """
        if self.options.reset_attention_mask and uses_transformer_engine(self.options):
            raise ConfigurationError(
                "--reset-attention-mask",
                "given, but Transformer Engine's causal attention takes no mask of documents",
                "Add --transformer-impl local, or leave it out",
            )

    def check_optimizer(self) -> None:
        """Reject an optimizer that the installed packages or the model do not have.

        Raises:
            ConfigurationError: names the flag.
        """
        optimizer = self.options.optimizer
        check_available(optimizer)
        if optimizer != "adam" and self.arguments.retro_mup_base_hidden_size is not None:
            raise ConfigurationError(
                "--retro-mup-base-hidden-size",
                f"{self.arguments.retro_mup_base_hidden_size} with --optimizer {optimizer}, but "
                "muP's learning rates are those of Adam",
                "Leave one of them out",
            )

    @property
    def repetitions(self) -> dict[str, str]:
        """Warnings about repeated or cut samples, by split."""
        return {each.name: each.warning for each in self.passes if each.warning}

    def configuration(self) -> dict[str, Any]:
        """All values that must equal those of the run to resume, by flag name."""
        trained = {
            field.name: getattr(self.options, field.name)
            for part in (OptimizerOptions, NeighborNoiseOptions, DocumentOptions)
            for field in fields(part)
        }
        return {
            **asdict(self.arguments),
            **trained,
            **self.schedule.flags(),
            **self._weight_decay_length(),
            **self._muon_blocks(),
            **{name: getattr(self.options, name) for name in self._precision()},
            **self._data(),
        }

    def _precision(self) -> list[str]:
        # A release of megatron-core may lack some of these.
        names = ("bf16", "fp16", *PRECISION_FLAGS)
        return [name for name in names if has_option(self.options, name)]

    def _data(self) -> dict[str, Any]:
        """Values that determine the meaning of a number of consumed samples."""
        return {
            "rampup_batch_size": self.options.rampup_batch_size,
            "global_batch_size": self.global_batch_size,
            "seed": self.project.retro_gpt_seed,
            "split": self.project.retro_gpt_split,
            "data_path": list(self.project.retro_gpt_data_path),
        }

    def _weight_decay_length(self) -> dict[str, Any]:
        # The weight decay changes over the whole run, so a resumed run must have the same length.
        changes = self.options.weight_decay_incr_style != "constant"
        return {"train_samples": self.train_samples} if changes else {}

    def _muon_blocks(self) -> dict[str, Any]:
        # In this mode Muon treats each process's part of a matrix as a matrix.
        blockwise = self.options.optimizer in MUON and self.options.muon_tp_mode == "blockwise"
        size = self.options.tensor_model_parallel_size
        sizes = {"tensor_model_parallel_size": size}
        if self.arguments.num_experts is not None:
            of_experts = self.options.expert_tensor_parallel_size or size
            sizes["expert_tensor_parallel_size"] = of_experts
        return sizes if blockwise else {}

    def checkpoint_args(self) -> Namespace:
        """Arguments that a checkpoint stores, under Megatron's names."""
        tensor_parallel = {"tensor_model_parallel_size": self.options.tensor_model_parallel_size}
        return Namespace(
            **{**self.configuration(), **tensor_parallel},
            train_iters=self.train_iters,
            micro_batch_size=self.options.micro_batch_size,
            pipeline_model_parallel_size=self.options.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.options.num_virtual_stages_per_pipeline_rank,
            sequence_parallel=self.options.sequence_parallel,
            context_parallel_size=self.options.context_parallel_size,
            **({"data_contents": self.contents.record()} if self.contents else {}),
            **({DOCUMENT_TOKENS: dict(self.document_tokens)} if self.document_tokens else {}),
        )

    def check_resumes(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """Reject a checkpoint with a different configuration or different data.

        Raises:
            CheckpointError: something differs. Names every such flag with both values, or the file
                or weight of the data, or --load-gpt.
            SeveralErrors: more than one file or weight differs.
            TokenizerError: the project's documents end with a different token.
        """
        check_same_gpt(self.options.load_gpt, saved.get("gpt_contents"), checkpoint)
        # For a run of another command, report the flags; its data differs in any case.
        self._check_same_flags(saved, checkpoint)
        self._check_same_data(saved, checkpoint)
        check_document_tokens(saved, self.document_tokens, self.options.project_dir)

    def _check_same_flags(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        # A checkpoint written before an option existed has its default.
        before = {field.name: field.default for field in fields(TrainingOptions)} | dict(saved)
        now = self._must_agree()
        if self.options.override_opt_param_scheduler:
            # The groups of parameters stay: with a decoupled rate there are more.
            groups = {"decoupled_lr": self.options.decoupled_lr is not None}
            before["decoupled_lr"] = before.get("decoupled_lr") is not None
            now = {name: value for name, value in now.items() if name not in SCHEDULE} | groups
        if self._compares_contents(saved):
            now.pop("data_path", None)  # only the files' content matters, not their location
        if lacks_tokenizer(saved.get("tokenizer_fingerprint", "")):
            unstated = before.get("vocab_size") == before.get("padded_vocab_size")
            unknown = (*_TOKENIZER, "vocab_size") if unstated else _TOKENIZER
            now = {name: v for name, v in now.items() if name not in unknown}
        differing = [name for name, mine in now.items() if before.get(name) != mine]
        if not differing:
            return
        changes = [f"{name} {before.get(name)}, and now it is {now[name]}" for name in differing]
        flags = [flag_of(name) for name in differing if name not in _WITHOUT_FLAG]
        of_project = ["--project-dir"] if len(flags) < len(differing) else []
        raise CheckpointError(
            str(checkpoint),
            f"was trained with {'; with '.join(changes)}",
            f"Give {', '.join(flags + of_project)} as before, or choose another --load and --save",
        )

    def _check_same_data(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        if self.contents is not None and self._compares_contents(saved):
            raise_problems([*self.contents.differences(saved["data_contents"], checkpoint)])

    def _compares_contents(self, saved: Mapping[str, Any]) -> bool:
        known = saved.get("data_contents") is not None and self.contents is not None
        return known and "data_path" in self._must_agree()

    def _must_agree(self) -> dict[str, Any]:
        """Values that a checkpoint must share with this run, depending on what is loaded."""
        model = self._model(self._may_differ())
        if self.options.finetune:
            return model
        if self.options.no_load_optim:
            return model | self._data()
        left_out = asdict(self.arguments).keys() - model.keys()
        return {k: v for k, v in self.configuration().items() if k not in left_out}

    def _may_differ(self) -> set[str]:
        """Kinds of model options that may differ from the checkpoint's (`ModelTraits.reuse`)."""
        return {"padding", "free"} if self.options.finetune else {"padding"}

    def _model(self, without: set[str]) -> dict[str, Any]:
        traits = model_traits(ModelArguments)
        model = asdict(self.arguments)
        return {name: value for name, value in model.items() if traits[name].reuse not in without}

    def resolved_options(self) -> dict[str, Any]:
        """Every flag with its value in this run, including the project's values and defaults."""
        return {
            **asdict(self.options),
            **{
                name: value
                for name, value in asdict(self.arguments).items()
                if has_option(self.options, name)
            },
            **project_flags(self.project),
            **self.schedule.flags(),
            "train_iters": None,
            "train_samples": self.train_samples,
        }

    def save_options(self) -> Path | None:
        """Write the resolved options to --save, for use with --config; returns the file.

        A different file of an earlier run is replaced.
        """
        if self.options.save is None:
            return None
        path = Path(self.options.save) / OPTIONS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            text = yaml.safe_dump(self.resolved_options(), sort_keys=False)
            temporary.write_text(text, encoding="utf-8")
        return path

    def with_vocabulary_of(self, saved: Mapping[str, Any]) -> TrainingPlan:
        """This plan with a checkpoint's padded vocabulary size, whatever its layout."""
        padded = saved["padded_vocab_size"]
        if padded % self.options.tensor_model_parallel_size:
            raise ConfigurationError(
                "--tensor-model-parallel-size",
                f"{self.options.tensor_model_parallel_size} does not divide the checkpoint's "
                f"padded vocabulary of {padded}",
                "Choose a divisor",
            )
        return replace(self, arguments=replace(self.arguments, padded_vocab_size=padded))


def make_plan(
    options: TrainingOptions,
    project: ProjectConfig,
    vocab_size: int,
    used_vocab_size: int | None = None,
    *,
    gpt_may_be_missing: bool = False,
) -> TrainingPlan:
    """Resolve the flags.

    Args:
        options: The flags.
        project: config.json of `options.project_dir`.
        vocab_size: Size of the tokenizer's vocabulary.
        used_vocab_size: Number of these ids that can occur (default: all).
        gpt_may_be_missing: Plan with the flags alone if --load-gpt does not exist yet.

    Raises:
        ConfigurationError: a flag is invalid, or contradicts the project.
    """
    check_all(options.check, partial(check_data_options, options, project))
    options = _with_saved_schedule(options)
    used = used_vocab_size or vocab_size
    sizes = BatchSizes.of(project.retro_gpt_global_batch_size, options.rampup_batch_size)
    train_iters, train_samples = number_of_iterations(options, project, sizes)
    arguments = _model_arguments(options, project, vocab_size)
    if not (gpt_may_be_missing and options.load_gpt and not Path(options.load_gpt).exists()):
        arguments = gpt_arguments(arguments, options, used)
    arguments = replace(arguments, max_position_embeddings=number_of_positions(arguments))
    check_context_parallel(arguments, options)
    return TrainingPlan(
        options=options,
        project=project,
        arguments=arguments,
        batch_sizes=sizes,
        train_iters=train_iters,
        train_samples=train_samples,
        schedule=schedule_lengths(options, project.retro_gpt_global_batch_size, train_samples),
        used_vocab_size=used,
    )


def _with_saved_schedule(options: TrainingOptions) -> TrainingOptions:
    """The options with the schedule of the checkpoint to resume, if they ask for it.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    if options.load is None or not options.use_checkpoint_opt_param_scheduler:
        return options
    checkpoint = existing_checkpoint(options.load, options.ckpt_step)
    if checkpoint is None:
        return options
    saved = read_arguments(checkpoint)
    return replace(options, **{name: saved[name] for name in SCHEDULE if name in saved})


def _model_arguments(
    options: TrainingOptions, project: ProjectConfig, vocab_size: int
) -> ModelArguments:
    return ModelArguments(
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
