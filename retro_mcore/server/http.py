"""HTTP server for completions: OpenAI-compatible API, retrieved sources, and a demo page.

`build_app` builds the application. It needs the `serve` extra (FastAPI, uvicorn).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.errors import RetroError
from retro_mcore.retrieval.neighbors import NeighborSource, SameNeighbors
from retro_mcore.server.chat import CHAT_FIELDS, ChatAnswer, ChatRequest
from retro_mcore.server.chat_template import ChatError, ChatPrompt
from retro_mcore.server.completions import FIELDS, Answer, CompletionRequest, error_body
from retro_mcore.server.documents import ServedDocuments, add_document_routes
from retro_mcore.server.head import HeadAsGet
from retro_mcore.server.http_requests import check_key, parse_request, read_json, refused
from retro_mcore.server.service import (
    BusyError,
    ClosedError,
    GenerationService,
    Job,
)
from retro_mcore.server.streams import INVALID, SERVER, Events, RequestError, finish, stream
from retro_mcore.server.web_page import PAGE_POLICY, page_of


@dataclass(frozen=True)
class ServerParts:
    """Components of the server.

    Attributes:
        service: Generates texts.
        tokenize: Converts prompts to tokens, with BOS if requested.
        tokenizer: The project's tokenizer.
        model_name: Model name for clients.
        chunk_length: The model's chunk length.
        search: Live retrieval, or None.
        retriever: Describes retrieved neighbors, or None.
        given: Makes a source of neighbors from texts by prompt number; None if the model reads no
            neighbors.
        two_chunks: Default of the request field `two_chunks`.
        chat: Writes a conversation as a prompt; None if the model has no chat template.
        documents: Documents that clients add; None if the server does not search.
    """

    service: GenerationService
    tokenize: Callable[[Sequence[str]], list[list[int]]]
    tokenizer: Tokenizer
    model_name: str
    chunk_length: int
    search: NeighborSource | None = None
    retriever: Any = None
    given: Callable[[Sequence[str]], SameNeighbors] | None = None
    two_chunks: bool = False
    chat: ChatPrompt | None = None
    documents: ServedDocuments | None = None


@dataclass(frozen=True)
class ServerLimits:
    """Limits on requests.

    Attributes:
        max_body_bytes: Maximum size of a request.
        max_texts: Maximum number of texts (prompts times `n`) per request.
        max_tokens: Maximum number of new tokens per text.
        max_prompt_chars: Maximum characters of a prompt, checked before tokenization; None: no
            limit.
        receive_seconds: Time limit for receiving a request.
    """

    max_body_bytes: int = 1 << 20
    max_texts: int = 32
    max_tokens: int = 2048
    max_prompt_chars: int | None = None
    receive_seconds: float = 30.0


def build_app(
    parts: ServerParts,
    limits: ServerLimits | None = None,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """Build the application.

    Args:
        parts: Components of the server. The service is started and closed with the application.
        limits: Limits on requests.
        api_key: The bearer token that clients must send, if any.
        allowed_hosts: Accepted Host names. On a loopback address only the server's own, which
            prevents DNS rebinding by foreign pages.
    """
    limits = limits or ServerLimits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts.service.start()
        yield
        await asyncio.to_thread(parts.service.close, 10.0)

    app = FastAPI(title="retro-mcore", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(HeadAsGet)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    _handle_errors(app)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(
            page_of(parts.chat is not None), headers={"Content-Security-Policy": PAGE_POLICY}
        )

    @app.get("/health")
    async def health() -> JSONResponse:
        service = parts.service
        running, waiting = service.load
        status = "ok" if service.is_alive else "failed" if service.has_failed else "closed"
        body = {"status": status, "running": running, "waiting": waiting}
        return JSONResponse(body, 200 if service.is_alive else 503)

    entry = {
        "id": parts.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "retro-mcore",
    }

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request, api_key)
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        check_key(request, api_key)
        _check_model(model, parts.model_name)
        return entry

    @app.post("/v1/completions", openapi_extra=_request_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await respond(request, _prepare)

    @app.post("/v1/chat/completions", openapi_extra=_request_body(ChatRequest))
    async def chat(request: Request) -> Response:
        return await respond(request, _prepare_chat)

    async def respond(request: Request, prepare: Callable[..., Any]) -> Response:
        check_key(request, api_key)
        value = await read_json(request, limits.max_body_bytes, limits.receive_seconds)
        events = Events(parts.service)
        # Outside the event loop, since checking and tokenizing a large request takes long.
        asked, jobs, answer = await asyncio.to_thread(prepare, value, parts, limits, events)
        _submit(parts.service, jobs)
        if asked.stream:
            lines = stream(asked, answer, events, jobs)
            return StreamingResponse(lines, media_type="text/event-stream")
        texts = await finish(request, events, jobs)
        return JSONResponse(await asyncio.to_thread(answer.whole, texts))

    add_document_routes(
        app, parts.documents, api_key, limits.max_body_bytes, limits.receive_seconds
    )
    return app


def _request_body(kind: type[CompletionRequest | ChatRequest]) -> dict[str, Any]:
    """OpenAPI description of a request."""
    schema = kind.model_json_schema()
    # Definitions are in the schema itself, where OpenAPI readers do not look for them.
    definitions = schema.pop("$defs")
    stream_options = schema["properties"]["stream_options"]
    stream_options["anyOf"] = [definitions["StreamOptions"], {"type": "null"}]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


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


def _prepare(
    value: Any, parts: ServerParts, limits: ServerLimits, events: Events
) -> tuple[CompletionRequest, list[Job], Answer]:
    """The parsed request, one job per text in the order of choices, and its answer builder.

    Raises:
        RequestError: the request cannot be generated.
    """
    asked = parse_request(value, CompletionRequest, FIELDS)
    _check_model(asked.model, parts.model_name)
    return _prepare_answer(asked, parts, limits, events, Answer)


def _prepare_chat(
    value: Any, parts: ServerParts, limits: ServerLimits, events: Events
) -> tuple[CompletionRequest, list[Job], Answer]:
    """`_prepare` of a chat request.

    Raises:
        RequestError: the request cannot be generated, or the model does not chat.
    """
    asked = parse_request(value, ChatRequest, CHAT_FIELDS)
    _check_model(asked.model, parts.model_name)
    prompt = _chat_tokens(asked, parts, limits)
    longest = min(limits.max_tokens, parts.service.max_length - len(prompt))
    values = asked.completion(prompt, asked.most_tokens or max(longest, 1))
    completion = parse_request(values, CompletionRequest, CHAT_FIELDS)
    try:
        return _prepare_answer(completion, parts, limits, events, ChatAnswer)
    except RequestError as error:
        raise error.renamed("prompt", "messages") from None


def _chat_tokens(asked: ChatRequest, parts: ServerParts, limits: ServerLimits) -> list[int]:
    if parts.chat is None:
        raise RequestError(
            400,
            "messages: this model has no chat template. Use /v1/completions, or serve it with "
            "--chat-template",
            param="messages",
        )
    length = sum(len(each["content"]) for each in asked.messages)
    if limits.max_prompt_chars is not None and length > limits.max_prompt_chars:
        raise _too_long(f"{length} characters", parts)
    try:
        prompt = parts.chat(asked.messages)
    except ChatError as error:
        raise RequestError(400, f"messages: {error}", param="messages") from None
    if len(prompt) >= parts.service.max_length:
        raise _too_long(f"{len(prompt)} tokens", parts)
    return prompt


def _too_long(length: str, parts: ServerParts) -> RequestError:
    return RequestError(
        400,
        f"messages: {length} leave no room for a reply in the model's window of "
        f"{parts.service.max_length} tokens",
        param="messages",
        code="context_length_exceeded",
    )


def _prepare_answer(
    asked: CompletionRequest,
    parts: ServerParts,
    limits: ServerLimits,
    events: Events,
    kind: type[Answer],
) -> tuple[CompletionRequest, list[Job], Answer]:
    _check_limits(asked, limits)
    try:
        prompts, num_start_tokens = _prompt_tokens(asked.prompts, parts)
        sources = [_source(asked, parts, number) for number in range(len(prompts))]
        jobs = _jobs(asked, prompts, sources, parts, events)
    except RetroError as error:
        raise refused(error) from None
    answer = kind(
        request=asked,
        model_name=parts.model_name,
        tokenizer=parts.tokenizer,
        retriever=parts.retriever,
        chunk_length=parts.chunk_length,
        num_start_tokens=num_start_tokens,
        neighbors_cut=[
            source.num_cut if isinstance(source, SameNeighbors) else None for source in sources
        ],
    )
    return asked, jobs, answer


def _check_model(asked: str | None, served: str) -> None:
    if asked not in (None, served):
        raise RequestError(
            404,
            f"there is no model {str(asked)[:200]!r}; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


def _check_limits(asked: CompletionRequest, limits: ServerLimits) -> None:
    if asked.max_tokens > limits.max_tokens:
        message = f"max_tokens: {asked.max_tokens}, at most {limits.max_tokens}"
        raise RequestError(400, message, param="max_tokens")
    if len(asked.prompts) * asked.num_texts > limits.max_texts:
        name = "n" if asked.best_of is None else "best_of"
        raise RequestError(
            400,
            f"{len(asked.prompts)} prompts with {name} {asked.num_texts}, at most "
            f"{limits.max_texts} texts",
            param=name,
        )
    longest = max((len(one) for one in asked.prompts if isinstance(one, str)), default=0)
    if limits.max_prompt_chars is not None and longest > limits.max_prompt_chars:
        raise RequestError(
            400,
            f"prompt: {longest} characters are more than the model's window can hold, at most "
            f"{limits.max_prompt_chars}",
            param="prompt",
        )


def _prompt_tokens(
    prompts: Sequence[str] | Sequence[list[int]], parts: ServerParts
) -> tuple[list[list[int]], list[int]]:
    """Tokens of each prompt, and the number of tokens added before the client's text.

    An empty text consists of the start token only.
    """
    if not isinstance(prompts[0], str):
        return list(prompts), [0] * len(prompts)  # type: ignore[arg-type]
    added = parts.tokenize([""])[0]
    bos, eod = parts.tokenizer.bos, parts.tokenizer.eod
    start = added or [eod if bos is None else bos]
    tokens = parts.tokenize(prompts)  # type: ignore[arg-type]
    counts = [len(added) if ids else len(start) for ids in tokens]
    return [ids or list(start) for ids in tokens], counts


def _jobs(
    asked: CompletionRequest,
    prompts: Sequence[list[int]],
    sources: Sequence[NeighborSource | None],
    parts: ServerParts,
    events: Events,
) -> list[Job]:
    two_chunks = parts.two_chunks if asked.two_chunks is None else asked.two_chunks
    jobs: list[Job] = []
    for number, (ids, source) in enumerate(zip(prompts, sources, strict=True)):
        for request in asked.generation_requests(ids):
            request = replace(request, neighbors=source, two_chunks=two_chunks, number=number)
            jobs.append(Job(request, events.listener(len(jobs))))
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
        raise refused(error) from None
    except BusyError as error:
        raise RequestError(
            429, str(error), "rate_limit_error", code="rate_limit_exceeded"
        ) from None
    except ClosedError as error:
        raise RequestError(503, str(error), SERVER) from None
