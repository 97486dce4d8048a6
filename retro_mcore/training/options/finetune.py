"""The flags of instruction tuning. Imports neither torch nor megatron; see options.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retro_mcore.errors import ConfigurationError
from retro_mcore.training.options.checkpoints import CheckpointOptions, ReproducibilityOptions
from retro_mcore.training.options.logging import LoggingOptions
from retro_mcore.training.options.optimizer import OptimizerOptions
from retro_mcore.training.options.parallel import ParallelOptions, RecomputeOptions
from retro_mcore.training.options.pretrain import ExitOptions


@dataclass(kw_only=True)
class InstructionDataOptions:
    """What is learned from, and how it is written."""

    project_dir: str
    """Project directory, for the tokenizer and the chunk length."""
    data_path: list[str]
    """Datasets, or WEIGHT DATASET pairs: names in --data-folder, or JSON or JSONL files."""
    data_folder: str = "."
    """Where datasets lie: NAME/NAME_QA_train*.json and NAME/NAME_QA_dev.json."""
    valid_data_path: list[str] | None = None
    """Datasets to validate on, written as --data-path. Default: each NAME_QA_dev.json."""
    micro_batch_size: int
    """Samples per forward pass and process."""
    global_batch_size: int
    """Samples per iteration."""
    train_iters: int
    """Iterations to train."""
    seq_length: int | None = None
    """Tokens of a sample. Default: as the model was trained."""
    eval_interval: int = 200
    """Iterations between validations."""
    eval_iters: int = 100
    """Batches per validation, at most one pass over the data."""
    num_workers: int = 2
    """Processes that read samples ahead."""
    seed: int = 1234
    """Of the order of the samples and of dropout."""
    prompt_format: Literal["reformat_prompt_retro", "reformat_prompt", "reformat_prompt_short"] = (
        "reformat_prompt_retro"
    )
    """Words of the prompts, by the name of the InstructRetro release's function."""
    template_id: int = 0
    """1 to 7: another wording of reformat_prompt (the release's flan_format)."""
    passages: Literal["annotated", "retrieved", "bert_pretrain_corpus"] = "annotated"
    """Passages of question records: sub-paragraphs, ctxs, or bert_pretrain_corpus_neighbours."""
    longform_answer: bool = False
    """Learn the `longform_answer` of question records, and leave out those without one."""
    ft_neighbours: int = 1
    """Passages in the decoder's context."""
    reuse_top: bool = False
    """Give the encoder the best passages too, not only those after the decoder's."""
    loss_on: Literal["last-answer", "answers", "everything"] = "last-answer"
    """Which tokens are learned: the last answer, every answer of a chat, or all."""
    pack_samples: bool = False
    """Fill each sample with as many examples as fit; none sees another."""


@dataclass(kw_only=True)
class FinetuneModelOptions:
    """How the loaded model differs from what it was."""

    retro_attention_gate: float = 0.0
    """Scale of the cross-attention's output. 0, as InstructRetro: passages stand in the decoder's
    context alone, and encoder and cross-attention stay as they are. Else the encoder reads the
    passages that follow those in the context (RETRO++)."""
    retro_num_neighbors: int | None = None
    """Passages for the encoder. Default: as the model was trained."""
    hidden_dropout: float = 0.0
    """Dropout of hidden states in the decoder."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities in the decoder."""
    retro_encoder_hidden_dropout: float = 0.0
    """Dropout of hidden states in the neighbor encoder."""
    retro_encoder_attention_dropout: float = 0.0
    """Dropout of attention probabilities in the neighbor encoder."""


@dataclass(kw_only=True)
class FinetuneOptions(
    ExitOptions,
    LoggingOptions,
    CheckpointOptions,
    ReproducibilityOptions,
    OptimizerOptions,
    RecomputeOptions,
    ParallelOptions,
    FinetuneModelOptions,
    InstructionDataOptions,
):
    """Everything that instruction tuning is told."""

    def check(self) -> None:
        """Refuse what can be seen to be wrong without looking at the data.

        Raises:
            ConfigurationError: naming the flag.
        """
        for name in ("global_batch_size", "train_iters", "eval_interval", "eval_iters"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigurationError(flag, str(getattr(self, name)), "Choose at least 1")
        if self.load is None:
            raise ConfigurationError(
                "--load", "not given", "Name the pretrained checkpoint, with --finetune"
            )
        for flag, given, mend in (
            ("--load-gpt", self.load_gpt, "Continue its pretraining with pretrain_retro.py first"),
            ("--freeze-decoder", self.freeze_decoder, "Instruction tuning trains the decoder"),
        ):
            if given:
                raise ConfigurationError(flag, "given to finetune_retro", mend)
        if self.ft_neighbours < 0:
            raise ConfigurationError("--ft-neighbours", str(self.ft_neighbours), "Give 0 or more")
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
