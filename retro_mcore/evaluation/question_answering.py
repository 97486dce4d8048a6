"""Answer the questions of a test file with a trained model, and score the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from retro_mcore.data.instruction.examples import InstructionExample
from retro_mcore.data.instruction.prompts import Prompt, PromptFormat, write_prompt
from retro_mcore.data.instruction.samples import (
    InstructionFormat,
    encoder_passages,
    fit_prompt,
)
from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.bootstrap import Estimate, estimate_mean
from retro_mcore.evaluation.qa_metrics import chosen_option, score
from retro_mcore.inference.generation import generate
from retro_mcore.inference.growing_text import new_text
from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.retrieval.neighbors import NeighborSource, SameNeighbors, neighbors_from_texts
from retro_mcore.session import LoadedModel, require_reading

#: Where the encoder's neighbors come from while a question is answered: the project's index, the
#: test file's passages, or nowhere.
QANeighbors = Literal["live", "passages", "none"]


@dataclass(frozen=True)
class QAOptions:
    """Options for asking and answering questions.

    Attributes:
        prompt_format: Wording of the prompt; see `data.instruction.prompts`.
        template_id: Alternative template of `reformat_prompt`.
        num_context_passages: Number of passages of the test file in the prompt.
        reuse_top: Also give the encoder the passages that are in the prompt.
        max_new_tokens: Maximum tokens of an answer.
        sampling: Sampling options; question i uses seed + i.
        stop: Texts that end an answer; not included in it.
        two_chunks: The prompt is the first chunk and the answer the second, whatever their lengths,
            as in InstructRetro's tuning. Otherwise chunks have the model's length.
    """

    prompt_format: PromptFormat = "reformat_prompt_retro"
    template_id: int = 0
    num_context_passages: int = 5
    reuse_top: bool = False
    max_new_tokens: int = 64
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(temperature=0.0))
    stop: tuple[str, ...] = ()
    two_chunks: bool = False


class QuestionAnswerer:
    """Answers questions in batches.

    Args:
        loaded: The model.
        examples: The test file's questions.
        options: Options for asking and answering.
        neighbors: Kind of neighbors for the encoder.

    Raises:
        ConfigurationError: the longest answer leaves no room for a prompt, or the model would not
            read the neighbors.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        examples: Sequence[InstructionExample],
        options: QAOptions,
        neighbors: QANeighbors,
    ) -> None:
        if options.max_new_tokens >= loaded.window:
            raise ConfigurationError(
                "--max-new-tokens",
                f"{options.max_new_tokens}, but the model reads {loaded.window} tokens",
                "Give fewer, to leave room for the question",
            )
        if neighbors != "none":
            flag = "--retro-neighbors"
            require_reading(loaded.arguments, f"{flag} {neighbors}", f"Use {flag} none")
        self._loaded, self._examples, self._options = loaded, examples, options
        self._neighbors = neighbors
        self._format = InstructionFormat(
            sequence_length=loaded.arguments.retro_chunk_length * 2,  # irrelevant here
            num_context_passages=options.num_context_passages,
            num_encoder_passages=loaded.arguments.retro_num_neighbors,
            reuse_top=options.reuse_top,
            chunk_length=loaded.arguments.retro_chunk_length,
            retrieved_length=loaded.retrieved_length,
        )

    def prompt_tokens(self, example: InstructionExample) -> list[int]:
        """Tokens of a question's prompt. Passages are cut if it would not fit the window."""
        tokenizer = self._loaded.tokenizer
        return [*tokenizer.beginning, *fit_prompt(self._prompt(example), self._room, tokenizer)]

    def _prompt(self, example: InstructionExample) -> Prompt:
        options = self._options
        return write_prompt(
            example, options.prompt_format, options.num_context_passages, options.template_id
        )

    @property
    def _room(self) -> int:
        """Maximum number of tokens for a prompt's text."""
        beginning = self._loaded.tokenizer.beginning
        return self._loaded.window - self._options.max_new_tokens - len(beginning)

    def _left_out(self, example: InstructionExample, num_prompt_tokens: int) -> dict[str, int]:
        """Numbers of tokens cut from the prompt, the question and the encoder's passages."""
        prompt, tokenize = self._prompt(example), self._loaded.tokenizer.tokenize
        num_prompt_tokens -= len(self._loaded.tokenizer.beginning)
        passages: tuple[str, ...] = ()
        if self._neighbors == "passages":
            passages = encoder_passages(example, self._format)
        longer = [len(tokenize(text)) - self._loaded.retrieved_length for text in passages]
        return {
            "prompt_tokens_cut": max(0, len(tokenize(prompt.text)) - num_prompt_tokens),
            "question_tokens_cut": max(
                0, len(tokenize(prompt.before + prompt.question)) - self._room
            ),
            "encoder_tokens_cut": sum(max(0, tokens) for tokens in longer),
        }

    def answer(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Predictions for the questions with these (consecutive) indexes."""
        examples = [self._examples[place] for place in places]
        sampling = self._options.sampling
        requests = GenerationRequest(
            sampling=replace(sampling, seed=sampling.seed + places[0]),
            stopping=StoppingOptions(
                self._options.max_new_tokens, stop_strings=tuple(self._options.stop)
            ),
            two_chunks=self._options.two_chunks,
        ).for_prompts(
            [self.prompt_tokens(example) for example in examples],
            [self._source(example) for example in examples],
        )
        texts = generate(self._loaded.model, self._loaded.tokenizer, requests)
        return [
            {
                "id": place,
                "question": question_of(example),
                "pred": new_text(self._loaded.tokenizer, text),
                "answers": list(example.answers),
                "finish_reason": text.finish_reason,
                "prompt_tokens": text.prompt_length,
                **self._left_out(example, text.prompt_length),
            }
            for place, example, text in zip(places, examples, texts, strict=True)
        ]

    def _source(self, example: InstructionExample) -> NeighborSource | None:
        if self._neighbors == "none":
            return None
        if self._neighbors == "live":
            return self._loaded.retriever
        passages = encoder_passages(example, self._format)
        sizes = (self._format.num_encoder_passages, self._format.retrieved_length)
        return SameNeighbors(neighbors_from_texts(passages, self._loaded.tokenizer, *sizes))


def report_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count answers whose input was cut, and answers that are cut or empty.

    Args:
        rows: Predictions from `QuestionAnswerer.answer`.
    """
    return {
        "prompts_cut": sum(row.get("prompt_tokens_cut", 0) > 0 for row in rows),
        "questions_cut": sum(row.get("question_tokens_cut", 0) > 0 for row in rows),
        "encoder_passages_cut": sum(row.get("encoder_tokens_cut", 0) > 0 for row in rows),
        "answers_cut": sum(row.get("finish_reason") == "length" for row in rows),
        "answers_empty": sum(not row["pred"].strip() for row in rows),
    }


def num_without_option(predictions: Sequence[str], examples: Sequence[InstructionExample]) -> int:
    """Number of predictions that name none of their question's options."""
    return sum(
        bool(example.choices) and chosen_option(prediction, example.choices) is None
        for prediction, example in zip(predictions, examples, strict=True)
    )


def question_of(example: InstructionExample) -> str:
    """The question, or the last one of a chat."""
    if not example.turns:
        return example.question
    return next(turn.content for turn in reversed(example.turns) if turn.role == "user")


def score_all(
    predictions: Sequence[str], examples: Sequence[InstructionExample]
) -> dict[str, list[float]]:
    """Scores of every question, by metric; `accuracy` only for those with options.

    Raises:
        CorpusError: a question has no usable answers.
    """
    scores: dict[str, list[float]] = {}
    for prediction, example in zip(predictions, examples, strict=True):
        for name, value in score(prediction, example).items():
            scores.setdefault(name, []).append(value)
    return scores


def estimate_all(
    scores: Mapping[str, Sequence[float]],
    confidence_level: float,
    num_resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """The mean of each metric and its confidence interval."""
    return {
        name: estimate_mean(values, confidence_level, num_resamples, seed)
        for name, values in scores.items()
    }
