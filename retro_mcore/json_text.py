"""Parse untrusted JSON: any input gives either a value or a `JsonError`."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

#: Characters that end a line for `str.splitlines`, and that JSON strings may hold as they are.
_SEPARATORS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}
#: Surrogate code points, which UTF-16 uses in pairs; alone they are not characters.
_SURROGATES = re.compile("[\ud800-\udfff]")


class JsonError(ValueError):
    """The text is not JSON, or is JSON beyond reasonable limits; the message says which."""

    @property
    def line(self) -> int:
        """Line number, from 1, where parsing ended; 1 if unknown."""
        cause = self.__cause__
        if isinstance(cause, UnicodeDecodeError):
            return cause.object.count(b"\n", 0, cause.start) + 1
        return cause.lineno if isinstance(cause, json.JSONDecodeError) else 1

    @property
    def in_line(self) -> str:
        """Message without the line number, for single lines: `Expecting value, column 7`."""
        cause = self.__cause__
        if isinstance(cause, json.JSONDecodeError):
            return f"{cause.msg}, column {cause.colno}"
        return str(self)


def json_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each non-blank line with its number, from 1, for `parse_json`.

    Lines end at line feeds only; a carriage return before one is white space. Other separators of
    `splitlines`, such as U+2028 and U+0085, may occur inside a string.
    """
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield number, line


def json_line(value: Any) -> str:
    """The value as JSON without any character that a reader may take for the end of a line."""
    return json.dumps(value, ensure_ascii=False).translate(_SEPARATORS)


class RepeatedKeyError(JsonError):
    """An object has a key more than once, so its value is ambiguous."""


class RecordWithRepeats(dict[str, Any]):
    """An object with repeated keys; holds the last value of each.

    Attributes:
        repeated: The repeated keys.
    """

    repeated: tuple[str, ...] = ()


def parse_json(text: str | bytes, allow_nan: bool = False, unique_keys: bool = False) -> Any:
    """Parse a JSON text.

    Bytes are UTF-8, with or without a byte order mark. Unlike `json.loads`, NaN and infinities are
    rejected by default. They can be allowed because `json.dumps` writes them, and under unused keys
    they are harmless.

    Args:
        text: The JSON text.
        allow_nan: Accept NaN and infinities.
        unique_keys: Reject objects with repeated keys. Otherwise the last value counts, and the
            object is a `RecordWithRepeats`.

    Raises:
        JsonError: not JSON, not UTF-8, nested too deeply, or a number with thousands of digits.
        RepeatedKeyError: an object has a repeated key, with `unique_keys`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(
            text,
            parse_constant=None if allow_nan else _refuse_constant,
            object_pairs_hook=_unique if unique_keys else _last_of_each,
        )
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise JsonError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON ({error})") from error
    except JsonError:
        raise
    except ValueError as error:  # an integer longer than Python converts
        raise JsonError("a number with thousands of digits") from error


def _refuse_constant(name: str) -> Any:
    raise JsonError(f"not JSON ({name} is not allowed)")


def _last_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    record = RecordWithRepeats(values)
    counts = Counter(key for key, _ in pairs)
    record.repeated = tuple(key for key, count in counts.items() if count > 1)
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = _last_of_each(pairs)
    if isinstance(values, RecordWithRepeats):
        names = ", ".join(ascii(key)[1:-1] for key in values.repeated)
        raise RepeatedKeyError(f"has the key {names} more than once")
    return values


def replace_surrogates(text: str) -> tuple[str, int]:
    """Replace lone surrogates with U+FFFD; returns the text and the number of replacements.

    JSON can write them (`"\\ud83d"`), and no encoding of text can.
    """
    return _SURROGATES.subn("\ufffd", text)


def has_surrogates(value: Any) -> bool:
    """Whether any string in a JSON value contains a lone surrogate."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and _SURROGATES.search(value):
            return True
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
    return False
