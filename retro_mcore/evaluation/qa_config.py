"""Configuration of a question answering evaluation. Imports no megatron, so `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from retro_mcore.data.instruction.examples import PassageKind
from retro_mcore.data.instruction.prompts import PromptFormat
from retro_mcore.errors import ConfigurationError
from retro_mcore.training.options.pretrain import ParallelOptions


@dataclass(kw_only=True)
class EvaluateQaConfig:
    """Configuration of a question answering evaluation."""

    sample_input_file: str
    """Test file: a JSON list, or JSON lines, of questions with `answers` and passages."""
    output: str
    """Directory for predictions (JSON lines) and scores.json."""
    project_dir: str | None = None
    """Project directory: its tokenizer, database and index."""
    load: str | None = None
    """Directory of the model's checkpoints; the latest answers."""
    predictions: str | None = None
    """Score this file instead of generating: a line of text, or of JSON with `pred`, per
    question."""
    task: str | None = None
    """The dataset's name (nq, tqa, …), which decides the prompt. Default: the name of the test
    file's directory."""
    passages: PassageKind = "retrieved"
    """The test file's passages: annotated (sub-paragraphs), retrieved (ctxs), or
    bert_pretrain_corpus."""
    ft_neighbours: int = 5
    """Passages in the prompt."""
    prompt_format: PromptFormat = "reformat_prompt_retro"
    """Words of the prompt."""
    template_id: int = 0
    """Another wording, 1 to 7, of reformat_prompt."""
    retro_neighbors: Literal["live", "passages", "none"] = "none"
    """What the neighbor encoder reads. live: neighbors from the project's index. passages: the test
    file's, after those in the prompt. none: the encoder is off, as InstructRetro answers."""
    retro_attention_gate: float | None = None
    """Scale of what the model reads in its neighbors. Default: the checkpoint's; a model that was
    tuned with 0 needs 1 here to read any."""
    reuse_top: bool = False
    """The encoder's passages begin with those in the prompt."""
    ablate_retrieval: bool = False
    """Answer with --retro-neighbors and again with the encoder off, and compare."""
    num_gen: int | None = None
    """Questions to answer, from the first. Default: all."""
    max_new_tokens: int = 64
    """Longest answer."""
    stop: list[str] = field(default_factory=list)
    """An answer ends before any of these texts."""
    two_chunks: bool = False
    """The prompt is the first chunk and the answer the second, whatever their lengths, as
    InstructRetro's models were tuned."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that make up this much probability; 1: from all, 0: take the
    most likely one."""
    seed: int = 1234
    """Seed of the draws (question i draws with seed + i) and of the confidence intervals."""
    micro_batch_size: int = 8
    """Questions that are answered together; an interrupted run repeats at most these."""
    legacy_scoring: bool = False
    """Also score as the retired Retro's evaluate.py does."""
    confidence_level: float = 0.95
    """Of the confidence intervals."""
    num_resamples: int = 1000
    """Resamples of the questions for the confidence intervals."""
    tensor_model_parallel_size: int = 1
    """Ranks that share one layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share out the layers; further ranks answer other questions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: CUDA where there is one, else the CPU."""

    @property
    def task_name(self) -> str:
        """The dataset's name: --task, or the name of the test file's directory."""
        return self.task or Path(self.sample_input_file).absolute().parent.name

    @property
    def needs_passages(self) -> bool:
        """Whether the test file's passages are read."""
        if self.predictions is not None:
            return False
        return self.ft_neighbours > 0 or self.retro_neighbors == "passages"

    def parallel(self) -> ParallelOptions:
        """The layout that the model is loaded into."""
        return ParallelOptions(
            device=self.device,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )

    def check(self) -> None:
        """Reject values out of range and options that contradict each other.

        Raises:
            ConfigurationError: naming the flag.
        """
        if self.predictions is None:
            for flag, value in (("--project-dir", self.project_dir), ("--load", self.load)):
                if value is None:
                    raise ConfigurationError(
                        flag, "not given", "Give it, or --predictions to score"
                    )
        if self.ablate_retrieval and self.retro_neighbors == "none":
            raise ConfigurationError(
                "--ablate-retrieval",
                "there is no retrieval to switch off with --retro-neighbors none",
                "Add --retro-neighbors live or passages",
            )
        if self.ablate_retrieval and self.predictions is not None:
            raise ConfigurationError("--ablate-retrieval", "given with --predictions", "Give one")
        for flag in ("num_gen", "max_new_tokens", "micro_batch_size", "num_resamples"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ConfigurationError(
                    f"--{flag.replace('_', '-')}", str(value), "Give at least 1"
                )
        if self.ft_neighbours < 0:
            raise ConfigurationError("--ft-neighbours", str(self.ft_neighbours), "Give 0 or more")
        if not 0 < self.confidence_level < 1:
            raise ConfigurationError(
                "--confidence-level", str(self.confidence_level), "Give a number between 0 and 1"
            )
        if self.reuse_top and (self.predictions or self.retro_neighbors != "passages"):
            found = "given, but the encoder reads none of the test file's passages"
            raise ConfigurationError("--reuse-top", found, "Add --retro-neighbors passages")
        if "" in self.stop:
            raise ConfigurationError("--stop", "an empty text", "Give texts to stop at")
