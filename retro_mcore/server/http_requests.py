"""Parse and validate HTTP requests from untrusted clients."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Container
from email.message import Message
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from retro_mcore.errors import RetroError
from retro_mcore.json_text import JsonError, parse_json, replace_surrogates
from retro_mcore.server.completions import FIELDS
from retro_mcore.server.streams import RequestError

_Request = TypeVar("_Request", bound=BaseModel)
#: Request fields that correspond to our flags.
_FIELD_OF_FLAG = {
    "--max-new-tokens": "max_tokens",
    "--min-new-tokens": "min_tokens",
    "--stop": "stop",
    "--stop-token-ids": "stop_token_ids",
    "--temperature": "temperature",
    "--top-k": "top_k",
    "--top-p": "top_p",
    "--seed": "seed",
    "--logprobs": "logprobs",
    "--retro-neighbors": "retrieve",
}
#: Fields of several types, where the first validation error would name only the first type.
_EXPECTED = {
    "prompt": "expected a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "expected a text or a list of texts, each of at most 1000 characters",
    "neighbors": "expected a list of texts, or one such list for each prompt",
}


def check_key(request: Request, api_key: str | None) -> None:
    """Reject a request without the server's key.

    Raises:
        RequestError: the key is missing or wrong (401).
    """
    if api_key is None:
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    # Headers are decoded as Latin-1, which accepts any bytes.
    same = hmac.compare_digest(sent.strip().encode("latin-1"), api_key.encode())
    if scheme.lower() != "bearer" or not same:
        raise RequestError(
            401, "a bearer token is needed; none or a wrong one was sent", code="invalid_api_key"
        )


async def read_json(request: Request, max_bytes: int, seconds: float) -> Any:
    """Read the JSON value in a request's body.

    Args:
        request: The request.
        max_bytes: Maximum size of the body.
        seconds: Time limit for receiving it.

    Raises:
        RequestError: wrong content type (415), too large (413), too slow (408), or not JSON.
    """
    _check_content_type(request.headers.get("content-type", ""))
    try:
        body = await asyncio.wait_for(_read_body(request, max_bytes), seconds)
    except asyncio.TimeoutError:
        raise RequestError(408, f"the request had not arrived after {seconds:g} seconds") from None
    except ClientDisconnect:
        raise RequestError(400, "the client has disconnected") from None
    try:
        return parse_json(body)
    except JsonError as error:
        message, _ = replace_surrogates(str(error))
        raise RequestError(400, f"the request is not valid JSON: {message}") from None


def _check_content_type(value: str) -> None:
    # Forms of other sites cannot send this content type.
    header = Message()
    header["Content-Type"] = value
    if not value or header.get_content_type() != "application/json":
        raise RequestError(415, "Content-Type must be application/json")
    charset = header.get_content_charset("utf-8")
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise RequestError(415, f"charset {charset[:40]!r}; JSON is UTF-8")


async def _read_body(request: Request, max_bytes: int) -> bytes:
    too_large = RequestError(413, f"a request may have {max_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def parse_request(value: Any, kind: type[_Request], fields: Container[str]) -> _Request:
    """Parse a request.

    Args:
        value: The JSON value of its body.
        kind: What to parse it as.
        fields: Names that an error may give as `param`.

    Raises:
        RequestError: a field is invalid (400). Names the first one.
    """
    check_text(value, fields)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(error, fields) from None


def check_text(value: Any, fields: Container[str]) -> None:
    """Reject strings with lone surrogates, which cannot be encoded.

    Args:
        value: The parsed body of a request.
        fields: Names of fields that an error may show.

    Raises:
        RequestError: there is one (400).
    """
    waiting: list[tuple[Any, str | None]] = [(value, None)]
    while waiting:
        one, field = waiting.pop()
        if isinstance(one, dict):
            waiting += [(key, None) for key in one]
            waiting += [(item, field or str(key)) for key, item in one.items()]
        elif isinstance(one, list):
            waiting += [(item, field) for item in one]
        elif isinstance(one, str) and replace_surrogates(one)[1]:
            name = field if field in fields else None
            message = "holds half of a surrogate pair, which is not a character"
            raise RequestError(400, f"{name or 'the request'}: {message}", param=name)


def _invalid(error: ValidationError, fields: Container[str]) -> RequestError:
    """The first validation error, with the name of its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]]
    field = place[0][:80] if place else None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this field is not supported"
    if field is None:
        word = re.split(r"[ \[]", message, maxsplit=1)[0]
        return RequestError(400, message, param=word if word in fields else None)
    return RequestError(400, f"{field}: {_EXPECTED.get(field, message)}", param=field)


def refused(error: RetroError) -> RequestError:
    """Convert an error into a request error with the client's field names."""
    subject = error.subject
    param = _FIELD_OF_FLAG.get(subject, subject if subject in FIELDS else None)
    if subject.startswith("prompt"):
        param = "prompt"
    found, hint = error.found, error.hint
    for flag, field in _FIELD_OF_FLAG.items():
        found, hint = found.replace(flag, field), hint.replace(flag, field)
    return RequestError(400, f"{param or subject}: {found}. {hint}", param=param)
