"""Read instruction and question-answering examples from common file formats.

Two kinds of records are supported:

- records of the retired Retro's instruction tuning and QA evaluation: a JSON list (or JSON lines)
  of `{"question", "answer" | "answers" | "longform_answer", "sub-paragraphs" | "ctxs" | ...}`;
- chats: JSON lines of `{"messages": [{"role", "content"}, ...]}`, with optional `ctxs`.
"""

from __future__ import annotations

import codecs
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from retro_mcore.errors import CorpusError
from retro_mcore.json_text import (
    JsonError,
    RepeatedKeyError,
    has_surrogates,
    json_lines,
    parse_json,
)

Role = Literal["system", "user", "assistant"]

#: Which passages of a record are used: the annotated ones (`sub-paragraphs`), the retrieved ones
#: (`ctxs`), or those from BERT's pretraining corpus.
PassageKind = Literal["annotated", "retrieved", "bert_pretrain_corpus"]


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: Role
    content: str


@dataclass(frozen=True)
class InstructionExample:
    """One question or chat.

    Attributes:
        dataset: Name of its dataset, which selects the prompt.
        source: `file, record N`, for error messages.
        question: The question with its choices, or an already formatted dialogue; empty for a
            chat.
        answers: Every accepted answer, as text; training uses the first. Empty if unknown.
        passages: Supporting passages as written in a prompt, best first.
        turns: The chat, up to the reply to learn; empty for a question.
        choices: Options of a multiple-choice question.
    """

    dataset: str
    source: str
    question: str = ""
    answers: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    choices: tuple[str, ...] = ()


def read_examples(
    files: Sequence[Path | str],
    dataset: str,
    passages: PassageKind = "annotated",
    longform_answer: bool = False,
) -> list[InstructionExample]:
    """Read all examples of the files, in order.

    Args:
        files: JSON lists or JSON lines.
        dataset: Dataset name, such as "nq"; see `data.instruction.prompts`.
        passages: Which passages to take from question records.
        longform_answer: Use `longform_answer` as the answer, and skip records without one.

    Raises:
        CorpusError: a file is missing or not JSON, or a record is unusable. Names file and record.
    """
    examples = []
    for file in map(Path, files):
        for number, record in enumerate(read_records(file)):
            source = f"{file}, record {number}"
            if longform_answer and _lacks_longform(record):
                continue
            examples.append(_example(record, dataset, source, passages, longform_answer))
    return examples


def num_without_longform(files: Sequence[Path | str]) -> int:
    """Number of records that `read_examples` skips with `longform_answer`."""
    return sum(_lacks_longform(record) for file in files for record in read_records(Path(file)))


def _lacks_longform(record: Mapping[str, Any]) -> bool:
    return "messages" not in record and "longform_answer" not in record


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON list or of JSON lines (which end at line feeds only).

    Raises:
        CorpusError: the file is malformed. Names the file and line.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CorpusError(
            file, f"cannot be read ({error.strerror})", "Name a UTF-8 JSON or JSONL file"
        ) from error
    for number, record in enumerate(_parse(file, data)):
        if not isinstance(record, dict):
            raise CorpusError(
                f"{file}, record {number}",
                f"is a {type(record).__name__}",
                "Expected an object such as {'question': ..., 'answers': [...]}",
            )
        if has_surrogates(record):
            raise CorpusError(
                f"{file}, record {number}",
                "holds half of a surrogate pair (such as \\ud83d), which is not a character",
                "Fix the text, or remove the record",
            )
        yield record


def _parse(file: Path, data: bytes) -> Iterator[Any]:
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        try:
            yield from parse_json(data, allow_nan=True, unique_keys=True)
            return
        except JsonError as error:
            raise _not_json(f"{file}:{error.line}", error) from error
    for number, line in json_lines(data):
        try:
            yield parse_json(line, allow_nan=True, unique_keys=True)
        except JsonError as error:
            raise _not_json(f"{file}:{number}", error) from error


def _not_json(where: str, error: JsonError) -> CorpusError:
    if isinstance(error, RepeatedKeyError):
        return CorpusError(where, str(error), "Keep one of them")
    return CorpusError(
        where, f"is not JSON ({error.in_line})", "Expected a JSON list or JSON lines, in UTF-8"
    )


