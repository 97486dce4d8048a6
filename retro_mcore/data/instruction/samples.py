"""Instruction-tuning samples: a prompt, its answer, and passages for the decoder or the encoder.

Shapes: S sequence, L chunks per sample, K neighbors, R retrieved length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from retro_mcore.data.instruction.examples import InstructionExample, Turn
from retro_mcore.data.instruction.prompts import Prompt, PromptFormat, write_prompt, write_turns
from retro_mcore.data.retrieved import pad_texts
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.errors import ConfigurationError, CorpusError


@dataclass(frozen=True)
class InstructionFormat:
    """How an example becomes tokens.

    Attributes:
        sequence_length: S.
        prompt_format: Wording of the prompt; see `data.instruction.prompts`.
        template_id: See `data.instruction.prompts.write_prompt`.
        num_context_passages: Passages in the decoder's context (`--ft-neighbours`).
        num_encoder_passages: Passages for the neighbor encoder, K; 0 disables the encoder.
        reuse_top: Give the encoder the best passages, even if the decoder has them too. Otherwise
            it gets those after the decoder's (RETRO++: Wang et al. 2023, section 5.2).
        chunk_length: M.
        retrieved_length: R.
        loss_on: The last answer, every answer of a chat, or everything.
        beginning: Tokens that every example begins with: the tokenizer's BOS, or none.
    """

    sequence_length: int
    prompt_format: PromptFormat = "reformat_prompt_retro"
    template_id: int = 0
    num_context_passages: int = 1
    num_encoder_passages: int = 0
    reuse_top: bool = False
    chunk_length: int = 64
    retrieved_length: int = 128
    loss_on: Literal["last-answer", "answers", "everything"] = "last-answer"
    beginning: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_encoder_passages and self.sequence_length % self.chunk_length:
            raise ConfigurationError(
                "--seq-length",
                f"{self.sequence_length} is not a multiple of the chunk length {self.chunk_length}",
                "Choose a multiple of it",
            )


@dataclass(frozen=True)
class EncodedExample:
    """A tokenized example.

    Attributes:
        tokens: i64 [n], at most S + 1: prompt, answer, end of document.
        trained: bool [n], True for the tokens to learn.
        passages: i64 [K, R] for the encoder, padded with the end of document; None without encoder.
        passage_mask: bool [K, R], True = padding or missing.
    """

    tokens: np.ndarray
    trained: np.ndarray
    passages: np.ndarray | None = None
    passage_mask: np.ndarray | None = None


def encode_example(
    example: InstructionExample, format: InstructionFormat, tokenizer: Tokenizer
) -> EncodedExample:
    """Tokenize an example.

    If it does not fit S, passages are cut first, then a chat's oldest turns, then the beginning of
    the prompt. The question keeps at least half of S. An answer that is still too long is cut, and
    the model does not learn to stop at the cut.

    Raises:
        CorpusError: the example has no answer to learn.
    """
    fitted = fit_example(example, format, tokenizer)
    parts = [([*format.beginning, *fitted.prompt_tokens], False), *fitted.parts]
    tokens, trained = _join(parts, format.sequence_length, tokenizer.eod)
    if format.loss_on == "everything":
        trained = np.ones_like(trained)
    if not format.num_encoder_passages:
        return EncodedExample(tokens, trained)
    passages, mask = pad_texts(
        encoder_passages(example, format),
        tokenizer,
        format.num_encoder_passages,
        format.retrieved_length,
    )
    return EncodedExample(tokens, trained, passages, mask)


def encoder_passages(example: InstructionExample, format: InstructionFormat) -> tuple[str, ...]:
    """Passages for the neighbor encoder, at most K."""
    first = 0 if format.reuse_top else format.num_context_passages
    return example.passages[first : first + format.num_encoder_passages]


@dataclass(frozen=True)
class FittedExample:
    """Text and tokens of an example, cut to fit S.

    Attributes:
        example: The example without the oldest turns that do not fit.
        prompt: The whole prompt, uncut.
        prompt_tokens: The part of it that fits, without the beginning of every example.
        context_length: Number of passage tokens in `prompt_tokens`.
        parts: Tokens after the prompt, and whether they are learned; `_join` cuts it at the end.
    """

    example: InstructionExample
    prompt: Prompt
    prompt_tokens: list[int]
    context_length: int
    parts: list[tuple[list[int], bool]]


def fit_prompt(prompt: Prompt, limit: int, tokenizer: Tokenizer) -> list[int]:
    """The prompt in at most `limit` tokens, cut as described in `encode_example`."""
    return _fit_prompt(prompt, limit, tokenizer)[0]


def _fit_prompt(prompt: Prompt, limit: int, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The prompt, and the number of passage tokens in it."""
    fixed = len(tokenizer.tokenize(prompt.before)) + len(tokenizer.tokenize(prompt.question))
    context = tokenizer.tokenize(prompt.context) if prompt.passages else []
    room = min(limit - fixed, len(context))
    while True:
        # Cut by tokens but joined as text, so the text around the cut may be tokenized differently.
        kept = tokenizer.detokenize(context[:room]) if room > 0 else ""
        ids = tokenizer.tokenize(prompt.before + kept + prompt.question)
        if len(ids) <= limit or not kept:
            return ids[-limit:] if limit > 0 else [], room if kept else 0
        room -= len(ids) - limit


