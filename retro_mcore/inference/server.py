"""An HTTP server for completions: OpenAI's interface, retrieved sources, a page to try it.

`build_app` makes the application; it needs the `serve` extra (FastAPI, uvicorn).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from retro_mcore.errors import RetroError
from retro_mcore.inference.completions import FIELDS, Answer, CompletionRequest, error_body
from retro_mcore.inference.neighbors import NeighborSource
from retro_mcore.inference.service import (
    BusyError,
    ClosedError,
    GenerationService,
    Job,
)
from retro_mcore.inference.streams import INVALID, SERVER, Events, RequestError, finish, stream
from retro_mcore.inference.web_page import PAGE, PAGE_POLICY


@dataclass(frozen=True)
class ServerParts:
    """What the server works with.

    Attributes:
        service: Generates.
        tokenize: Prompts to tokens, with BOS if that is asked for.
        tokenizer: The project's.
        model_name: What clients know the model by.
        chunk_length: The model's.
        search: Live retrieval, or None.
        retriever: What describes its neighbors, or None.
        given: Texts by the number of a prompt, to a source of neighbors; None: the model has none.
        two_chunks: Unless a request says otherwise.
    """

    service: GenerationService
    tokenize: Callable[[Sequence[str]], list[list[int]]]
    tokenizer: Any
    model_name: str
    chunk_length: int
    search: NeighborSource | None = None
    retriever: Any = None
    given: Callable[[Sequence[str]], NeighborSource] | None = None
    two_chunks: bool = False


@dataclass(frozen=True)
class ServerLimits:
    """What clients may ask for.

    Attributes:
        max_body_bytes: Size of a request.
        max_texts: Prompts times `n` of a request.
        max_tokens: New tokens of a text.
    """

    max_body_bytes: int = 1 << 20
    max_texts: int = 32
    max_tokens: int = 2048


def build_app(
    parts: ServerParts,
    limits: ServerLimits | None = None,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """The application.

    Args:
        parts: What it works with; the service is started and closed with the application.
        limits: What clients may ask for.
        api_key: The bearer token that clients must send, if any.
        allowed_hosts: Names by which clients may call the server; on a loopback address its own
            alone, so that no page from elsewhere reaches it through a name of its own.
    """
    limits = limits or ServerLimits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts.service.start()
        yield
        await asyncio.to_thread(parts.service.close, 10.0)

    app = FastAPI(title="retro-mcore", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    _handle_errors(app)

    def check_key(request: Request) -> None:
        sent = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(
            sent.encode(), f"Bearer {api_key}".encode()
        ):
            raise RequestError(
                401,
                "a bearer token is needed, and none or another was sent",
                code="invalid_api_key",
            )

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = parts.service.is_alive
        running, waiting = parts.service.load
        body = {"status": "ok" if alive else "closed", "running": running, "waiting": waiting}
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        entry = {"id": parts.model_name, "object": "model", "owned_by": "retro-mcore"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        check_key(request)
        asked = await _read_request(request, limits, parts.model_name)
        events = Events(parts.service)
        jobs = _jobs(asked, parts, limits, events)
        answer = Answer(
            asked, parts.model_name, parts.tokenizer, parts.retriever, parts.chunk_length
        )
        _submit(parts.service, jobs)
        if asked.stream:
            lines = stream(asked, answer, events, jobs, parts.tokenizer)
            return StreamingResponse(lines, media_type="text/event-stream")
        texts = await finish(request, events, jobs)
        return JSONResponse(answer.whole(texts))

    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(message, INVALID), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("the server failed; its log says why", SERVER), 500)


async def _read_request(
    request: Request, limits: ServerLimits, model_name: str
) -> CompletionRequest:
    # A type that a form of another site cannot send.
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise RequestError(415, "Content-Type must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.max_body_bytes:
            raise RequestError(413, f"a request may have {limits.max_body_bytes} bytes")
    try:
        asked = CompletionRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _invalid(error) from None
    if asked.model not in (None, model_name):
        raise RequestError(
            404,
            f"there is no model {asked.model!r}; this server has {model_name!r}",
            param="model",
            code="model_not_found",
        )
    if asked.max_tokens > limits.max_tokens:
        raise RequestError(
            400, f"max_tokens: {asked.max_tokens}, at most {limits.max_tokens}", param="max_tokens"
        )
    if len(asked.prompts) * asked.n > limits.max_texts:
        raise RequestError(
            400,
            f"{len(asked.prompts)} prompts with n {asked.n}, at most {limits.max_texts} texts",
            param="n",
        )
    return asked


def _invalid(error: ValidationError) -> RequestError:
    """The first mistake, with the name of its field."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    field = place[0] if place else None
    if first["type"] == "json_invalid":
        return RequestError(400, f"the request is not valid JSON: {first['msg']}")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this field is not supported"
    if field is None:
        word = message.split(" ", 1)[0]
        return RequestError(400, message, param=word if word in FIELDS else None)
    return RequestError(400, f"{field}: {message}", param=field)


def _jobs(
    asked: CompletionRequest, parts: ServerParts, limits: ServerLimits, events: Events
) -> list[Job]:
    """One job for each text that is asked for, in the order of the choices."""
    prompts = asked.prompts
    tokens = parts.tokenize(prompts) if isinstance(prompts[0], str) else prompts  # type: ignore[arg-type]
    two_chunks = parts.two_chunks if asked.two_chunks is None else asked.two_chunks
    jobs: list[Job] = []
    try:
        for number, ids in enumerate(tokens):
            source = _source(asked, parts, number)
            for request in asked.generation_requests(ids):  # type: ignore[arg-type]
                request = replace(request, neighbors=source, two_chunks=two_chunks)
                jobs.append(Job(request, events.listener(len(jobs))))
    except RetroError as error:
        raise _refused(error) from None
    return jobs


def _source(asked: CompletionRequest, parts: ServerParts, prompt: int) -> NeighborSource | None:
    texts = asked.neighbors_of(prompt)
    if texts is None:
        return parts.search if asked.retrieve else None
    if parts.given is None:
        raise RequestError(400, "neighbors: this model reads none", param="neighbors")
    return parts.given(texts)


def _submit(service: GenerationService, jobs: list[Job]) -> None:
    try:
        service.submit(jobs)
    except RetroError as error:
        raise _refused(error) from None
    except BusyError as error:
        raise RequestError(
            429, str(error), "rate_limit_error", code="rate_limit_exceeded"
        ) from None
    except ClosedError as error:
        raise RequestError(503, str(error), SERVER) from None


_FIELDS = {"--max-new-tokens": "max_tokens", "--stop": "stop", "neighbors": "neighbors"}


def _refused(error: RetroError) -> RequestError:
    param = _FIELDS.get(error.subject, "prompt" if error.subject.startswith("prompt") else None)
    subject = param or error.subject
    return RequestError(400, f"{subject}: {error.found}. {error.mend}", param=param)
