"""Plan of instruction tuning: training a pretrained model on question and chat data.

It uses the loop of `training.loop.trainer`. Only the data and some model options differ from
pretraining.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from retro_mcore import distributed
from retro_mcore.checkpoint.files import find_checkpoint, latest_iteration
from retro_mcore.data.instruction.blend import BlendPart, labels_of, parse_blend
from retro_mcore.data.instruction.cuts import InstructionCuts, count_cuts
from retro_mcore.data.instruction.dataset import InstructionDataset
from retro_mcore.data.instruction.examples import (
    InstructionExample,
    num_without_longform,
    read_examples,
)
from retro_mcore.data.instruction.samples import InstructionFormat
from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.errors import ConfigurationError, CorpusError, flag_of, raise_problems
from retro_mcore.model.option_traits import stated
from retro_mcore.project.config import ProjectConfig
from retro_mcore.training.options.documents import DocumentOptions
from retro_mcore.training.options.finetune import (
    FinetuneModelOptions,
    FinetuneOptions,
    SampleFormatOptions,
)
from retro_mcore.training.options.from_checkpoint import model_options_of_checkpoint
from retro_mcore.training.options.pretrain import TrainingOptions
from retro_mcore.training.setup.build import uses_transformer_engine
from retro_mcore.training.setup.plan import TrainingPlan, make_plan
from retro_mcore.training.setup.saved_arguments import saved_arguments


@dataclass(frozen=True)
class FinetunePlan(TrainingPlan):
    """A plan of instruction tuning.

    Attributes:
        command: The flags as given.
        format: How examples become tokens.
    """

    command: FinetuneOptions
    format: InstructionFormat

    @property
    def with_retrieval(self) -> bool:
        """Whether the encoder reads passages."""
        return self.format.num_encoder_passages > 0

    @property
    def freeze_retrieval(self) -> bool:
        """Whether encoder and cross-attention are not trained, since they get no gradients."""
        return not self.with_retrieval and not self.arguments.no_retrieval

    def check_layers(self) -> None:
        """Reject packing if attention cannot separate the examples of a sample.

        Raises:
            ConfigurationError: --pack-samples with Transformer Engine layers.
        """
        if self.command.pack_samples and uses_transformer_engine(self.options):
            raise ConfigurationError(
                "--pack-samples",
                "given, but Transformer Engine's causal attention takes no mask of examples",
                "Add --transformer-impl local, or leave it out",
            )

    def configuration(self) -> dict[str, Any]:
        """All values that a run must share with the run that it resumes, by flag name."""
        names = [field.name for field in fields(SampleFormatOptions)]
        format = {name: getattr(self.command, name) for name in names}
        return super().configuration() | format | self._packing()

    def check_resumes(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        """As in pretraining. Before --pack-open-samples existed, one sample was open."""
        before = {"pack_open_samples": 1 if saved.get("pack_samples") else None}
        super().check_resumes(before | dict(saved), checkpoint)

    def _data(self) -> dict[str, Any]:
        return super()._data() | {"pack_samples": self.command.pack_samples} | self._packing()

    def _packing(self) -> dict[str, Any]:
        return {"pack_open_samples": self.command.num_open_samples}

    def resolved_options(self) -> dict[str, Any]:
        """The command's flags, with the resolved sequence length."""
        model = {name: getattr(self.arguments, name) for name in _model_flags()}
        if not self.with_retrieval:
            model.pop("retro_num_neighbors")
        if self.arguments.num_experts is None:
            model = {name: value for name, value in model.items() if not name.startswith("moe_")}
        length = {"seq_length": self.sequence_length}
        return asdict(self.command) | model | length | self._packing()

    def _must_agree(self) -> dict[str, Any]:
        agreeing = super()._must_agree()
        if not self.options.finetune:
            return agreeing
        return {name: value for name, value in agreeing.items() if name not in _model_flags()}

    def _may_differ(self) -> set[str]:
        allowed = super()._may_differ()
        return allowed | {"texts"} if self.options.finetune else allowed