def fit_example(
    example: InstructionExample, format: InstructionFormat, tokenizer: Tokenizer
) -> FittedExample:
    """Cut an example to fit, as described in `encode_example`.

    Raises:
        CorpusError: the example has no answer to learn.
    """
    if example.turns and format.loss_on == "answers":
        fitted = _fit_every_answer(example, format, tokenizer)
        if fitted is not None:
            return fitted
    answer = tokenizer.tokenize(f" {answer_of(example)}")
    room = format.sequence_length - len(format.beginning)
    limit = room - min(len(answer), format.sequence_length // 2)
    while True:
        prompt = write_prompt(
            example, format.prompt_format, format.num_context_passages, format.template_id
        )
        shorter = _without_oldest_turns(example)
        fixed = tokenizer.tokenize(prompt.before + prompt.question)
        if len(fixed) <= limit or shorter is None:
            fit = _fit_prompt(prompt, limit, tokenizer)
            return FittedExample(example, prompt, *fit, [(answer, True)])
        example = shorter


def answer_of(example: InstructionExample) -> str:
    """The answer that is learned.

    Raises:
        CorpusError: there is none.
    """
    if example.turns and example.turns[-1].role == "assistant":
        return example.turns[-1].content
    if example.turns or not example.answers:
        raise CorpusError(
            example.source, "has no answer to learn", "End a chat with the assistant's reply"
        )
    return example.answers[0]


def _without_oldest_turns(example: InstructionExample) -> InstructionExample | None:
    """Drop the first question and its reply; None if only the last question is left."""
    system = tuple(turn for turn in example.turns if turn.role == "system")
    said = example.turns[len(system) :]
    return replace(example, turns=system + said[2:]) if len(said) > 2 else None


def _fit_every_answer(
    example: InstructionExample, format: InstructionFormat, tokenizer: Tokenizer
) -> FittedExample | None:
    """Fit a chat in which every reply is learned and ends with the end of document.

    None if not even the last question and reply fit.
    """
    answer_of(example)
    shorter: InstructionExample | None = example
    while shorter is not None:
        fitted = _fit_whole_chat(shorter, format, tokenizer)
        if fitted is not None:
            return fitted
        shorter = _without_oldest_turns(shorter)
    return None


def _fit_whole_chat(
    example: InstructionExample, format: InstructionFormat, tokenizer: Tokenizer
) -> FittedExample | None:
    """Fit all turns of the chat; None if they do not fit."""
    num_system = sum(turn.role == "system" for turn in example.turns)
    replies = [
        (tokenizer.tokenize(_continued(turn)), turn.role == "assistant")
        for turn in example.turns[num_system + 1 :]
    ]
    first = replace(example, turns=example.turns[: num_system + 1])
    prompt = write_prompt(
        first, format.prompt_format, format.num_context_passages, format.template_id
    )
    room = format.sequence_length + 1 - len(format.beginning)
    limit = room - sum(len(ids) + learned for ids, learned in replies)
    if len(tokenizer.tokenize(prompt.before + prompt.question)) > limit:
        return None
    return FittedExample(example, prompt, *_fit_prompt(prompt, limit, tokenizer), replies)


def _continued(turn: Turn) -> str:
    return f" {turn.content}" if turn.role == "assistant" else f"\n\n{write_turns((turn,))}"


def _join(
    parts: Sequence[tuple[list[int], bool]], sequence_length: int, eod: int
) -> tuple[np.ndarray, np.ndarray]:
    """Join the parts, with the end of document after each answer. Returns tokens and trained."""
    tokens: list[int] = []
    trained: list[bool] = []
    for ids, is_answer in parts:
        whole = [*ids, eod] if is_answer else ids
        tokens += whole
        trained += [is_answer] * len(whole)
    length = sequence_length + 1
    return np.array(tokens[:length], np.int64), np.array(trained[:length])