def _example(
    record: Mapping[str, Any],
    dataset: str,
    source: str,
    kind: PassageKind,
    longform_answer: bool,
) -> InstructionExample:
    if "messages" in record:
        turns = _turns(record, source)
        passages = _retrieved(record, source) if "ctxs" in record else ()
        return InstructionExample(dataset, source, turns=turns, passages=passages)
    question = record.get("question")
    if not isinstance(question, str):
        raise CorpusError(source, "has no question", "Expected `question` or `messages`")
    choices: tuple[str, ...] = ()
    if record.get("qa_type") == "multi_choice_qa":
        options = _required(record, "multichoice_options", source)
        choices = tuple(_text(option, "an option", source) for option in options)
        question = with_choices(question, choices)
    return InstructionExample(
        dataset,
        source,
        question,
        _answers(record, longform_answer, source),
        _passages(record, kind, source),
        choices=choices,
    )


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question followed by its options, lettered from (A)."""
    lettered = [f"({chr(ord('A') + place)}) {choice}" for place, choice in enumerate(choices)]
    return f"{question}\nChoose one based on the following options: {' '.join(lettered)}"


def _answers(record: Mapping[str, Any], longform: bool, source: str) -> tuple[str, ...]:
    found = record.get("longform_answer") if longform else record.get("answers")
    if found is None and not longform:
        found = record.get("answer")
    if found is None:
        return ()
    listed = found if isinstance(found, list) else [found]
    return tuple(
        _text(answer["text"], "an answer", source).strip()
        if isinstance(answer, dict) and "text" in answer
        else _text(answer, "an answer", source)
        for answer in listed
    )


def _text(value: object, what: str, source: str) -> str:
    """The value as text; a number is converted."""
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise CorpusError(source, f"{what} is {reprlib.repr(value)}", "Expected a text")


def _passages(record: Mapping[str, Any], kind: PassageKind, source: str) -> tuple[str, ...]:
    if kind == "bert_pretrain_corpus":
        contexts = _required(record, "bert_pretrain_corpus_neighbours", source)
        return tuple(f"source: {_text(context, 'a neighbor', source)}" for context in contexts)
    if kind == "retrieved":
        return _retrieved(record, source)
    paragraphs = record.get("sub-paragraphs", record.get("sub_paragraph"))
    if isinstance(paragraphs, list):
        if len(paragraphs) < 2:
            raise CorpusError(source, "sub-paragraphs has no text", "Expected [title, text]")
        return (_passage(paragraphs[0], paragraphs[1], source),)
    return (_passage(None, paragraphs, source),)


def _retrieved(record: Mapping[str, Any], source: str) -> tuple[str, ...]:
    passages = []
    for context in _required(record, "ctxs", source):
        missing = [key for key in ("title", "text") if key not in _object(context)]
        if missing:
            raise CorpusError(
                source,
                f"a passage of ctxs lacks {missing[0]!r}",
                "Expected {'title': ..., 'text': ...}",
            )
        passages.append(_passage(context["title"], context["text"], source))
    return tuple(passages)


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _passage(title: object, text: object, source: str) -> str:
    """Format a passage as the prompts do. Null becomes an empty text."""
    parts = ["" if part is None else _text(part, "a passage", source) for part in (title, text)]
    return f"title: {parts[0]}, source: {parts[1]}"


def _required(record: Mapping[str, Any], key: str, source: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        held = ", ".join(name[:50] for name in list(record)[:20])
        raise CorpusError(source, f"has no list {key!r}", f"It has {held}")
    return value


def _turns(record: Mapping[str, Any], source: str) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for message in _required(record, "messages", source):
        said: Mapping[str, Any] = _object(message)
        role: Any = said.get("role")
        content = said.get("content")
        if role not in get_args(Role) or not isinstance(content, str):
            raise CorpusError(
                source,
                f"message {len(turns)} is {reprlib.repr(message)}",
                f"Expected a `role` of {', '.join(get_args(Role))} and a `content`",
            )
        turns.append(Turn(role, content))
    roles = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user", "assistant"] * (len(roles) // 2 + 1)
    if not roles or roles != expected[: len(roles)] or "system" in [t.role for t in turns[1:]]:
        raise CorpusError(
            source,
            f"roles {reprlib.repr([turn.role for turn in turns])}",
            "A chat is an optional system message, then user and assistant in turn",
        )
    return tuple(turns)