def make_finetune_plan(
    command: FinetuneOptions, project: ProjectConfig, vocab_size: int
) -> FinetunePlan:
    """Resolve the flags with the model's checkpoint.

    If --save already contains a checkpoint of this run, the run resumes from it, whatever --load
    says. So a restarted job needs no other flags.

    Args:
        command: The flags.
        project: The project's configuration.
        vocab_size: Size of its tokenizer's vocabulary.

    Raises:
        ConfigurationError: a flag is invalid.
        CheckpointError: --load contains no checkpoint, or one with another tokenizer.
    """
    command.check()
    if command.save is not None and latest_iteration(command.save) is not None:
        command = replace(command, load=command.save, finetune=False, ckpt_step=None)
    assert command.load is not None
    saved = saved_arguments(find_checkpoint(command.load, command.ckpt_step))
    if not command.finetune:
        command = _packing_as_before(command, saved)
    length = command.seq_length or int(saved["seq_length"])
    model = model_options_of_checkpoint(command.load, command.ckpt_step)
    raise_problems([*_problems_of_balance(command, model)])
    options = _training_options(command, model, saved, length)
    plan = make_plan(options, _as_project(command, project, length), vocab_size)
    format = _format(command, plan)
    return FinetunePlan(
        **{field.name: getattr(plan, field.name) for field in fields(TrainingPlan)},
        command=command,
        format=format,
    )


def _packing_as_before(command: FinetuneOptions, saved: Mapping[str, Any]) -> FinetuneOptions:
    """A resumed run packs as its checkpoint says; before the flag existed, one sample was open."""
    if not (command.pack_samples and saved.get("pack_samples")) or command.pack_open_samples:
        return command
    return replace(command, pack_open_samples=saved.get("pack_open_samples") or 1)


def build_instruction_datasets(
    plan: FinetunePlan, tokenizer: Tokenizer
) -> tuple[InstructionDataset, InstructionDataset | None]:
    """Blend for training, and blend for validation if there is one.

    Raises:
        CorpusError: a file is missing or malformed, or an example has no answer.
        ConfigurationError: --data-path is not a blend.
    """
    parts = _parts(plan.command)
    train = _blend(plan, parts["train"], plan.train_samples, tokenizer)
    wanted = plan.command.eval_iters * plan.global_batch_size
    valid = _blend(plan, parts["valid"], wanted, tokenizer) if parts["valid"] else None
    return train, valid


def _parts(command: FinetuneOptions) -> dict[str, list[BlendPart]]:
    """Blend of each split; that of validation may be empty."""
    train = parse_blend(command.data_path, command.data_folder)
    if command.valid_data_path is not None:
        return {"train": train, "valid": parse_blend(command.valid_data_path, command.data_folder)}
    valid = [replace(part, train_files=part.valid_files) for part in train if part.valid_files]
    return {"train": train, "valid": valid}


def count_all_cuts(
    plan: FinetunePlan,
    datasets: Sequence[InstructionDataset | None],
    tokenizer: Tokenizer,
) -> tuple[InstructionCuts, ...]:
    """Count the cuts in the examples that a run reads, by split; every rank counts a part of them.

    Args:
        plan: The run.
        datasets: Result of `build_instruction_datasets`.
        tokenizer: The model's.
    """
    found = []
    for (split, parts), dataset in zip(_parts(plan.command).items(), datasets, strict=True):
        if dataset is None:
            continue
        with distributed.raise_together():
            rank, ranks = distributed.get_rank(), distributed.get_world_size()
            mine = count_cuts(dataset, tokenizer, len(parts), rank, ranks)
            if plan.command.longform_answer and rank == 0:
                for counts, part in zip(mine, parts, strict=True):
                    counts["records_left_out"] = num_without_longform(part.train_files)
        gathered = distributed.gather(mine)
        found.append(InstructionCuts.of_ranks(split, labels_of(parts), gathered, dataset.packing))
    return tuple(found)


def _blend(
    plan: FinetunePlan, parts: Sequence[BlendPart], num_samples: int, tokenizer: Tokenizer
) -> InstructionDataset:
    return InstructionDataset(
        [_examples(plan, part) for part in parts],
        [part.weight for part in parts],
        num_samples=num_samples,
        format=replace(plan.format, beginning=tuple(tokenizer.beginning)),
        tokenizer=tokenizer,
        seed=plan.command.seed,
        pack=plan.command.pack_samples,
        num_open=plan.command.num_open_samples or 1,
    )


