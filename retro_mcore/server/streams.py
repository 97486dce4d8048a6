"""Pass events from the service's thread to an HTTP response: complete, or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from retro_mcore.errors import RetroError
from retro_mcore.inference.texts import GeneratedText
from retro_mcore.json_text import json_line
from retro_mcore.server.completions import DONE, Answer, CompletionRequest, error_body
from retro_mcore.server.service import ClosedError, GenerationService, Job, TokenEvent

INVALID, SERVER = "invalid_request_error", "server_error"


class RequestError(Exception):
    """An error that is sent as the response to a request."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind, param, code)

    def renamed(self, param: str, name: str) -> RequestError:
        """The same error, with another name of a field that the client does not know."""
        error = self.body["error"]
        if error["param"] == param:
            message = error["message"].replace(f"{param}: ", f"{name}: ", 1)
            self.body = {"error": {**error, "param": name, "message": message}}
        return self

    def response(self) -> JSONResponse:
        """The HTTP response."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        if self.status in (408, 413):  # the rest of the request stays unread
            headers = {"Connection": "close"}
        return JSONResponse(self.body, self.status, headers)


class Events:
    """Events of the service's thread, received in the server's event loop."""

    def __init__(self, service: GenerationService) -> None:
        self.service = service
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()

    def listener(self, index: int) -> Callable[[TokenEvent], None]:
        """Create a callback that queues the events of a job."""

        def put_event(event: TokenEvent) -> None:
            # The loop is closed if the server stopped before the service.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return put_event

    async def next(self, timeout: float | None = None) -> tuple[int, TokenEvent] | None:
        """Wait for the next event; None after `timeout` seconds."""
        try:
            index, event = await asyncio.wait_for(self._queue.get(), timeout)
        except asyncio.TimeoutError:
            return None
        if event.error is not None:
            raise _failure(event.error)
        return index, event


def _failure(error: Exception) -> RequestError:
    if isinstance(error, ClosedError):
        return RequestError(503, str(error), SERVER)
    message = str(error) if isinstance(error, RetroError) else "generation failed; see the log"
    return RequestError(500, message, SERVER)


async def finish(request: Request, events: Events, jobs: list[Job]) -> list[GeneratedText]:
    """Wait for all texts. If the client disconnects, its jobs are cancelled."""
    texts: dict[int, GeneratedText] = {}
    try:
        while len(texts) < len(jobs):
            found = await events.next(timeout=1.0)
            if found is None:
                if await request.is_disconnected():
                    raise RequestError(499, "the client has disconnected")
            elif found[1].token is None and found[1].text is not None:
                texts[found[0]] = found[1].text
    finally:
        for job in jobs:
            events.service.cancel(job)
    return [texts[index] for index in range(len(jobs))]


async def stream(
    asked: CompletionRequest, answer: Answer, events: Events, jobs: list[Job]
) -> AsyncIterator[str]:
    """Yield server-sent events: the text that each token adds, the ends, then [DONE]."""
    choices = [_StreamedChoice(index, job, asked, answer) for index, job in enumerate(jobs)]
    texts: dict[int, GeneratedText] = {}
    try:
        while len(texts) < len(jobs):
            found = await events.next()
            assert found is not None
            index, event = found
            assert event.text is not None
            choice = choices[index]
            if choice.scores_prompt:  # may take long, so outside the event loop
                pieces = await asyncio.to_thread(choice.pieces, event.text, event)
            else:
                pieces = choice.pieces(event.text, event)
            for piece in pieces:
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
    return f"data: {json_line(value)}\n\n"


class _StreamedChoice:
    """Builds the stream chunks of one text."""

    def __init__(self, index: int, job: Job, asked: CompletionRequest, answer: Answer) -> None:
        self._index, self._asked, self._answer = index, asked, answer
        self._growing = answer.choice_text(index // asked.n, job.request.tokens)
        self._num_neighbors = 0
        self.scores_prompt = asked.echo and asked.logprobs is not None

    def pieces(self, text: GeneratedText, event: TokenEvent) -> list[dict[str, Any]]:
        """Chunks to send for an event: a token, or the end.

        Uses only the event's own state, because `text` itself keeps growing.
        """
        ended = event.token is None
        if event.token is None:
            piece = self._growing.finish()
        else:
            piece = self._growing.add(event.token, event.logprobs)
        neighbors = self._answer.neighbors(text, self._num_neighbors, event.num_neighbors)
        self._num_neighbors = event.num_neighbors
        logprobs = self._logprobs(text, ended)
        if piece or neighbors or logprobs or ended:
            last = text if ended else None
            return [self._answer.piece(self._index, piece, last, logprobs, neighbors)]
        return []

    def _logprobs(self, text: GeneratedText, ended: bool) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        if self.scores_prompt and self._growing.begun:
            self._growing.score_prompt(text.prompt_logprobs)
            self.scores_prompt = False
        placed = [*self._growing.take_prompt_tokens(), *self._growing.take_tokens(ended)]
        return self._growing.logprobs(placed) if placed else None
