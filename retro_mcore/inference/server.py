"""An HTTP server for completions: OpenAI's interface, retrieved sources, a page to try it.

`build_app` makes the application; it needs the `serve` extra (FastAPI, uvicorn).
"""

from __future__ import annotations

import asyncio
import hmac
import json
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
from retro_mcore.inference.completions import DONE, FIELDS, Answer, CompletionRequest, error_body
from retro_mcore.inference.growing_text import SafeStream
from retro_mcore.inference.neighbors import NeighborSource
from retro_mcore.inference.service import (
    BusyError,
    ClosedError,
    GenerationService,
    Job,
    TokenEvent,
)
from retro_mcore.inference.texts import GeneratedText
from retro_mcore.inference.web_page import PAGE, PAGE_POLICY

_INVALID, _SERVER = "invalid_request_error", "server_error"


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


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind, param, code)

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(self.body, self.status, headers)


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
        events = _Events(parts.service)
        jobs = _jobs(asked, parts, limits, events)
        answer = Answer(
            asked, parts.model_name, parts.tokenizer, parts.retriever, parts.chunk_length
        )
        _submit(parts.service, jobs)
        if asked.stream:
            stream = _stream(asked, answer, events, jobs, parts)
            return StreamingResponse(stream, media_type="text/event-stream")
        texts = await _finish(request, events, jobs)
        return JSONResponse(answer.whole(texts))

    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(message, _INVALID), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("the server failed; its log says why", _SERVER), 500)


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
    asked: CompletionRequest, parts: ServerParts, limits: ServerLimits, events: _Events
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
        raise RequestError(503, str(error), _SERVER) from None


_FIELDS = {"--max-new-tokens": "max_tokens", "--stop": "stop", "neighbors": "neighbors"}


def _refused(error: RetroError) -> RequestError:
    param = _FIELDS.get(error.subject, "prompt" if error.subject.startswith("prompt") else None)
    subject = param or error.subject
    return RequestError(400, f"{subject}: {error.found}. {error.mend}", param=param)


class _Events:
    """What the service's thread tells, in the event loop of the server."""

    def __init__(self, service: GenerationService) -> None:
        self.service = service
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()

    def listener(self, index: int) -> Callable[[TokenEvent], None]:
        """Puts the events of a job into the queue."""

        def tell(event: TokenEvent) -> None:
            # The loop is gone if the server was stopped before the service.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return tell

    async def next(self, timeout: float | None = None) -> tuple[int, TokenEvent] | None:
        """The next event; None after `timeout` seconds without one."""
        try:
            index, event = await asyncio.wait_for(self._queue.get(), timeout)
        except asyncio.TimeoutError:
            return None
        if event.error is not None:
            raise _failure(event.error)
        return index, event


def _failure(error: Exception) -> RequestError:
    if isinstance(error, ClosedError):
        return RequestError(503, str(error), _SERVER)
    message = str(error) if isinstance(error, RetroError) else "generation failed; see the log"
    return RequestError(500, message, _SERVER)


async def _finish(request: Request, events: _Events, jobs: list[Job]) -> list[GeneratedText]:
    """Wait for all texts; a client that has gone away takes its jobs with it."""
    texts: dict[int, GeneratedText] = {}
    try:
        while len(texts) < len(jobs):
            found = await events.next(timeout=1.0)
            if found is None:
                if await request.is_disconnected():
                    raise RequestError(499, "the client has gone away")
            elif found[1].token is None and found[1].text is not None:
                texts[found[0]] = found[1].text
    finally:
        for job in jobs:
            events.service.cancel(job)
    return [texts[index] for index in range(len(jobs))]


async def _stream(
    asked: CompletionRequest, answer: Answer, events: _Events, jobs: list[Job], parts: ServerParts
) -> AsyncIterator[str]:
    """Server-sent events: what each token adds, then the ends, then [DONE]."""
    choices = [_StreamedChoice(index, job, asked, answer, parts) for index, job in enumerate(jobs)]
    texts: dict[int, GeneratedText] = {}
    try:
        while len(texts) < len(jobs):
            found = await events.next()
            assert found is not None
            index, event = found
            assert event.text is not None
            for piece in choices[index].pieces(event.text, event.token):
                yield _event(piece)
            if event.token is None:
                texts[index] = event.text
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield _event(answer.last([texts[index] for index in range(len(jobs))]))
        yield f"data: {DONE}\n\n"
    except RequestError as error:  # the status has been sent already
        yield _event(error.body)
    finally:
        for job in jobs:
            events.service.cancel(job)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _StreamedChoice:
    """The chunks of one text of a stream."""

    def __init__(
        self, index: int, job: Job, asked: CompletionRequest, answer: Answer, parts: ServerParts
    ) -> None:
        self._index, self._asked, self._answer = index, asked, answer
        self._stream = SafeStream(
            parts.tokenizer, job.request.tokens, asked.stop_strings, asked.min_tokens
        )
        self._offset = self._neighbors = self._logprobs = 0
        self._begun = False

    def pieces(self, text: GeneratedText, token: int | None) -> list[dict[str, Any]]:
        """What to send for an event: a token, or the end."""
        pieces = []
        if not self._begun and self._asked.echo:
            pieces.append(self._echo(text))
        self._begun = True
        piece = self._stream.finish() if token is None else self._stream.add(token)
        neighbors = self._answer.neighbors(text, self._neighbors)
        self._neighbors += len(neighbors)
        logprobs = self._new_logprobs(text)
        self._offset += len(piece)
        if piece or neighbors or logprobs or token is None:
            ended = text if token is None else None
            pieces.append(self._answer.piece(self._index, piece, ended, logprobs, neighbors))
        return pieces

    def _echo(self, text: GeneratedText) -> dict[str, Any]:
        prompt = self._answer.prompt_of(text)
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = self._answer.logprobs(text.prompt_logprobs, text.tokens[:1], 0)
        self._offset = len(prompt)
        return self._answer.piece(self._index, prompt, None, logprobs)

    def _new_logprobs(self, text: GeneratedText) -> dict[str, Any] | None:
        entries = text.logprobs[self._logprobs :]
        if not entries:
            return None
        before = text.tokens[: text.prompt_length + self._logprobs]
        self._logprobs += len(entries)
        return self._answer.logprobs(entries, before, self._offset)
