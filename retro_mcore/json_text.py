"""JSON that somebody else wrote: whatever it holds, reading it ends in a value or in one error."""

from __future__ import annotations

import json
import re
from typing import Any

#: The code points that UTF-16 uses in pairs; alone they are no characters.
_SURROGATES = re.compile("[\ud800-\udfff]")


class JsonError(ValueError):
    """A text that is not JSON, or JSON that no sane writer makes; the message says which."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Bytes are UTF-8, with or without a byte order mark. NaN and infinities are refused, which
    `json.loads` would accept.

    Raises:
        JsonError: not JSON, not UTF-8, nested too deeply, or a number of thousands of digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text, parse_constant=_refuse_constant)
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
    raise JsonError(f"not JSON ({name} is no number)")


def replace_surrogates(text: str) -> tuple[str, int]:
    """Replace lone surrogates by U+FFFD; returns the text and how many were replaced.

    JSON can write them (`"\\ud83d"`), and no encoding of text can.
    """
    return _SURROGATES.subn("\ufffd", text)
