"""Write a conversation as the prompt that a model was tuned on.

The wording is InstructRetro's for models that finetune_retro tuned. Else it is a Jinja template:
the file of --chat-template, or the one that the project's tokenizer came with. Templates run in
Jinja's sandbox, with the names that transformers gives them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from retro_mcore.data.instruction.examples import Turn
from retro_mcore.data.instruction.prompts import PromptFormat, write_chat
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.errors import ConfigurationError

if TYPE_CHECKING:
    from retro_mcore.data.instruction.examples import Role

#: A conversation: role ("system", "user" or "assistant") and content of each message.
Messages = Sequence[Mapping[str, str]]
#: From a conversation to the tokens of the prompt for the next reply.
ChatPrompt = Callable[[Messages], list[int]]

#: Unicode's noncharacters, which no text contains: they keep a special token's name in a message
#: apart from the token.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatError(ValueError):
    """A conversation that the template refuses."""


def written_chat(
    tokenize: Callable[[Sequence[str]], list[list[int]]], prompt_format: PromptFormat
) -> ChatPrompt:
    """The wording of finetune_retro's chats.

    Args:
        tokenize: Converts prompts to tokens, with BOS if documents have it.
        prompt_format: Wording that the model was tuned with.
    """

    def prompt(messages: Messages) -> list[int]:
        turns = tuple(Turn(cast("Role", each["role"]), each["content"]) for each in messages)
        if any(turn.role == "system" for turn in turns[1:]):
            raise ChatError("a system message must come first")
        if turns[-1].role != "user":
            raise ChatError("the last message must be the user's")
        return tokenize([write_chat(turns, prompt_format)])[0]

    return prompt


class ChatTemplate:
    """A Jinja template with the tokenizer that encodes what it writes.

    Args:
        template: The template.
        tokenizer: The project's tokenizer.
        source: Where the template comes from, for errors.

    Raises:
        ConfigurationError: the template is malformed.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, source: str) -> None:
        self._tokenizer = tokenizer
        names = [name for name in tokenizer.special_names if len(name) > 1]
        longest_first = sorted(names, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateError as error:
            found = f"not a chat template ({error})"
            raise ConfigurationError(source, found, "Name a file that holds one") from error

    def __call__(self, messages: Messages) -> list[int]:
        """Tokens of the prompt for the next reply.

        A special token's name in a message stays text.

        Raises:
            ChatError: the template refuses the messages.
        """
        if not any(self._special.search(each["content"]) for each in messages):
            return self._tokenizer.tokenize_with_special(self._render(messages))
        whole = "".join(each["content"] for each in messages)
        mark = next((sign for sign in _NONCHARACTERS if sign not in whole), None)
        if mark is None:
            raise ChatError("messages contain every noncharacter of Unicode")
        marked = [
            {**each, "content": self._special.sub(lambda m: _split(m[0], mark), each["content"])}
            for each in messages
        ]
        return self._encode_marked(self._render(marked), mark)

    def _render(self, messages: Messages) -> str:
        tokenizer = self._tokenizer
        bos = None if tokenizer.bos is None else tokenizer.token_name(tokenizer.bos)
        try:
            return self._template.render(
                messages=[dict(each) for each in messages],
                add_generation_prompt=True,
                bos_token=bos or "",
                eos_token=tokenizer.token_name(tokenizer.eod),
                tools=None,
                documents=None,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ChatError(" ".join(str(error).split())) from error

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Encode a text piece by piece; special tokens' names with a mark inside are text."""
        tokens: list[int] = []
        start = 0
        for match in [*self._special.finditer(text), None]:
            end = len(text) if match is None else match.start()
            if piece := text[start:end].replace(mark, ""):
                tokens += self._tokenizer.tokenize(piece)
            if match is not None:
                tokens += self._tokenizer.tokenize_with_special(match[0])
                start = match.end()
        return tokens


def _split(name: str, mark: str) -> str:
    return f"{name[0]}{mark}{name[1:]}"


class _Generation(Extension):
    """`{% generation %}`, which marks replies for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Any) -> list[nodes.Node]:
        """Parse the body."""
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def read_template(path: str) -> str:
    """The template in the file of --chat-template.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--chat-template {path}", str(error), "Name a file") from error


def declared_template(directory: Path) -> tuple[str, str] | None:
    """A tokenizer's own template with its file's name; None if it has none.

    Args:
        directory: The tokenizer's directory.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8"), str(file)
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    template = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(template, list):  # several, by name
        listed = [each for each in template if isinstance(each, dict)]
        named = {each.get("name"): each.get("template") for each in listed}
        template = named.get("default")
    return (template, str(file)) if isinstance(template, str) else None


def chat_prompt(
    tokenizer: Tokenizer,
    tokenize: Callable[[Sequence[str]], list[list[int]]],
    given: str | None,
    prompt_format: PromptFormat | None,
) -> ChatPrompt | None:
    """How a model's conversations are written; None if nothing says it.

    Args:
        tokenizer: The project's tokenizer.
        tokenize: Converts prompts to tokens, with BOS if documents have it.
        given: File of --chat-template.
        prompt_format: Wording that finetune_retro tuned the model with, if it did.

    Raises:
        RetroError: the template cannot be read or is malformed.
    """
    if given is not None:
        return ChatTemplate(read_template(given), tokenizer, f"--chat-template {given}")
    if prompt_format is not None:
        return written_chat(tokenize, prompt_format)
    for directory in {file if file.is_dir() else file.parent for file in tokenizer.files}:
        if (found := declared_template(directory)) is not None:
            return ChatTemplate(found[0], tokenizer, found[1])
    return None
