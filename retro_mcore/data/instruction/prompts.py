"""Prompt formats of instruction-tuned Retro models.

The formats are named after the functions of the InstructRetro release and reproduce their text
exactly, because its checkpoints expect it. The wording of a question depends on its dataset: the
answer is a short phrase, true or false, one of several options, or a long answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from retro_mcore.data.instruction.examples import InstructionExample, Turn
from retro_mcore.errors import ConfigurationError

PromptFormat = Literal["reformat_prompt_retro", "reformat_prompt", "reformat_prompt_short"]

_SYSTEM = (
    "System: This is a chat between a user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions"
)
SYSTEM_RETRO = f"{_SYSTEM}.\n\n"
SYSTEM_CONTEXT = (
    f"{_SYSTEM} based on the context. The assistant should also indicate when the answer cannot be "
    "found in the context.\n\n"
)

# Datasets by form of answer, as listed in the release for each format.
_CHATS = {"oasst", "quiet_cockatoo", "open_inst", "quiet-cockatoo_commercial"}
_RETRO_DIALOGUES = {"doc2dial", "quac", "qrecc", "sharc"}
_RETRO_SHORT = {
    *("drop", "NarrativeQA", "QASC", "Quoref", "ROPES", "squad1.1", "squad2.0", "newsqa", "nq"),
    *("tqa", "quac"),
}
_RETRO_TRUE_OR_FALSE = {"BoolQ"}
_DIALOGUES = {"convqa", "chatgptgen", "doc2dial", "quac", "qrecc", "sharc"}
_SHORT = {
    *("drop", "NarrativeQA", "QASC", "Quoref", "ROPES", "squad1.1", "squad2.0", "newsqa", "nq"),
    *("BioASQ", "DuoRC_ParaphraseRC", "TextbookQA", "tqa"),
}
_TRUE_OR_FALSE = {"boolq", "multirc"}
_MULTIPLE_CHOICE = {"race"}

# By template id, from 1: text before the passages, and text between them and the question.
_TEMPLATES = (
    ("User: Answer based on context:\n\n", ""),
    ("User: ", "Answer this question based on the article: "),
    ("User: ", ""),
    ("User: ", "Answer this question: "),
    ("User: Read this article and answer this question ", ""),
    ("User: ", "Based on the above article, answer a question. "),
    ("User: Context: ", "Question: "),
)


@dataclass(frozen=True)
class Prompt:
    """A prompt whose passages may be cut to fit.

    Attributes:
        before: Text before the passages.
        passages: The passages, each followed by an empty line.
        question: Text after the passages; cut only if it does not fit by itself.
    """

    before: str
    passages: tuple[str, ...]
    question: str

    @property
    def context(self) -> str:
        """The passages as written in the prompt."""
        return "\n\n".join(self.passages) + "\n\n" if self.passages else ""

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.before + self.context + self.question


def write_prompt(
    example: InstructionExample,
    prompt_format: PromptFormat = "reformat_prompt_retro",
    num_passages: int = 1,
    template_id: int = 0,
) -> Prompt:
    """Write the prompt of an example. The answer follows after a space.

    Args:
        example: A question or a chat (up to the turn before its last reply).
        prompt_format: Wording of the prompt; for chats, the dialogue wording of the format.
        num_passages: Number of passages in the prompt (the release's ft_neighbours).
        template_id: 1 to 7 select another wording, in "reformat_prompt" only (flan_format).

    Raises:
        ConfigurationError: there is no such format or template.
    """
    if prompt_format not in _FORMATS:
        raise ConfigurationError(
            "--prompt-format", prompt_format, f"Choose {', '.join(get_args(PromptFormat))}"
        )
    if not 0 <= template_id <= len(_TEMPLATES):
        raise ConfigurationError("--template-id", str(template_id), "Choose 0 to 7")
    if template_id and prompt_format != "reformat_prompt":
        raise ConfigurationError(
            "--template-id", str(template_id), "Only --prompt-format reformat_prompt has templates"
        )
    passages = example.passages[:num_passages]
    if example.turns:
        return _chat_prompt(example.turns, passages, prompt_format)
    prompt = replace(_FORMATS[prompt_format](example, template_id), passages=passages)
    # The release uses no template without passages.
    if template_id and passages and example.dataset not in _CHATS:
        before, between = _TEMPLATES[template_id - 1]
        return Prompt(prompt.before + before, passages, between + prompt.question)
    if example.dataset in _CHATS and prompt_format != "reformat_prompt_short":
        return replace(prompt, passages=())
    return prompt


def write_turns(turns: tuple[Turn, ...]) -> str:
    """Write a dialogue, ready for the assistant's reply if the last turn is the user's."""
    names = {"user": "User", "assistant": "Assistant"}
    said = "\n\n".join(f"{names[turn.role]}: {turn.content}" for turn in turns)
    return f"{said}\n\nAssistant:" if turns[-1].role == "user" else said


def write_chat(turns: tuple[Turn, ...], prompt_format: PromptFormat) -> str:
    """Write a chat up to the assistant's next reply, without passages.

    Args:
        turns: The chat; it may begin with a system message, and ends with the user's.
        prompt_format: Wording of the system message, if the chat has none.
    """
    return _chat_prompt(turns, (), prompt_format).text


def _chat_prompt(
    turns: tuple[Turn, ...], passages: tuple[str, ...], prompt_format: PromptFormat
) -> Prompt:
    system = SYSTEM_RETRO if prompt_format == "reformat_prompt_retro" else SYSTEM_CONTEXT
    if turns[0].role == "system":
        system, turns = f"System: {turns[0].content}\n\n", turns[1:]
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    return Prompt(system, passages, write_turns(turns))


def _ask(user: str, short: bool) -> str:
    return f"User: {user}\n\nAssistant:{' The answer is' if short else ''}"


def _prompt_retro(example: InstructionExample, template_id: int) -> Prompt:
    question, dataset = example.question, example.dataset
    if dataset in _CHATS or dataset in _RETRO_DIALOGUES:
        return Prompt(SYSTEM_RETRO, (), question)
    if dataset in _RETRO_SHORT:
        wish = "with a short phrase"
    elif dataset in _RETRO_TRUE_OR_FALSE:
        wish = "with True or False"
    else:
        wish = "with a long complete answer"
    asked = _ask(f"{question} Answer the above question {wish}.", dataset in _RETRO_SHORT)
    return Prompt(SYSTEM_RETRO, (), asked)


def _prompt(example: InstructionExample, template_id: int) -> Prompt:
    question, dataset = example.question, example.dataset
    if dataset in _CHATS or dataset in _DIALOGUES:
        return Prompt(SYSTEM_CONTEXT, (), question)
    if dataset in _TRUE_OR_FALSE:
        user = f"Answer the following question with True or False. {question}"
    elif dataset in _MULTIPLE_CHOICE:
        user = "Answer the following question by selecting one of the provided options. " + question
    elif template_id:
        user = question
    elif dataset in _SHORT:
        user = f"Answer the following question with a short span. {question}"
    else:
        user = f"Please give a full and complete answer for the question. {question}"
    asked = _ask(user, dataset in _SHORT)
    return Prompt(SYSTEM_CONTEXT, (), asked.removeprefix("User: ") if template_id else asked)


def _prompt_short(example: InstructionExample, template_id: int) -> Prompt:
    question = example.question if example.question.endswith("?") else f"{example.question}?"
    return Prompt("", (), f"Question: {question} Answer: The answer is")


_FORMATS: dict[str, Callable[[InstructionExample, int], Prompt]] = {
    "reformat_prompt_retro": _prompt_retro,
    "reformat_prompt": _prompt,
    "reformat_prompt_short": _prompt_short,
}
