"""Configuration of a question answering evaluation. Imports no megatron, so `--help` is fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from retro_mcore.data.instruction.examples import PassageKind
from retro_mcore.data.instruction.prompts import PromptFormat
from retro_mcore.errors import ConfigurationError, flag_of, raise_problems, too_small
from retro_mcore.time_limit import InferenceTimeLimit
from retro_mcore.training.options.parallel import ParallelOptions, divided_texts

_LEAST = {
    "num_gen": 1,
    "max_new_tokens": 1,
    "micro_batch_size": 1,
    "num_resamples": 1,
    "ft_neighbours": 0,
}
#: Options of the answers, which given predictions already are.
OF_ANSWERS = (
    *("project_dir", "load", "passages", "ft_neighbours", "prompt_format", "template_id"),
    *("retro_neighbors", "retro_attention_gate", "max_new_tokens", "stop", "two_chunks"),
    *("temperature", "top_k", "top_p"),
)


@dataclass(kw_only=True)
class EvaluateQaConfig(InferenceTimeLimit):
    """Configuration of a question answering evaluation."""

    sample_input_file: str
    """Test file: a JSON list, or JSON lines, of questions with `answers` and passages."""
    output: str
    """Output directory for predictions (JSON lines) and scores.json."""
    project_dir: str | None = None
    """Project directory with tokenizer, database and index."""
    load: str | None = None
    """Directory of the model's checkpoints; the latest is used."""
    predictions: str | None = None
    """Score this file instead of generating: a line of text, or of JSON with `pred`, per
    question."""
    task: str | None = None
    """Dataset name (nq, tqa, …), which selects the prompt. Default: the name of the test file's
    directory."""
    passages: PassageKind = "retrieved"
    """The test file's passages: annotated (sub-paragraphs), retrieved (ctxs), or
    bert_pretrain_corpus."""
    ft_neighbours: int = 5
    """Number of passages in the prompt."""
    prompt_format: PromptFormat = "reformat_prompt_retro"
    """Format of the prompt."""
    template_id: int = 0
    """Alternative template of reformat_prompt, from 1 to 7."""
    retro_neighbors: Literal["live", "passages", "none"] = "none"
    """What the neighbor encoder reads. live: neighbors from the project's index. passages: the test
    file's, after those in the prompt. none: the encoder is off, as InstructRetro answers."""
    retro_attention_gate: float | None = None
    """Scale of the cross-attention output. Default: the checkpoint's. A model tuned with 0 needs 1
    to use its neighbors."""
    reuse_top: bool = False
    """Also give the encoder the passages that are in the prompt."""
    ablate_retrieval: bool = False
    """Answer with --retro-neighbors, then again with the encoder off, and compare."""
    num_gen: int | None = None
    """Number of questions to answer, from the first. Default: all."""
    max_new_tokens: int = 64
    """Longest answer."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer; not included in it."""
    two_chunks: bool = False
    """Use the prompt as the first chunk and the answer as the second, whatever their lengths, as in
    InstructRetro's tuning."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens with this total probability; 1: from all, 0: take the most
    likely one."""
    seed: int = 1234
    """Seed of sampling (question i uses seed + i) and of the confidence intervals."""
    micro_batch_size: int = 8
    """Number of questions per batch; an interrupted run repeats at most one batch."""
    legacy_scoring: bool = False
    """Also compute the scores of the retired Retro's evaluate.py."""
    confidence_level: float = 0.95
    """Confidence level of the intervals."""
    num_resamples: int = 1000
    """Number of bootstrap resamples for the confidence intervals."""
    tensor_model_parallel_size: int = 1
    """Number of tensor parallel ranks."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages. Remaining ranks answer other questions (data parallel)."""
    context_parallel_size: int = 1
    """Not supported: generation reads whole texts on every rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: CUDA if available, else the CPU."""

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
        """The parallel layout that the model is loaded into."""
        return ParallelOptions(
            device=self.device,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )

    def check(self) -> None:
        """Reject values out of range and conflicting options.

        Raises:
            ConfigurationError: a value is invalid. Names the flag.
            SeveralErrors: several values are invalid.
        """
        raise_problems([*too_small(self, _LEAST), *self._problems()])

    def _problems(self) -> Iterator[ConfigurationError]:
        yield from divided_texts(self.context_parallel_size)
        if self.predictions is None:
            for flag, value in (("--project-dir", self.project_dir), ("--load", self.load)):
                if value is None:
                    yield ConfigurationError(
                        flag, "not given", "Give it, or --predictions to score"
                    )
        else:
            usual = EvaluateQaConfig(sample_input_file="", output="")
            for name in OF_ANSWERS:
                if getattr(self, name) != getattr(usual, name):
                    found = "given with --predictions, which are answers already"
                    yield ConfigurationError(flag_of(name), found, "Give one of them")
        if self.ablate_retrieval and self.retro_neighbors == "none":
            yield ConfigurationError(
                "--ablate-retrieval",
                "there is no retrieval to switch off with --retro-neighbors none",
                "Add --retro-neighbors live or passages",
            )
        if self.ablate_retrieval and self.predictions is not None:
            yield ConfigurationError("--ablate-retrieval", "given with --predictions", "Give one")
        if not 0 < self.confidence_level < 1:
            yield ConfigurationError(
                "--confidence-level", str(self.confidence_level), "Give a number between 0 and 1"
            )
        if self.reuse_top and (self.predictions or self.retro_neighbors != "passages"):
            found = "given, but the encoder reads none of the test file's passages"
            yield ConfigurationError("--reuse-top", found, "Add --retro-neighbors passages")
        if "" in self.stop:
            yield ConfigurationError("--stop", "an empty text", "Give texts to stop at")
