"""Flags of instruction tuning. Imports neither torch nor megatron."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from retro_mcore.errors import ConfigurationError, raise_problems
from retro_mcore.model.option_traits import at_least, below_minimum, between
from retro_mcore.time_limit import TrainingTimeLimit
from retro_mcore.training.options.checkpoints import CheckpointOptions, ReproducibilityOptions
from retro_mcore.training.options.logging import LoggingOptions
from retro_mcore.training.options.optimizer import OptimizerOptions
from retro_mcore.training.options.parallel import ParallelOptions, RecomputeOptions
from retro_mcore.training.options.pretrain import ExitOptions


@dataclass(kw_only=True)
class InstructionDataOptions:
    """Data for instruction tuning."""

    project_dir: str
    """Project directory, for the tokenizer and the chunk length."""
    data_path: list[str]
    """Datasets, or WEIGHT DATASET pairs: names in --data-folder, or JSON or JSONL files."""
    data_folder: str = "."
    """Directory of the datasets: NAME/NAME_QA_train*.json and NAME/NAME_QA_dev.json."""
    valid_data_path: list[str] | None = None
    """Datasets to validate on, written as --data-path. Default: each NAME_QA_dev.json."""
    micro_batch_size: int = field(metadata=at_least(1))
    """Samples per forward pass and process."""
    global_batch_size: int = field(metadata=at_least(1))
    """Samples per iteration."""
    train_iters: int = field(metadata=at_least(1))
    """Iterations to train."""
    seq_length: int | None = None
    """Tokens per sample. Default: as in the model's training."""
    eval_interval: int = field(default=200, metadata=at_least(1))
    """Iterations between validations."""
    eval_iters: int = field(default=100, metadata=at_least(1))
    """Batches per validation. Datasets with fewer examples are repeated."""
    num_workers: int = field(default=2, metadata=at_least(0))
    """Number of processes that prefetch samples."""
    seed: int = 1234
    """Seed for sample order and dropout."""


@dataclass(kw_only=True)
class SampleFormatOptions:
    """How examples become samples. To resume a run, these options must be the same."""

    prompt_format: Literal["reformat_prompt_retro", "reformat_prompt", "reformat_prompt_short"] = (
        "reformat_prompt_retro"
    )
    """Prompt wording, by function name in the InstructRetro release."""
    template_id: int = 0
    """Alternative wording of reformat_prompt (the release's flan_format), from 1 to 7."""
    passages: Literal["annotated", "retrieved", "bert_pretrain_corpus"] = "annotated"
    """Passages of question records: sub-paragraphs, ctxs, or bert_pretrain_corpus_neighbours."""
    longform_answer: bool = False
    """Train on the `longform_answer` of question records, and skip records without one."""
    ft_neighbours: int = 1
    """Number of passages in the decoder's context."""
    reuse_top: bool = False
    """Also give the encoder the passages in the decoder's context, not only those after them."""
    loss_on: Literal["last-answer", "answers", "everything"] = "last-answer"
    """Tokens that count in the loss: the last answer, every answer of a chat, or all."""
    pack_samples: bool = False
    """Put as many examples into each sample as fit; examples do not attend to each other."""
    pack_open_samples: int | None = field(default=None, metadata=at_least(1))
    """Number of samples that --pack-samples fills at the same time. An example goes where it leaves
    the least room, or into a new sample. 1 fills one sample after the other. Default: 32."""

    @property
    def num_open_samples(self) -> int | None:
        """Number of samples that packing fills at the same time; None: samples are not packed."""
        return self.pack_open_samples or 32 if self.pack_samples else None


@dataclass(kw_only=True)
class FinetuneModelOptions:
    """Model options that may differ from those in pretraining."""

    retro_attention_gate: float = 0.0
    """Scale of the cross-attention output. 0, as in InstructRetro: passages are only in the
    decoder's context, and encoder and cross-attention are not trained. Otherwise the encoder reads
    the passages that follow those in the context (RETRO++)."""
    retro_num_neighbors: int | None = None
    """Number of passages for the encoder. Default: as in the model's training."""
    hidden_dropout: float = 0.0
    """Dropout of hidden states in the decoder."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities in the decoder."""
    retro_encoder_hidden_dropout: float = 0.0
    """Dropout of hidden states in the neighbor encoder."""
    retro_encoder_attention_dropout: float = 0.0
    """Dropout of attention probabilities in the neighbor encoder."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] | None = None
    """Load-balancing loss: over a micro batch (aux_loss), over each sample (seq_aux_loss), or none.
    Default: as in the model's training."""
    moe_aux_loss_coeff: float | None = field(default=None, metadata=between(0, math.inf))
    """Weight of the load-balancing loss. Default: as in the model's training."""
    moe_z_loss_coeff: float | None = field(default=None, metadata=between(0, math.inf))
    """Weight of the z-loss of the router. Default: as in the model's training."""


@dataclass(kw_only=True)
class FinetuneOptions(
    TrainingTimeLimit,
    ExitOptions,
    LoggingOptions,
    CheckpointOptions,
    ReproducibilityOptions,
    OptimizerOptions,
    RecomputeOptions,
    ParallelOptions,
    FinetuneModelOptions,
    SampleFormatOptions,
    InstructionDataOptions,
):
    """All options of instruction tuning."""

    def check(self) -> None:
        """Reject options that are invalid for any data.

        Raises:
            ConfigurationError: an option is invalid. Names the flag.
        """
        raise_problems([*below_minimum(self)])
        if self.load is None:
            raise ConfigurationError(
                "--load", "not given", "Name the pretrained checkpoint, with --finetune"
            )
        self.check_checkpoints()
        for flag, given, hint in (
            ("--load-gpt", self.load_gpt, "Continue its pretraining with pretrain_retro.py first"),
            ("--freeze-decoder", self.freeze_decoder, "Instruction tuning trains the decoder"),
        ):
            if given:
                raise ConfigurationError(flag, "given to finetune_retro", hint)
        if self.ft_neighbours < 0:
            raise ConfigurationError("--ft-neighbours", str(self.ft_neighbours), "Give 0 or more")
        if self.pack_open_samples is not None and not self.pack_samples:
            raise ConfigurationError(
                "--pack-open-samples",
                f"{self.pack_open_samples}, without packing",
                "Add --pack-samples",
            )
        if self.retro_attention_gate == 0.0:
            for flag, given in (
                ("--retro-num-neighbors", self.retro_num_neighbors is not None),
                ("--reuse-top", self.reuse_top),
            ):
                if given:
                    raise ConfigurationError(
                        flag,
                        "given, but with --retro-attention-gate 0 the encoder reads nothing",
                        "Give --retro-attention-gate 1 too",
                    )