def _examples(plan: FinetunePlan, part: BlendPart) -> list[InstructionExample]:
    command = plan.command
    examples = read_examples(part.train_files, part.name, command.passages, command.longform_answer)
    if not examples:
        raise CorpusError(f"--data-path {part.name}", "holds no examples", "Check its files")
    return examples


def _training_options(
    command: FinetuneOptions, model: Mapping[str, Any], saved: Mapping[str, Any], length: int
) -> TrainingOptions:
    shared = {field.name for field in fields(TrainingOptions)}
    given = {field.name: getattr(command, field.name) for field in fields(command)}
    changed = {name: given[name] for name in _model_flags() if given[name] is not None}
    positions = saved["max_position_embeddings"]
    if model.get("position_embedding_type") == "rope":
        positions = max(positions or 0, length)
    # Options that the project fixes in pretraining are this command's own here.
    own = dict.fromkeys(stated("project", TrainingOptions))
    return TrainingOptions(
        **{
            **{
                name: value
                for name, value in given.items()
                if name in shared.difference(_model_flags())
            },
            **model,
            **changed,
            **own,
            "max_position_embeddings": positions,
            # Recorded for evaluation on samples of the project.
            **{each.name: saved.get(each.name, False) for each in fields(DocumentOptions)},
            "use_checkpoint_args": False,
        }
    )


def _problems_of_balance(
    command: FinetuneOptions, model: Mapping[str, Any]
) -> Iterator[ConfigurationError]:
    """Settings of load-balancing losses that the checkpoint's model does not have."""
    if model.get("num_experts") is None:
        for name in (name for name in _model_flags() if name.startswith("moe_")):
            if getattr(command, name):
                yield ConfigurationError(
                    flag_of(name),
                    f"{getattr(command, name)}, but the model of {command.load} has no experts",
                    "Leave it out",
                )
        return
    kind = command.moe_router_load_balancing_type or model["moe_router_load_balancing_type"]
    if kind == "none" and command.moe_aux_loss_coeff:
        yield ConfigurationError(
            "--moe-aux-loss-coeff",
            f"{command.moe_aux_loss_coeff}, with --moe-router-load-balancing-type none",
            "Add --moe-router-load-balancing-type aux_loss",
        )
    weight = command.moe_aux_loss_coeff
    weight = model.get("moe_aux_loss_coeff") if weight is None else weight
    if command.moe_router_load_balancing_type not in (None, "none") and not weight:
        yield ConfigurationError(
            "--moe-router-load-balancing-type",
            f"{command.moe_router_load_balancing_type}, whose loss has no weight",
            "Add --moe-aux-loss-coeff",
        )


def _model_flags() -> list[str]:
    return [field.name for field in fields(FinetuneModelOptions)]


def _as_project(command: FinetuneOptions, project: ProjectConfig, length: int) -> ProjectConfig:
    """The project, with this run's data instead of its own."""
    return replace(
        project,
        retro_gpt_seq_length=length,
        retro_gpt_global_batch_size=command.global_batch_size,
        retro_gpt_train_samples=command.global_batch_size * command.train_iters,
        retro_gpt_eval_interval=command.eval_interval,
        retro_gpt_eval_iters=command.eval_iters,
        retro_gpt_seed=command.seed,
        retro_gpt_data_path=[*command.data_path],
    )


def _format(command: FinetuneOptions, plan: TrainingPlan) -> InstructionFormat:
    arguments = plan.arguments
    reads_passages = command.retro_attention_gate != 0.0
    if reads_passages and arguments.no_retrieval:
        raise ConfigurationError(
            "--retro-attention-gate",
            f"{command.retro_attention_gate}, but the model of {command.load} has no retrieval",
            "Leave it out",
        )
    return InstructionFormat(
        sequence_length=plan.sequence_length,
        prompt_format=command.prompt_format,
        template_id=command.template_id,
        num_context_passages=command.ft_neighbours,
        num_encoder_passages=arguments.retro_num_neighbors if reads_passages else 0,
        reuse_top=command.reuse_top,
        chunk_length=arguments.retro_chunk_length,
        retrieved_length=arguments.retro_chunk_length * arguments.retro_num_retrieved_chunks,
        loss_on=command.loss_on,
    )
